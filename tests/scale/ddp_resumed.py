"""A run of two processes with dropout, once without a break and once from a checkpoint in mid-epoch."""

from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DistributedSampler

import lit_adapters as la
from tests.lightning import tiny_task
from tests.lightning.tiny_task import loader, nora


class Noisy(tiny_task.Task):
    """A different dropout in each process, and a loader that can go on anywhere."""

    def __init__(self) -> None:
        afa = la.AFALoRA(rank=2, dropout=0.2, schedule=la.schedules.Linear(end=0.8))
        super().__init__([nora(base="anchored"), afa])
        self.net.norm = nn.LayerNorm(8).requires_grad_(False)
        self.losses: list[float] = []

    def train_dataloader(self) -> Any:
        data = loader().dataset
        sampler: Any = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, seed=0)
        return la.ResumableLoader(data, batch_size=2, sampler=sampler)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def run(folder: Path, ckpt: Path | None = None) -> dict[str, Any]:
    """Three epochs of six steps, with a checkpoint at every fourth step; losses and weights of this process."""
    seed_everything(0, verbose=False)
    task = Noisy()
    saver = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    running = tiny_task.trainer(folder, la.AdapterCallback(), saver, max_epochs=3, devices=2, strategy="ddp")
    running.fit(task, ckpt_path=ckpt)
    return {"losses": task.losses, "state": tiny_task.state(task)}


def main(folder: Path) -> dict[str, Any]:
    """Without a break, and from step 8, in the second epoch."""
    return {"whole": run(folder / "whole"), "rest": run(folder / "rest", folder / "whole" / "step=8.ckpt")}
