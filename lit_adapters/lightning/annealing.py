"""The part of AdapterCallback that anneals: it tells `Annealer` the steps and values of a Trainer."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_adapters.errors import AdapterError
from lit_adapters.lightning.total_steps import total_steps
from lit_adapters.model.record import adapters
from lit_adapters.schedules import monitor_mode
from lit_adapters.training.annealing import Annealer, Watched


class Annealing(Callback):
    """Moves annealed adapters with every optimiser step; the largest beta is in the progress bar as `adapter/beta`.

    Args:
        finalize: Put an early stop off until annealing has ended and a twentieth of the training has been linear.

    Raises:
        AdapterError: There is something to anneal and no end of the training, or an adaptive schedule monitors a value
            that is not logged.
    """

    def __init__(self, finalize: bool) -> None:
        self._finalize = finalize
        self._annealer: Annealer | None = None
        self._state: dict[str, Any] | None = None  # of the run being resumed
        self._max_epochs: int | None = None

    @property
    def beta(self) -> float | None:
        """The largest coefficient of all layers; None where nothing is annealed."""
        return None if self._annealer is None else self._annealer.beta

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the epochs before StochasticWeightAveraging adds one, which takes no optimiser steps."""
        self._max_epochs = trainer.max_epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the adapters where this step has them."""
        self._annealer = Annealer(pl_module, self._state)
        if not self._annealer.layers:
            return
        total = total_steps(trainer, self._max_epochs)
        self._annealer.start(trainer.global_step, total)
        if self._finalize:
            epoch_loop = trainer.fit_loop.epoch_loop
            epoch_loop.min_steps = max(self._annealer.linear_from(), trainer.fit_loop.min_steps or 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the values that adaptive schedules look at, and move if the batch completed an optimiser step."""
        assert self._annealer is not None
        for watched in self._annealer.watched:
            value = _value(trainer, pl_module, outputs, watched)
            if value is not None:
                self._annealer.observe(watched, float(trainer.strategy.reduce(value.detach(), reduce_op="mean")))
        self._annealer.advance(trainer.global_step)
        if self.beta is not None:
            pl_module.log("adapter/beta", self.beta, prog_bar=True, logger=False, batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the training ended before the annealing did, or the best checkpoint was written before."""
        # Without layers there is nothing to anneal; without an annealer the run was over when it was resumed.
        if self._annealer is None or not self._annealer.layers or trainer.interrupted:
            return
        if trainer.is_global_zero:
            _warn_of_nonlinear_checkpoints(trainer, pl_module)
        nonlinear = self._annealer.nonlinear()
        if nonlinear:
            warnings.warn(
                f"training ended with {len(nonlinear)} adapters still nonlinear (beta {self.beta:g}, {nonlinear[0]!r} "
                "first): they cannot be merged. Train on to the end of the schedule, or choose one that ends earlier",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The betas, and what adaptive schedules have seen."""
        if self._annealer is not None:
            return self._annealer.state_dict()
        return self._state or {"betas": [], "loss": 0.0, "means": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` returned for the start of the training."""
        self._state = state_dict


def _value(trainer: Trainer, pl_module: LightningModule, outputs: Any, watched: Watched) -> Tensor | None:
    """What an adaptive schedule looks at, with the sign that makes it fall as training improves."""
    monitor = watched.monitor or getattr(pl_module, "default_monitor", None)
    if monitor is None:
        if isinstance(outputs, dict) and "followed" in outputs:
            raise AdapterError(
                "training_step returns `followed`, which adaptive schedules no longer look at: log the value and name "
                "it, as in Adaptive(monitor='train/reward')"
            )
        loss: Tensor | None = outputs.get("loss") if isinstance(outputs, dict) else outputs
        return loss
    if monitor not in trainer.callback_metrics:
        raise AdapterError(
            f"an adaptive schedule looks at {monitor!r}, which training_step has not logged; it may name one of "
            f"{', '.join(sorted(trainer.callback_metrics)) or 'none so far'}"
        )
    value = trainer.callback_metrics[monitor]
    return value if monitor_mode(monitor, watched.mode) == "min" else -value


def _warn_of_nonlinear_checkpoints(trainer: Trainer, pl_module: LightningModule) -> None:
    annealed = {f"{name}.beta" for name, adapter in adapters(pl_module) if adapter.schedule is not None}
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "best_model_path", "")
        if not (getattr(callback, "monitor", None) and path and Path(path).is_file()):
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        except pickle.UnpicklingError:  # it holds values of other classes, and this is no place to trust them
            continue
        if any(state[key].item() > 0 for key in annealed & state.keys()):
            warnings.warn(f"{path} is the best by {callback.monitor!r} and still nonlinear", stacklevel=2)  # type: ignore[attr-defined]
