"""Drafts of the tiny LLaMA, and a LLaMA whose layers matter."""

from __future__ import annotations

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from language.draft.module import DraftTuner
from tests.language import tiny

METHODS = {
    "lora": la.LoRA(rank=2),
    "dora": la.DoRA(rank=2),
    "nora_plus_plus": la.NoRAPlusPlus(nora=la.NoRA(groups=4, base="anchored"), lora=la.LoRA(rank=2)),
    "loran": la.LoRAN(rank=2),
    "afa": la.AFALoRA(rank=2, activation="silu", schedule=la.schedules.Linear(end=0.6)),
}
tuner = partial(tiny.tuner, DraftTuner, keep_layers=[1])  # a draft of the second layer of the tiny LLaMA
built = partial(tiny.built, DraftTuner, keep_layers=[1])


def llama(layers: int = 5) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)  # so that layers matter
    return model
