"""A pass of a LightningModule on a training batch, as calibration and the search for a NaN need it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_adapters.errors import AdapterError


def forward_batch(trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
    """Pass a training batch through the model, in the trainer's precision.

    A LightningModule may define `forward_batch(batch)` for this: it runs the model on what `training_step` gets, so
    that every layer sees its inputs; what it returns is not used. Otherwise `predict_step(batch, 0)` is called, which
    by Lightning's default is `forward(batch)`.

    Args:
        trainer: The one that trains the module.
        pl_module: The module.
        batch: On the module's device.
    """
    own = getattr(pl_module, "forward_batch", None)
    with trainer.precision_plugin.forward_context():
        if own is None:
            pl_module.predict_step(batch, 0)
        else:
            own(batch)


def batch_loss(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
    """The loss of a training batch, in the trainer's precision.

    A LightningModule may define `batch_loss(batch)` for this. Otherwise `training_step(batch, 0)` is called, and what
    it logs is not kept.

    Args:
        trainer: The one that trains the module.
        pl_module: The module.
        batch: On the module's device.

    Raises:
        AdapterError: The training step returns no loss, or optimises by itself.
    """
    own = getattr(pl_module, "batch_loss", None)
    with trainer.precision_plugin.forward_context():
        if own is not None:
            loss = own(batch)
        else:
            if not pl_module.automatic_optimization:
                raise AdapterError(
                    f"{type(pl_module).__name__} optimises by itself, so that its training_step would train during the "
                    "calibration; give the module a batch_loss(batch) that returns the loss"
                )
            attributes = vars(pl_module)  # an attribute of an instance hides a method of its name
            own_logs: dict[str, Any] = {n: attributes[n] for n in ("log", "log_dict") if n in attributes}
            attributes |= {"log": _ignore, "log_dict": _ignore}
            try:
                loss = pl_module.training_step(batch, 0)
            finally:
                del attributes["log"], attributes["log_dict"]
                attributes |= own_logs
            loss = loss.get("loss") if isinstance(loss, dict) else loss
    if not isinstance(loss, Tensor):
        raise AdapterError(
            f"the loss of {type(pl_module).__name__} for a training batch is {type(loss).__name__}, and must be a "
            "tensor; give the module a batch_loss(batch) that returns it"
        )
    return loss


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
