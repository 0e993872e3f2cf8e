"""A loss that is the mean over all terms of an optimiser step, however they fall into micro-batches and processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lit_adapters.errors import AdapterError

_KEY = "open_step"  # in checkpoints


@dataclass
class _Step:
    """What is known of an optimiser step whose gradient is being accumulated.

    Attributes:
        divisor: What the sums of all its micro-batches are divided by, a guess of the mean number of their terms.
        number: Terms of all micro-batches so far; the mean over processes, as `divisor`.
        total: Sum of this process's terms so far, without gradient.
        after: Optimiser steps that were done when it began.
        resumed: Whether it comes from a checkpoint and its gradient has not been seen yet.
    """

    divisor: float
    number: float
    total: Tensor
    after: int
    resumed: bool = False


class StepMeanModule(LightningModule):
    """A LightningModule whose `training_step` returns `mean_over_step(...)`: each term of a step counts the same.

    Lightning takes the mean over micro-batches and DDP the mean over processes, whatever the number of terms in each.
    The number of terms of a whole step is known only after its last micro-batch. Until then the sums are divided by the
    number of terms of the first one; `on_before_optimizer_step` multiplies the gradient by the ratio of the two, before
    gradients are clipped. Without `accumulate_grad_batches` there is nothing to correct.
    """

    _open_step: _Step | None = None

    @property
    def default_monitor(self) -> str | None:
        """What adaptive schedules look at: the mean so far, as the loss of a micro-batch has the wrong divisor."""
        trainer = self._trainer
        if trainer is None or trainer.accumulate_grad_batches == 1:
            return None
        return "train/loss" if "train/loss" in trainer.callback_metrics else None

    def mean_over_step(self, total: Tensor, number: int, batch_idx: int) -> tuple[Tensor, Tensor]:
        """This process's part of the mean loss of an optimiser step.

        Args:
            total: Sum of the terms of a micro-batch, such as -log p of its tokens.
            number: How many terms that are.
            batch_idx: The index that `training_step` gets.

        Returns:
            What `training_step` returns, and what it logs: the mean over all micro-batches of the step so far.

        Raises:
            AdapterError: The gradient of the step before was not corrected, or the strategy keeps gradients to itself.
        """
        number_here = self.over_processes(number, "mean")
        trainer = self._trainer
        if trainer is None or trainer.accumulate_grad_batches == 1:
            loss = total / number_here
            return loss, loss
        if trainer.strategy.handles_gradient_accumulation:
            raise AdapterError(
                f"{type(trainer.strategy).__name__} accumulates gradients itself, where the terms of a step cannot be "
                "counted: set trainer.accumulate_grad_batches to 1, or use the strategy ddp"
            )
        step = self._open_step
        if step is not None and step.resumed:  # without its gradient the step begins anew
            step = replace(step, resumed=False) if any(p.grad is not None for p in self.parameters()) else None
            self._open_step = step
        if step is None or batch_idx % trainer.accumulate_grad_batches == 0:
            if step is not None and trainer.global_step > step.after:
                raise AdapterError(
                    f"{type(self).__name__}.on_before_optimizer_step does not call that of its base class, which "
                    "corrects the accumulated gradient: add super().on_before_optimizer_step(optimizer)"
                )
            step = _Step(number_here, 0.0, torch.zeros_like(total, requires_grad=False), trainer.global_step)
            self._open_step = step
        step.number += number_here
        step.total = step.total.to(total.device) + total.detach()
        return total / step.divisor, step.total / step.number

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the accumulated gradient by the number of terms that the whole step has."""
        step, self._open_step = self._open_step, None
        if step is None:
            return
        factor = step.divisor * self.trainer.accumulate_grad_batches / step.number
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is known of an open step, beside its gradient, which `AdapterCallback` keeps."""
        step = self._open_step
        if step is not None:
            total = self.over_processes(float(step.total), "mean")
            checkpoint[_KEY] = [float(step.divisor), float(step.number), total, step.after]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take an open step up again.

        Raises:
            AdapterError: What the checkpoint holds of it is not four numbers.
        """
        self._open_step = None
        kept = checkpoint.get(_KEY)
        if kept is None:
            return
        numbers = isinstance(kept, list) and len(kept) == 4 and all(type(n) in (int, float) for n in kept)
        if not numbers or not (0 < kept[0] < math.inf and 0 < kept[1] < math.inf):
            raise AdapterError(
                f"{_KEY} of the checkpoint is {str(kept)[:80]!r}, where four numbers belong: the file is damaged; "
                "resume from another checkpoint"
            )
        divisor, number, total, after = kept
        self._open_step = _Step(divisor, number, torch.tensor(total), after, resumed=True)

    def over_processes(self, number: float, operation: str) -> float:
        """The sum or mean of a number over all processes; without a trainer there is only this one.

        Args:
            number: The number of this process.
            operation: "sum" or "mean".
        """
        if self._trainer is None or self._trainer.world_size == 1:
            return number
        counted = torch.tensor(number, dtype=torch.float64, device=self.device)
        return float(self._trainer.strategy.reduce(counted, reduce_op=operation))
