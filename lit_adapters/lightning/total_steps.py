"""The optimiser steps of a training."""

from __future__ import annotations

from lightning.pytorch import Trainer


def total_steps(trainer: Trainer, max_epochs: int | None) -> float:
    """The steps of all optimisers together, as `trainer.global_step` counts them; infinite if there is no known end.

    Args:
        trainer: The one that trains.
        max_epochs: As it was in `setup`: StochasticWeightAveraging adds an epoch, which takes no optimiser steps.
    """
    epochs = trainer.fit_loop.max_epochs
    trainer.fit_loop.max_epochs = max_epochs
    try:
        estimated = trainer.estimated_stepping_batches
    finally:
        trainer.fit_loop.max_epochs = epochs
    # Lightning counts the steps of every optimiser, of which manual optimisation may have several; max_steps too.
    total = estimated * max(1, len(trainer.optimizers))
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)
