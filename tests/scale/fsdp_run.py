"""Run by torchrun in two processes: everything that tests/scale/test_fsdp.py reads, in one start. Writes to argv[1]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy

import lit_adapters as la
from tests.scale.tasks import METHODS, Task, loader, trainer

CASES = [("llama", name) for name in ("lora", "dora", "loran", "afa", "nora", "nora++")]


def strategy() -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")


def fit(folder: Path, name: str, method: str) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    task = Task(name, METHODS[method])
    trainer(folder / name / method, 2, strategy=strategy()).fit(task, loader(name, 2))
    la.save_adapters(task.net, folder / name / method / "adapters")
    return {"losses": task.losses}


def main(folder: Path) -> None:
    results: dict[str, Any] = {f"{name}-{method}": fit(folder, name, method) for name, method in CASES}
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
