"""Agreement among the processes of a Trainer: what stops one of them stops all, or the others would wait for it."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from lit_adapters.errors import AdapterError


def raise_together(trainer: Trainer, failure: str | None) -> None:
    """Stop all processes if something went wrong in one; every process calls this, with its own failure or None.

    Raises:
        AdapterError: the failure of the first process that has one.
    """
    if trainer.strategy.reduce_boolean_decision(failure is None):
        return
    failures: list[str | None] = [failure]
    if trainer.world_size > 1:
        failures = [None] * trainer.world_size
        torch.distributed.all_gather_object(failures, failure)
    raise AdapterError(next(text for text in failures if text is not None))
