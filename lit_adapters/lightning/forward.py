"""One forward pass of a LightningModule on a training batch, as calibration and the search for a NaN need it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer


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
