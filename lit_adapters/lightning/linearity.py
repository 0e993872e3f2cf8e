"""The part of AdapterCallback that warns, once in a training, of nonlinear methods that are linear in effect."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_adapters.training.linearity import linear_layers, step_to_look_at


class Linearity(Callback):
    """Looks at the adapters once, when a fifth of the optimiser steps is done, at least 10 (100 if no end is known)."""

    def __init__(self) -> None:
        self._step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know when to look; never in a run that is resumed after that step."""
        step = step_to_look_at(trainer.estimated_stepping_batches)
        self._step = step if trainer.global_step < step else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Warn if the step to look at is done."""
        if self._step is None or trainer.global_step < self._step:
            return
        self._step = None
        with trainer.precision_plugin.forward_context():
            text = linear_layers(pl_module)
        if text and trainer.is_global_zero:
            warnings.warn(f"step {trainer.global_step}: {text}", stacklevel=2)
