"""The parts of AdapterCallback that stop a run: wrong settings, adapters that do not learn, values not finite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lit_adapters.errors import AdapterError, NotFiniteError
from lit_adapters.lightning.forward import forward_batch
from lit_adapters.lightning.optimizers import check_resumed_schedules
from lit_adapters.methods.matrix_layers import is_quantised
from lit_adapters.model.record import adapters
from lit_adapters.optimizers.pair_optimizer import check_clipping
from lit_adapters.training.nonfinite import locate_nonfinite, nonfinite_gradient, nonfinite_values
from lit_adapters.training.participation import ParticipationCheck
from lit_adapters.training.processes import raise_together


class Settings(Callback):
    """Stops a run with settings of the trainer that nobody can mean, before its first step.

    Raises:
        AdapterError: `gradient_clip_val` is negative or NaN, or goes with an optimiser that clips by itself; a resumed
            schedule is too short for this run; or Lightning cannot find layers inside adapters that it would change.
    """

    def __init__(self) -> None:
        self._saved: tuple[list[dict[str, Any]], Any] = [], None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the schedules of the run that is resumed."""
        self._saved = checkpoint.get("lr_schedulers") or [], trainer.ckpt_path

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, while the schedules are still those of this run."""
        clip = trainer.gradient_clip_val
        if clip is not None and not clip >= 0:
            raise AdapterError(
                f"gradient_clip_val {clip!r} must be at least 0: it is the largest norm, or value, that is let "
                "through; leave it out to clip nothing"
            )
        check_clipping(clip, "gradient_clip_val", trainer.optimizers)
        _check_layers_inside(trainer, pl_module)
        check_resumed_schedules([c.scheduler for c in trainer.lr_scheduler_configs], *self._saved)  # type: ignore[misc]
        self._saved = [], None


def _check_layers_inside(trainer: Trainer, module: LightningModule) -> None:
    """Raise if Lightning looks for layers by class that are inside adapters, where it does not find them."""
    inside = [(name, adapter.pretrained()) for name, adapter in adapters(module)]
    norms = [name for name, layer in inside if isinstance(layer, _BatchNorm)]
    averages = any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
    if norms and (averages or getattr(trainer.strategy, "_layer_sync", None) is not None):
        asked = "StochasticWeightAveraging" if averages else "sync_batchnorm"
        raise AdapterError(
            f"{asked} does not find {norms[0]!r}, a batch norm with an adapter; leave batch norms out with exclude"
        )
    plain = [name for name, layer in inside if isinstance(layer, nn.Linear) and not is_quantised(layer)]
    if plain and isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise AdapterError(
            f"BitsandbytesPrecision does not quantise {plain[0]!r} or any other layer with an adapter; load the model "
            "in 4 bit instead (transformers' BitsAndBytesConfig, or `quantization: nf4` in a recipe for language)"
        )


class Participation(Callback):
    """Stops a run if an adapter does not run in the first batch, or a parameter does not learn in the first steps.

    Args:
        allow_unused: Regular expressions of trainable parameters that may receive no gradient.

    Raises:
        AdapterError: An adapter does not run, or a parameter does not learn.
    """

    def __init__(self, allow_unused: Sequence[str]) -> None:
        self._allow_unused = allow_unused
        self._check: ParticipationCheck | None = None
        self._had_backward = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the first batch."""
        self._check = ParticipationCheck(pl_module, self._allow_unused)
        self._had_backward = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Say which adapters the first batch went past; with manual optimisation other losses may follow."""
        self._had_backward = True
        if pl_module.automatic_optimization:
            self._end_first_batch()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say it here where several losses took turns."""
        self._end_first_batch()

    def _end_first_batch(self) -> None:
        if self._check is not None and self._check.watching:
            raise_together(self._check.after_forward())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check that there are gradients, unless this is only a pass that measures batch norms."""
        expected = self._had_backward or not pl_module.automatic_optimization
        if self._check is not None and expected:
            self._check.before_step(optimizer, trainer.optimizers)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        if self._check is not None:
            self._check.stop()


class Finiteness(Callback):
    """Stops a run at a loss, gradient or parameter that is not finite, and saves no checkpoint of such values.

    Raises:
        NotFiniteError: A value is not finite; the message says where that came up.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch at hand while it trains, to find the layer if its loss is not finite."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop at a loss that is not finite."""
        finite = bool(torch.isfinite(loss).all())
        if trainer.strategy.reduce_boolean_decision(finite):
            return
        # In every process, whosever loss it is: a sharded model runs in all of them together.
        where = locate_nonfinite(pl_module, self._batch, partial(forward_batch, trainer, pl_module))
        failure = (
            f"the loss is {loss.mean().item()} at step {trainer.global_step}: {where}. Lower the learning rate or "
            "check the data; checkpoints were written before this step"
        )
        raise_together(None if finite else failure, NotFiniteError)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop at a gradient that is not finite; a gradient scaler handles these itself."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        broken = nonfinite_gradient(pl_module)
        if broken is not None:  # in all processes: gradients are reduced by now
            raise NotFiniteError(
                f"the gradient of {broken!r} is not finite at step {trainer.global_step}, though the loss was. Lower "
                "the learning rate, or clip gradients (LoRARITE and LoFT: with their own clip); checkpoints were "
                "written before this step"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """The batch is done."""
        self._batch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The batch will not be done."""
        self._batch = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save nothing that is not finite."""
        broken = nonfinite_values(pl_module)
        failure = None
        if broken:
            failure = (
                f"{broken[0]!r} is not finite at step {trainer.global_step}: no checkpoint was written, "
                "earlier ones are kept. Lower the learning rate or check the data"
            )
        raise_together(failure, NotFiniteError)
