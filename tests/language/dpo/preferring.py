"""DPO on the tiny model: tuners, pairs, and log-probabilities written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lit_adapters as la
from language.dpo.data import PreferenceDataModule
from language.dpo.module import DPOTuner
from tests.language import tiny
from tests.language.tiny import CONFIGS

PAIRS = str(CONFIGS / "smoke/pairs.jsonl")
METHODS = {
    "lora": la.LoRA(rank=2, dropout=0.2),
    "dora": la.DoRA(rank=2, dropout=0.2),
    "nora_plus_plus": la.NoRAPlusPlus(nora=la.NoRA(groups=4), lora=la.LoRA(rank=2, dropout=0.2)),
    # At the default frequency of 1e4 a step of Adam turns the phase by hundreds of radians: learning is then chance.
    "loran": la.LoRAN(rank=2, dropout=0.2, function="sine", frequency="calibrate"),
    "afa": la.AFALoRA(rank=2, dropout=0.2),
}
tuner = partial(tiny.tuner, DPOTuner)
built = partial(tiny.built, DPOTuner)


def data(**changes: Any) -> PreferenceDataModule:
    """The pairs of the smoke recipe."""
    return PreferenceDataModule(
        PAIRS, **{"tokenizer": "tiny_llama", "max_length": 96, "batch_size": 4, "val_fraction": 0.3} | changes
    )


def plain_log_probabilities(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """log p of each answer in float64, token by token from whole logits."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.double()
    sums = []
    for line, ids, labels in zip(logits, rows["input_ids"], rows["labels"], strict=True):
        at = [t for t in range(1, len(ids)) if labels[t] != -100]
        sums.append(sum(line[t - 1].log_softmax(-1)[ids[t]] for t in at))
    return torch.stack(sums)
