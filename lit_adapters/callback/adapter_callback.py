"""The callback that goes with any LightningModule whose module tree holds adapters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lit_adapters.attach import adapters, frozen_keys
from lit_adapters.callback.figures import functions_figure
from lit_adapters.callback.probe import Probe
from lit_adapters.control import calibrate
from lit_adapters.errors import AdapterError
from lit_adapters.methods.nora import NoRAActivation

Statistic = Literal["functions", "weights"]


class AdapterCallback(Callback):
    """Probes, calibrates, logs and checkpoints adapters while a Trainer runs.

    Scalars go to every logger: `adapter/<method>/<layer>/<statistic>` and, over all layers, `adapter/summary/...`.
    TensorBoard also gets figures of the learned functions and of their slopes, at every end of an epoch.

    Args:
        log_every_n_steps: optimiser steps between two records.
        statistics: "functions" (drift of NoRA's activations), "weights" (relative norm of weight updates).
        figures: draw the learned functions.
        save_adapters_only: leave frozen base parameters out of checkpoints; loading takes them from the base model.
        calibration_batches: training batches shown to the adapters before the first step, where a method asks for it.
        allow_unused: regular expressions of trainable parameters that may receive no gradient.

    Raises:
        AdapterError: no module of the tree was prepared by `lit_adapters.attach`; a ModelCheckpoint has
            `save_weights_only`, which bypasses callbacks; an adapter does not run, a trainable parameter does not
            learn, or the loss is not finite.
    """

    def __init__(
        self,
        log_every_n_steps: int = 50,
        statistics: Sequence[Statistic] = ("functions", "weights"),
        figures: bool = True,
        save_adapters_only: bool = True,
        calibration_batches: int = 4,
        allow_unused: Sequence[str] = (),
    ) -> None:
        if log_every_n_steps < 1:
            raise AdapterError(f"log_every_n_steps {log_every_n_steps} must be at least 1")
        unknown = sorted(set(statistics) - {"functions", "weights"})
        if unknown:
            raise AdapterError(f"unknown statistics {unknown}; choose among 'functions' and 'weights'")
        self.log_every_n_steps = log_every_n_steps
        self.statistics = tuple(statistics)
        self.figures = figures
        self.save_adapters_only = save_adapters_only
        self.calibration_batches = calibration_batches
        self.allow_unused = tuple(allow_unused)
        self._probe: Probe | None = None
        self._logged_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse checkpoints that would bypass this callback."""
        for callback in trainer.checkpoint_callbacks:
            if self.save_adapters_only and isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise AdapterError(
                    "ModelCheckpoint(save_weights_only=True) bypasses callbacks and would hold the whole base model; "
                    "use save_weights_only=False, or AdapterCallback(save_adapters_only=False)"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Require an attached model, and start watching it."""
        if not any("_lit_adapters" in m.__dict__ for m in pl_module.modules()):
            raise AdapterError(
                f"{type(pl_module).__name__} has no adapters: call lit_adapters.attach in configure_model, "
                "or remove AdapterCallback"
            )
        self._probe = Probe(pl_module, self.allow_unused)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate adapters that ask for it and were not calibrated by the run that is being resumed."""
        if not any(adapter.awaits_calibration for _, adapter in adapters(pl_module)):
            return
        calibrate(_Forward(trainer, pl_module), itertools.islice(_batches(trainer), self.calibration_batches))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop at a loss that is not finite, before it reaches a parameter or a checkpoint."""
        if torch.isfinite(loss).all():
            return
        broken = [n for n, p in pl_module.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        where = f"{broken[0]!r} is no longer finite" if broken else "all trainable parameters are finite"
        raise AdapterError(
            f"the loss is {loss.item()} at step {trainer.global_step}; {where}. Lower the learning rate or check the "
            "data; the last checkpoint was written before this step"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the first batch; log every `log_every_n_steps` optimiser steps."""
        if self._probe is not None:
            self._probe.after_forward()
        step = trainer.global_step
        if step % self.log_every_n_steps == 0 and step != self._logged_step:
            self._log(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check gradients in the first steps."""
        if self._probe is not None:
            self._probe.before_step([group["lr"] for group in optimizer.param_groups])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and draw the functions."""
        self._log(trainer, pl_module)
        layers = {n: a for n, a in adapters(pl_module) if isinstance(a, NoRAActivation)}
        if not (self.figures and layers and trainer.is_global_zero):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for tag, derivative in (("adapter/functions", False), ("adapter/slopes", True)):
                    logger.experiment.add_figure(tag, functions_figure(layers, derivative), trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what changed: adapters, modules of `train`, persistent buffers."""
        if self.save_adapters_only:
            frozen = frozen_keys(pl_module)
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._logged_step or not trainer.is_global_zero:
            return
        self._logged_step = trainer.global_step
        scalars: dict[str, float] = {}
        collected: dict[str, list[float]] = {}
        for name, adapter in adapters(pl_module):
            if ("functions" if isinstance(adapter, NoRAActivation) else "weights") not in self.statistics:
                continue
            for statistic, value in adapter.statistics().items():
                scalars[f"adapter/{adapter.method}/{name}/{statistic}"] = value
                collected.setdefault(statistic, []).append(value)
        for statistic, values in collected.items():
            scalars[f"adapter/summary/{statistic}"] = sum(values) / len(values)
        for logger in trainer.loggers:
            if scalars:
                logger.log_metrics(scalars, step=trainer.global_step)


def _batches(trainer: Trainer) -> Any:
    return iter(trainer.train_dataloader)  # type: ignore[arg-type]


class _Forward(nn.Module):
    """The module as `calibrate` wants it: one call per batch, on the trainer's device and in its precision."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().__init__()
        self.pl_module, self.trainer = pl_module, trainer

    def forward(self, *batch: Any) -> None:
        whole = batch[0] if len(batch) == 1 else batch
        moved = self.trainer.strategy.batch_to_device(whole)
        with self.trainer.precision_plugin.forward_context():
            self.pl_module.predict_step(moved, 0)
