"""Generation with an adapter, as it is and merged: `load_adapters` and `merge` beside peft's.

Both sides are scripts of the same form, because our command line answers one prompt a process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import lit_adapters as la
from benchmarks.jobs.job import Data, Job, SizeName, script_side
from benchmarks.jobs.models import language_model
from benchmarks.jobs.text import alpaca_rows

_SETTINGS = {
    "tiny": {"prompts": 4, "new_tokens": 8, "rank": 2},
    "real": {"prompts": 10, "new_tokens": 64, "rank": 8},
}


def unmerged(size: SizeName, data: Data, work: Path) -> Job:
    """The adapter stays an adapter."""
    return _job("generation", False, size, data, work)


def merged(size: SizeName, data: Data, work: Path) -> Job:
    """The adapter is loaded and merged into the weights, then the prompts are continued."""
    return _job("generation_merged", True, size, data, work)


def _job(name: str, merge: bool, size: SizeName, data: Data, work: Path) -> Job:
    """The prompts are continued one after another, greedily and by the same number of tokens."""
    settings: dict[str, Any] = _SETTINGS[size] | {"merge": merge}
    model = language_model(size, work)
    rows = alpaca_rows(size, data, settings["prompts"])
    prompts = [f"{row['instruction']}\n{row['input']}\n" for row in rows]
    adapters = work / f"{name}_adapter", work / f"{name}_peft_adapter"
    _save(model, settings["rank"], *adapters)
    ours, theirs = (
        script_side(
            script,
            settings | {"model": str(model), "prompts": prompts, "adapter": str(adapter)},
            work / f"{name}_{side}",
            saves=None,
        )
        for script, adapter, side in zip(
            ("ours_generation", "peer_generation"), adapters, ("ours", "peer"), strict=True
        )
    )
    return Job(name, "peft", "tokens", settings, ours, theirs)


def _save(model: Path, rank: int, ours: Path, theirs: Path) -> None:
    """Save one LoRA for both libraries, on all linear layers but the head, with an update that is not zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    la.attach(base, la.LoRA(rank=rank))
    with torch.no_grad():
        for _, adapter in la.adapters(base):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(1e-3 * torch.randn_like(parameter))
    la.save_adapters(base, ours)
    la.export_peft(base, theirs)
