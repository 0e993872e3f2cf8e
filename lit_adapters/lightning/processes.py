"""Agreement among the processes of a Trainer: what stops one of them stops all, or the others would wait for it."""

from __future__ import annotations

from typing import TypeVar

import torch
from lightning.pytorch import Trainer

from lit_adapters.errors import AdapterError

T = TypeVar("T")


def gather_objects(trainer: Trainer, value: T) -> list[T]:
    """The values of all processes, in order, in each of them; all call this."""
    values = [value]
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        values = values * trainer.world_size
        torch.distributed.all_gather_object(values, value)
    return values


def raise_together(trainer: Trainer, failure: str | None) -> None:
    """Stop all processes if something went wrong in one; every process calls this, with its own failure or None.

    Raises:
        AdapterError: the failure of the first process that has one.
    """
    if trainer.strategy.reduce_boolean_decision(failure is None):
        return
    raise AdapterError(next(text for text in gather_objects(trainer, failure) if text is not None))
