"""`calibrate` on a LightningModule: batches go as a Trainer sends them, through the module's own `predict_step`."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils._pytree import tree_map

from lit_adapters.errors import AdapterError
from lit_adapters.methods.base import AdapterModule
from lit_adapters.model.attach import adapters
from lit_adapters.model.modes import calibrate


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

    With several processes, all take what the first one measured on its own share of the data, so that they hold the
    same functions. The others measure too, as the passes of a sharded model need every process.

    Raises:
        AdapterError: `predict_step` does not accept a training batch, or an adapter saw no input.
    """
    failure = None
    try:
        _calibrate(trainer, pl_module, batches)
    except AdapterError as error:
        failure = error
    if trainer.world_size == 1:
        if failure is not None:
            raise failure
        return
    measured = {n: {k: b.cpu() for k, b in a.named_buffers(recurse=False)} for n, a in _calibrated(pl_module)}
    message, measured = trainer.strategy.broadcast((None if failure is None else str(failure), measured))
    if message is not None:
        raise AdapterError(message) from failure
    for name, adapter in _calibrated(pl_module):
        adapter.load_state_dict(measured[name], strict=False)


def _calibrated(module: nn.Module) -> list[tuple[str, AdapterModule]]:
    return [(n, a) for n, a in adapters(module) if type(a).calibrate is not AdapterModule.calibrate]


def _without_iterator(loader: Any) -> Any:
    if getattr(loader, "_iterator", None) is None:
        return loader
    loader = copy.copy(loader)
    loader._iterator = None
    return loader


def _calibrate(trainer: Trainer, pl_module: LightningModule, batches: int) -> None:
    # Workers that persist make a loader give the one iterator that the training is going to read.
    loader = CombinedLoader(tree_map(_without_iterator, trainer.train_dataloader), "min_size")
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
