"""Write what a run of a study leaves: metrics, values for each item, learning curves, numbers of parameters.

`lit_adapters.study` adds this callback to every run. It works with every LightningModule. Values for each item are
taken from what `test_step` or `validation_step` returns, if that is a mapping of tensors with one value for each item.
Studies compare them item by item, so that a loader with a random order leaves none.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import RandomSampler

from lit_adapters.errors import NotFiniteError
from lit_adapters.files.arrays import write_arrays

CHECKPOINT = "study.ckpt"
FIT = "fit.json"
EVALUATION = "evaluation.json"
FAILURE = "failure.json"
ITEMS = "items.npz"
_POINTS = 50  # of a learning curve


class RunRecord(Callback):
    """Writes what a run leaves into its folder.

    `fit` leaves fit.json, and study.ckpt with the last weights; `validate` and `test` leave evaluation.json and
    items.npz. A run that ends by an exception leaves failure.json.

    Args:
        folder: The run's folder, which exists.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._curve: list[dict[str, float]] = []
        self._sums: dict[str, list[Any]] = {}
        self._validated: set[str] = set()  # names that validations during the training log
        self._seen: set[str] = set()  # names that training steps log
        self._start = 0.0
        self._step = 0  # the last one after which a batch ended
        self._items: dict[str, list[np.ndarray]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Take the means of what is logged, over a fiftieth of the training each."""
        for name, value in trainer.callback_metrics.items():
            if value.numel() == 1 and name not in self._validated:
                total = self._sums.setdefault(name, [0.0, 0])
                total[0] = total[0] + value.detach().double()
                total[1] += 1
                self._seen.add(name)
        steps = trainer.estimated_stepping_batches
        every = max(1, math.ceil(steps / _POINTS)) if math.isfinite(steps) else 100
        # Batches whose gradient is accumulated end no step.
        ended, self._step = trainer.global_step != self._step, trainer.global_step
        if self._sums and ended and trainer.global_step % every == 0:
            self._end_window(trainer.global_step)

    def _end_window(self, step: int) -> None:
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._curve.append({"step": step, **means})
        self._sums = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write fit.json and the weights."""
        if self._sums:
            self._end_window(trainer.global_step)
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=True)
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        report = getattr(pl_module, "report", None)
        values = {
            "curve": self._curve,
            "steps": trainer.global_step,
            "seconds": time.perf_counter() - self._start,
            "parameters": {
                "trainable": trainable,
                "without_head": getattr(report, "trainable_without_head", trainable),
            },
        }
        self._write(trainer, FIT, values)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any = None,
        batch_idx: int = 0,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the values for each item."""
        self._take(outputs, trainer.test_dataloaders, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any = None,
        batch_idx: int = 0,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the values for each item; during a training they are not needed."""
        if trainer.state.fn == "validate":
            self._take(outputs, trainer.val_dataloaders, dataloader_idx)

    def _take(self, outputs: Any, loaders: Any, index: int) -> None:
        """Keep the 1-D tensors of a mapping; several loaders have names as those of Lightning's metrics."""
        several = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
        if not isinstance(outputs, Mapping) or isinstance(getattr(several[index], "sampler", None), RandomSampler):
            return
        suffix = f"/dataloader_idx_{index}" if len(several) > 1 else ""
        for name, value in outputs.items():
            if isinstance(value, Tensor) and value.dim() == 1:
                self._items.setdefault(f"{name}{suffix}", []).append(_compact(value))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the values of an earlier epoch."""
        self._items = {}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write evaluation.json and items.npz."""
        metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if v.numel() == 1}
        if trainer.is_global_zero and self._items:
            write_arrays(self.folder / ITEMS, {name: np.concatenate(parts) for name, parts in self._items.items()})
        self._write(trainer, EVALUATION, {"metrics": metrics})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both files after `validate`; during a training, add a point to the learning curve."""
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)
            return
        metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if v.numel() == 1 and n not in self._seen}
        self._validated |= metrics.keys()
        self._items = {}
        if metrics and not trainer.sanity_checking:
            self._curve.append({"step": trainer.global_step, **metrics})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write failure.json. A run whose values are not finite has diverged; another exception is an error."""
        values = {"diverged": isinstance(exception, NotFiniteError), "message": str(exception)}
        self._write(trainer, FAILURE, values)

    def _write(self, trainer: Trainer, name: str, values: Mapping[str, Any]) -> None:
        if trainer.is_global_zero:
            (self.folder / name).write_text(json.dumps(values), encoding="utf-8")


def _compact(value: Tensor) -> np.ndarray:
    """The values as an array (N,): floats as float16 if this keeps their mean, else as float32; others as they are."""
    value = value.detach().cpu()
    if value.is_floating_point():
        half = value.to(torch.float16)
        exact, rounded = value.double().mean(), half.double().mean()
        keeps = bool(torch.isfinite(half).all()) and bool(torch.isclose(rounded, exact, rtol=5e-4, atol=0.0))
        value = half if keeps else value.float()
    array: np.ndarray = value.numpy()
    return array
