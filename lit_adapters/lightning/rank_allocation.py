"""The part of AdapterCallback that allocates ranks: it tells `RankAllocation` the optimiser steps of a Trainer."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lit_adapters.errors import AdapterError
from lit_adapters.lightning.total_steps import total_steps
from lit_adapters.training.rank_allocation import RankAllocation


class Allocating(Callback):
    """Allocates the ranks of AdaLoRA and its kin with every optimiser step, and adds the gradient of their penalty.

    A hook of the optimiser does it, so a step that a gradient scaler leaves out does not count, and gradients are
    there in manual optimisation too.

    Raises:
        AdapterError: The settings of a method leave nothing to allocate, or do not fit into the training.
    """

    def __init__(self) -> None:
        self._allocation: RankAllocation | None = None
        self._optimizer: Optimizer | None = None
        self._handle: Any = None
        self._started = False
        self._state: list[dict[str, Any]] | None = None  # of the run being resumed
        self._max_epochs: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the epochs before StochasticWeightAveraging adds one."""
        self._max_epochs = trainer.max_epochs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the settings before anything is computed."""
        self._allocation = RankAllocation(pl_module)
        if not self._allocation:
            return
        self._optimizer = self._allocation.optimizer(trainer.optimizers)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(self._optimizer, "_step_supports_amp_scaling", False):
            raise AdapterError(
                f"{type(self._optimizer).__name__}(fused=True) unscales gradients inside its step, where rank "
                "allocation cannot see them: set fused=False, or precision='bf16-mixed'"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule, and watch the optimiser; `fast_dev_run` has too few steps for any schedule."""
        if not self._allocation or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self._optimizer is not None
        # With several optimisers that take turns, each makes its share of the steps.
        count = max(1, len(trainer.optimizers))
        self._allocation.start(
            trainer.global_step // count, total_steps(trainer, self._max_epochs) / count, self._state
        )
        self._started = True
        allocation = self._allocation

        def after_step(*_: Any) -> None:
            allocation.update(trainer.global_step // count + 1)  # the trainer counts this step later

        self._handle = self._optimizer.register_step_post_hook(after_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty, before Lightning clips."""
        inner = getattr(optimizer, "optimizer", None)  # of Lightning's own, in manual optimisation
        if self._allocation and self._optimizer in (optimizer, inner):
            self._allocation.add_orthogonality()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the training ended before the ranks were final."""
        self._stop()
        if not (self._allocation and self._started) or trainer.interrupted:
            return
        where = self._allocation.unfinished()
        if where and trainer.is_global_zero:
            warnings.warn(
                f"training ended {where}, before rank allocation did: more directions are left than target ranks ask "
                "for. Train on to the end, or set total_step to fewer steps",
                stacklevel=2,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._stop()

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """The state of `RankAllocation` as `allocation`; empty if there is nothing to allocate."""
        state = self._allocation.state_dict() if self._allocation and self._started else self._state
        return {} if state is None else {"allocation": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` returned for the start of the training; checkpoints without ranks have nothing."""
        self._state = state_dict.get("allocation")
