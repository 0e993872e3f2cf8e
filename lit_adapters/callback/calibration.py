"""`calibrate` on a LightningModule: batches go as a Trainer sends them, through the module's own `predict_step`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from lit_adapters.control import calibrate
from lit_adapters.errors import AdapterError


@dataclass
class _Batch:
    """Hides a batch's own type, by which `calibrate` would choose how to call the model."""

    content: Any


class _Predict(nn.Module):
    """One call a batch, on the trainer's device and in its precision."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().__init__()
        self.pl_module, self.trainer = pl_module, trainer

    def forward(self, batch: _Batch) -> None:
        content = self.trainer.precision_plugin.convert_input(batch.content)
        content = self.trainer.strategy.batch_to_device(content)
        with self.trainer.precision_plugin.forward_context():
            self.pl_module.predict_step(content, 0)


def calibrate_in_trainer(trainer: Trainer, pl_module: LightningModule, batches: int) -> None:
    """Calibrate the adapters of `pl_module` on its first `batches` training batches.

    Raises:
        AdapterError: `predict_step` does not accept a training batch, or an adapter saw no input.
    """
    loader = CombinedLoader(trainer.train_dataloader, "min_size")
    chosen = (_Batch(batch) for batch, _, _ in itertools.islice(iter(loader), batches))
    try:
        calibrate(_Predict(trainer, pl_module), chosen)
    except AdapterError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise AdapterError(
            f"calibration gives training batches to {type(pl_module).__name__}.predict_step, which failed "
            f"({type(error).__name__}: {error}); give the module a predict_step(batch, batch_idx) that accepts them, "
            "or call lit_adapters.calibrate before fit"
        ) from error
