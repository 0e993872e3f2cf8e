"""The part of AdapterCallback that keeps constants and annealing out of averages of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_adapters.training.averaging import restore_constants


class Averaging(Callback):
    """Restores frozen parameters and adapters' buffers in the copies that other callbacks average.

    It does so before such a copy is used or saved: `WeightAveraging` validates with its average, and ends with it.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore before the average takes the place of the model."""
        restore_constants(pl_module, _modules_of_callbacks(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore at the end of an epoch, whose last step may have updated an average."""
        restore_constants(pl_module, _modules_of_callbacks(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore before the average takes the place of the model for good."""
        restore_constants(pl_module, _modules_of_callbacks(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore before the average is written."""
        restore_constants(pl_module, _modules_of_callbacks(trainer))


def _modules_of_callbacks(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from (value for value in vars(callback).values() if isinstance(value, nn.Module))
