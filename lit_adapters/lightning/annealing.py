"""Moves annealed adapters with the optimiser steps of a Trainer."""

from __future__ import annotations

import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.base import AdapterModule
from lit_adapters.model.attach import adapters
from lit_adapters.schedules import Adaptive, Schedule

_LINEAR_SHARE = 0.05  # of the training, at its end, if an early stop is put off


class Annealer:
    """Keeps every scheduled adapter at the progress of the training, and watches the loss for adaptive schedules.

    Progress is the share of the optimiser steps that are done, so gradient accumulation, batch limits and several
    epochs need nothing special. The betas are buffers of the adapters; an adaptive schedule also needs them here, as
    rounding to float32 would tell a resumed run from an uninterrupted one, and two running means of the loss for each
    width of window.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[AdapterModule, Schedule]] = []
        self._betas: list[float] = []
        self._total = 0
        self._step = 0
        self._loss = 0.0  # summed over the micro-batches since the last step
        self._means: dict[int, tuple[float, float]] = {}  # by window: over a fifth of it, over all of it

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        means = {str(w): list(m) for w, m in self._means.items()}
        return {"betas": self._betas, "loss": self._loss, "means": means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._betas, self._loss = list(state["betas"]), state["loss"]
        self._means = {int(w): (fast, slow) for w, (fast, slow) in state["means"].items()}

    def start(self, trainer: Trainer, module: nn.Module, finalize: bool = False) -> None:
        """Look up the scheduled adapters and the number of steps, and put the adapters where this step has them.

        With `finalize` the trainer may not stop before the step after which a twentieth of the training was linear.

        Raises:
            AdapterError: there is a schedule, and no end of the training to relate it to.
        """
        self._layers = [(a, a.schedule) for _, a in adapters(module) if a.schedule is not None]
        if not self._layers:
            return
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total) or total < 0:  # -1: without end, as the length of the data is not known
            raise AdapterError(
                f"{self._layers[0][1]} is a function of training progress, and this training has no end that is known; "
                "set max_steps, or max_epochs where the data have a length"
            )
        # Lightning counts the steps of every optimiser, of which manual optimisation may have several; max_steps too.
        self._total, self._step = int(total) * max(1, len(trainer.optimizers)), trainer.global_step
        if trainer.max_steps != -1:
            self._total = min(self._total, trainer.max_steps)
        if len(self._betas) != len(self._layers):
            self._betas = [a.beta.item() for a, _ in self._layers]  # type: ignore[operator, union-attr]
        self._move(0.0)
        if finalize:
            trainer.fit_loop.epoch_loop.min_steps = max(self._earliest_end(), trainer.fit_loop.min_steps or 0)

    def _earliest_end(self) -> int:
        """The step before which a run may not end: what anneals to 0 is there, and the linear steps have passed."""
        schedules = [f for _, f in self._layers if f(1.0) == 0.0]
        if not schedules:
            return 0
        ends = (s for s in range(self._total + 1) if all(f(s / self._total) == 0.0 for f in schedules))
        return min(self._total, next(ends, self._total) + math.ceil(_LINEAR_SHARE * self._total))

    @property
    def beta(self) -> float | None:
        """The largest coefficient of all layers; None where nothing is annealed."""
        return max(self._betas, default=None)

    def after_batch(self, trainer: Trainer, loss: Tensor | None) -> None:
        """Take the loss of a micro-batch, and move if it completed an optimiser step."""
        if not self._layers:
            return
        if loss is not None and any(isinstance(s, Adaptive) for _, s in self._layers):
            self._loss += float(trainer.strategy.reduce(loss.detach(), reduce_op="mean"))
        steps = trainer.global_step - self._step
        if steps > 0:
            self._step = trainer.global_step
            self._follow_loss()
            self._move(steps / self._total)

    def _follow_loss(self) -> None:
        for window in {s.window for _, s in self._layers if isinstance(s, Adaptive)}:
            fast, slow = self._means.get(window, (self._loss, self._loss))
            self._means[window] = (
                fast + (self._loss - fast) * min(1.0, 5 / window),
                slow + (self._loss - slow) / window,
            )
        self._loss = 0.0

    def _move(self, elapsed: float) -> None:
        progress = min(1.0, self._step / self._total) if self._total else 1.0
        for i, (adapter, schedule) in enumerate(self._layers):
            if isinstance(schedule, Adaptive):
                fast, slow = self._means.get(schedule.window, (0.0, 0.0))
                self._betas[i] = schedule.advance(self._betas[i], progress, elapsed, rising=fast > slow)
            else:
                self._betas[i] = min(self._betas[i], schedule(progress))  # what is linear by now stays so
            adapter.set_beta(self._betas[i])  # type: ignore[operator]

    def finish(self, trainer: Trainer) -> None:
        """Warn if the training ended before the annealing did, or the best checkpoint was written before."""
        if not self._layers:  # nothing to anneal, or the run was over when it was resumed
            return
        for callback in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
            path = getattr(callback, "best_model_path", "")
            if getattr(callback, "monitor", None) and path and Path(path).is_file():
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
                except pickle.UnpicklingError:  # it holds values of other classes, and this is no place to trust them
                    continue
                if any(key.endswith(".beta") and value.item() > 0 for key, value in state.items()):
                    warnings.warn(f"{path} is the best by {callback.monitor!r} and still nonlinear", stacklevel=2)  # type: ignore[attr-defined]
        held = [a.qualified_name for (a, _), beta in zip(self._layers, self._betas, strict=True) if beta > 0]
        if held:
            warnings.warn(
                f"training ended with {len(held)} adapters still nonlinear (beta {self.beta:g}, {held[0]!r} first): "
                "they cannot be merged. Train on to the end of the schedule, or choose one that ends earlier",
                stacklevel=2,
            )
