"""Runs that write down everything that happens in them, whole and resumed from each of their checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import Dataset

import lit_adapters as la
from lit_adapters.lightning.resume.sampler import EpochSampler
from tests.lightning.tiny_task import Task, assert_equal_bits, fit

SIZE, BATCH = 22, 4  # six batches, the last one smaller
STEPS = {"every_n_train_steps": 1}


class Keyed(Dataset):
    """Rows that are a function of (epoch, index)."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        return torch.randn(8, generator=torch.Generator().manual_seed(1000 * epoch + index)), index % 3


def keyed_loader(**changes: Any) -> la.ResumableLoader:
    dataset = Keyed()
    return la.ResumableLoader(dataset, batch_size=BATCH, sampler=EpochSampler(dataset, 0), **changes)


class Noisy(Task):
    """Draws from all random states in every step; its rates follow steps, the loss, or the validation of each epoch."""

    def __init__(self, schedule: str = "step") -> None:
        afa = la.AFALoRA(rank=2, alpha=4.0, activation="silu", schedule=la.schedules.Linear(start=0.0, end=0.8))
        super().__init__([afa, la.NoRA(groups=4, rank=2)])
        self.dropout = nn.Dropout(0.3)
        self.schedule = schedule

    def forward(self, batch: Any) -> Tensor:
        noise = random.random() + np.random.normal() if self.training else 0.0
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.net(self.dropout(x)) * (1 + 0.1 * noise)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("batch_idx", float(batch_idx))
        return loss

    def on_train_epoch_start(self) -> None:
        torch.rand(1)  # between the end of an epoch and its iterator

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.schedule == "plateau":
            rates = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "monitor": "val/loss"}}
        if self.schedule == "loss":
            rates = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.3)
            following = {"scheduler": rates, "monitor": "train/loss", "interval": "step", "frequency": 2}
            return {"optimizer": optimizer, "lr_scheduler": following}
        if self.schedule == "epoch":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        steps = int(self.trainer.estimated_stepping_batches)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


class Diary(Logger):
    """A logger that keeps all records in memory, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, dict[str, float]]] = []

    name, version = "diary", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.records.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Trace(Callback):
    """Which hooks run, at which step of which epoch, and the weights' sum at each."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def _note(self, hook: str, trainer: Any, module: Any, *more: Any) -> None:
        weights = sum(p.detach().double().sum().item() for p in module.parameters() if p.requires_grad)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.lines.append((hook, trainer.current_epoch, trainer.global_step, weights, rate, *more))

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self._note("epoch start", trainer, module)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._note("batch start", trainer, module, batch_idx, batch[0].double().sum().item())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note("batch end", trainer, module, batch_idx, trainer.is_last_batch, outputs["loss"].item())

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self._note("validation", trainer, module, trainer.callback_metrics["val/loss"].item())

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._note("epoch end", trainer, module)


class Saver(ModelCheckpoint):
    """Keeps all its checkpoints, and how much had been noted as each was written."""

    def __init__(self, folder: Path, trace: Trace, diary: Diary, **when: Any) -> None:
        super().__init__(folder, save_top_k=-1, filename="{epoch}-{step}", **when)
        self.trace = trace
        self.diary = diary
        self.moments: dict[str, tuple[int, int]] = {}

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        self.moments[filepath] = len(self.trace.lines), len(self.diary.records)
        super()._save_checkpoint(trainer, filepath)


def run(folder: Path, data: Any, when: dict[str, Any], schedule: str = "step", ckpt: Any = None, **changes: Any) -> Any:
    trace, diary, task = Trace(), Diary(), Noisy(schedule)
    saver = Saver(folder, trace, diary, **when)
    watching = la.AdapterCallback(log_every_n_steps=4)
    trainer = fit(folder, task, watching, trace, saver, data=data, ckpt=ckpt, logger=diary, **changes)
    return trainer, task, trace, diary, saver


def final(trainer: Any, task: nn.Module) -> dict[str, Tensor]:
    """All tensors that a run ends with, and the random states."""
    optimizer = trainer.optimizers[0].state_dict()["state"]
    moments = {f"optimizer.{i}.{k}": v for i, values in optimizer.items() for k, v in values.items()}
    return {**task.state_dict(), **moments, "torch": torch.get_rng_state(), "python": torch.tensor(random.random())}


def compare(
    folder: Path, data: Any, when: dict[str, Any], schedule: str = "step", every: int = 1, **settings: Any
) -> None:
    """Resume from every `every`-th checkpoint; hooks, weights, rates, losses, records and the end must be equal."""
    settings = {"max_epochs": 2} | settings
    trainer, task, trace, diary, checkpoints = run(folder / "whole", data(), when, schedule, **settings)
    want = final(trainer, task)
    compared = 0
    for path, (lines, records) in list(checkpoints.moments.items())[::every]:
        if torch.load(path, weights_only=True)["global_step"] == trainer.global_step:
            continue  # see test_a_run_that_had_ended_is_finished
        resumed, again, trace2, diary2, _ = run(folder / "resumed", data(), when, schedule, path, **settings)
        assert trace2.lines == trace.lines[lines:], path
        assert diary2.records == diary.records[records:], path
        assert_equal_bits(final(resumed, again), want)
        compared += 1
    assert compared
