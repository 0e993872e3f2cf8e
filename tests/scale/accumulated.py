"""Run by torchrun in two processes: micro-batches of a row, for tests/language/test_accumulation.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from language.module import CausalLMTuner
from tests.language import test_accumulation, tiny


class Shared(LightningDataModule):
    """The rows in turns."""

    def train_dataloader(self) -> Any:
        rows = test_accumulation.batches("sft", 1, 6)
        return DataLoader(rows[self.trainer.global_rank :: 2], batch_size=None)  # type: ignore[union-attr]


def main(folder: Path) -> dict[str, Any]:
    """Losses and weights after each step of this process."""
    module: Any = tiny.tuner(CausalLMTuner, init_seed=1)
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    seen = test_accumulation.Updates()
    settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "accumulate_grad_batches": 2}
    trainer = tiny.trainer(folder, callbacks=[seen], enable_checkpointing=False, **settings)
    trainer.fit(module, datamodule=Shared())
    return {"losses": seen.losses, "values": seen.values}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.save(main(out), out / f"rank{torch.distributed.get_rank()}.pt")
