"""The part of AdapterCallback that calibrates adapters before the first step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_map

from lit_adapters.errors import AdapterError
from lit_adapters.lightning.forward import batch_loss, forward_batch
from lit_adapters.lightning.resume.plain_loader import FollowedLoader, follow, generators
from lit_adapters.training.calibration import awaits_calibration, calibrate_together
from lit_adapters.training.random_numbers import same_random_numbers


class Calibration(Callback):
    """Shows the first training batches to adapters that ask for it, through the module's `forward_batch`.

    Where an adapter needs the gradient of its weight, the module's `batch_loss` takes its place.

    Args:
        batches: How many batches are shown.

    Raises:
        AdapterError: The forward pass or the loss does not accept a training batch, or an adapter saw no input.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, unless the run being resumed has."""
        if not awaits_calibration(pl_module):
            return

        def on_device(batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch)
            return trainer.strategy.batch_to_device(batch)

        def run(batch: Any) -> None:
            called = "forward_batch" if hasattr(pl_module, "forward_batch") else "predict_step"
            with _explained(pl_module, called, "give the module a forward_batch(batch) that accepts them"):
                forward_batch(trainer, pl_module, on_device(batch))

        def loss(batch: Any) -> Tensor:
            called = "batch_loss" if hasattr(pl_module, "batch_loss") else "training_step"
            with _explained(pl_module, called, "give the module a batch_loss(batch) that returns the loss"):
                return batch_loss(trainer, pl_module, on_device(batch))

        with same_random_numbers(generators(trainer.train_dataloader)):  # of the order of the training
            calibrate_together(pl_module, self._first_batches(trainer), run, loss)

    def _first_batches(self, trainer: Trainer) -> Iterator[Any]:
        # Workers that persist make a loader give the one iterator that the training is going to read.
        loader = CombinedLoader(tree_map(_without_iterator, trainer.train_dataloader), "min_size")
        return (batch for batch, _, _ in itertools.islice(iter(loader), self._batches))


@contextmanager
def _explained(pl_module: LightningModule, called: str, fix: str) -> Iterator[None]:
    """Turn what a user's own code raises inside the block into an error that names it."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise AdapterError(
            f"calibration gives training batches to {type(pl_module).__name__}.{called}, which failed "
            f"({type(error).__name__}: {error}); {fix}, or call lit_adapters.calibrate before fit"
        ) from error


def _without_iterator(loader: Any) -> Any:
    if isinstance(loader, FollowedLoader):  # what it has noted belongs to the training
        loader = follow(copy.copy(loader))
    if getattr(loader, "_iterator", None) is None:
        return loader
    loader = copy.copy(loader)
    loader._iterator = None
    return loader
