"""Language models as directories, which both sides load: SmolLM2-135M, or a tiny random LLaMA."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.jobs.job import SizeName
from language.gguf_files import converted
from language.models import SMOLLM2_ADDRESS, TINY_LLAMA, create_tokenizer
from lit_adapters.assets.package_index import resolve

# Above the tokens of text, so that sampled texts hardly ever end by chance.
_TINY_VOCABULARY = 32768
_UNUSED = {"tiny": "<s>", "real": "<repo_name>"}  # tokens that the models as good as never write


def language_model(size: SizeName, work: Path) -> Path:
    """The directory of the model and its tokenizer.

    Args:
        size: "real" is SmolLM2-135M-Instruct; "tiny" is made in `work`.
        work: A folder for files.
    """
    if size == "real":
        return converted(resolve(SMOLLM2_ADDRESS))
    folder = work / "tiny_llama"
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = create_tokenizer(TINY_LLAMA)
        config = LlamaConfig(
            vocab_size=_TINY_VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def endless_model(size: SizeName, work: Path) -> Path:
    """The same model with an end token that it does not write, so that all completions have the same length.

    Args:
        size: As for `language_model`.
        work: A folder for files.
    """
    base, folder = language_model(size, work), work / f"endless_{size}"
    if folder.exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = _UNUSED[size]
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": tokenizer.eos_token_id}))
    for file in base.glob("*.safetensors*"):
        os.symlink(file.resolve(), folder / file.name)
    return folder
