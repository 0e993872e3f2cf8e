"""The callback that goes with any LightningModule whose module tree holds adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_adapters.attach import adapters
from lit_adapters.callback.annealing import Annealer
from lit_adapters.callback.attached import adapter_layers, attached_models, redundant_keys
from lit_adapters.callback.calibration import calibrate_in_trainer
from lit_adapters.callback.figures import functions_figure
from lit_adapters.callback.nonfinite import broken_values, locate_nonfinite
from lit_adapters.callback.probe import Probe
from lit_adapters.callback.resuming import Resuming
from lit_adapters.errors import AdapterError
from lit_adapters.methods.nora import NoRAActivation

Statistic = Literal["functions", "weights"]


class AdapterCallback(Callback):
    """Anneals, probes, calibrates, logs and checkpoints adapters while a Trainer runs.

    Annealed adapters move with every optimiser step, by the share of all steps that are done; the largest beta is in
    the progress bar and logged as `adapter/beta`.

    Scalars go to every logger: `adapter/<method>/<layer>/<statistic>` and, averaged over the layers,
    `adapter/summary/<statistic>`; layers are named as in the report of `attach`. TensorBoard also gets figures of the
    learned functions and of what changed in them, at every end of an epoch.

    Args:
        log_every_n_steps: optimiser steps between two records.
        statistics: "functions" (drift of NoRA's activations), "weights" (relative norm of weight updates).
        figures: draw the learned functions.
        save_adapters_only: leave frozen base parameters out of checkpoints; loading takes them from the base model.
        calibration_batches: training batches shown to the adapters before the first step, where a method asks for it;
            they pass through the module's `predict_step`.
        allow_unused: regular expressions of trainable parameters that may receive no gradient.

    Raises:
        AdapterError: an argument is out of range; no module of the tree was prepared by `lit_adapters.attach`; there is
            something to anneal and no end of the training; a ModelCheckpoint has `save_weights_only`, which bypasses
            callbacks; an adapter does not run, a trainable parameter does not learn, or the loss or a parameter to be
            saved is not finite.
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
        for name, value in (("log_every_n_steps", log_every_n_steps), ("calibration_batches", calibration_batches)):
            if value < 1:
                raise AdapterError(f"{name} {value} must be at least 1")
        unknown = sorted(set(statistics) - {"functions", "weights"})
        if unknown:
            raise AdapterError(f"unknown statistics {unknown}; choose among 'functions' and 'weights'")
        self.log_every_n_steps = log_every_n_steps
        self.statistics = tuple(statistics)
        self.figures = figures
        self.save_adapters_only = save_adapters_only
        self.calibration_batches = calibration_batches
        self.allow_unused = tuple(allow_unused)
        self._annealer = Annealer()
        self._probe: Probe | None = None
        self._batch: Any = None
        self._logged_step = -1
        self._resuming = Resuming()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse checkpoints that would bypass this callback; forget an earlier run."""
        self._annealer = Annealer()
        self._logged_step = -1
        self._resuming = Resuming()
        self._resuming.setup(trainer)
        for callback in trainer.checkpoint_callbacks:
            if self.save_adapters_only and isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise AdapterError(
                    "ModelCheckpoint(save_weights_only=True) bypasses callbacks and would hold the whole base model; "
                    "use save_weights_only=False, or AdapterCallback(save_adapters_only=False)"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Require an attached model."""
        if not attached_models(pl_module):
            raise AdapterError(
                f"{type(pl_module).__name__} has no adapters: call lit_adapters.attach in configure_model, "
                "or remove AdapterCallback"
            )
        merged = [name for name, adapter in adapters(pl_module) if adapter.merged]
        if merged:
            raise AdapterError(f"{merged[0]!r} is merged and would not learn; call lit_adapters.unmerge(model) first")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate what asks for it and was not by the run being resumed; anneal; record the start; watch."""
        if any(adapter.awaits_calibration for _, adapter in adapters(pl_module)):
            calibrate_in_trainer(trainer, pl_module, self.calibration_batches)
        self._annealer.start(trainer, pl_module)
        self._probe = Probe(pl_module, self.allow_unused)
        if self._logged_step < 0:
            self._log(trainer, pl_module)
        self._resuming.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch at hand while it trains, to find the layer if its loss is not finite."""
        self._batch = batch
        self._resuming.on_train_batch_start(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check that all adapters took part in the first batch; stop at a loss that is not finite, whenever."""
        if self._probe is not None:
            self._probe.after_forward()
        if torch.isfinite(loss).all():
            return
        raise AdapterError(
            f"the loss is {loss.mean().item()} at step {trainer.global_step}: "
            f"{locate_nonfinite(pl_module, self._batch)}. Lower the learning rate or check the data; checkpoints were "
            "written before this step"
        )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check gradients in the first steps."""
        if self._probe is not None:
            self._probe.before_step(optimizer, trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Anneal; log every `log_every_n_steps` optimiser steps."""
        self._batch = None
        self._annealer.after_batch(trainer, outputs.get("loss") if isinstance(outputs, dict) else outputs)
        if self._annealer.beta is not None:
            pl_module.log("adapter/beta", self._annealer.beta, prog_bar=True, logger=False, batch_size=1)
        if trainer.global_step % self.log_every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and draw the functions."""
        self._log(trainer, pl_module)
        self._draw(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how far the loops are."""
        self._resuming.on_validation_end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a checkpoint if SIGTERM is what stops the run."""
        self._resuming.on_exception(trainer, exception)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if something is still nonlinear."""
        if not trainer.interrupted:
            self._annealer.finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What an adaptive schedule has seen of the loss, and the step of the last record."""
        return {"annealing": self._annealer.state_dict(), "logged_step": self._logged_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._annealer.load_state_dict(state_dict["annealing"])
        self._logged_step = state_dict["logged_step"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse what was not written by this run; keep the random states for the start of the training."""
        self._resuming.on_load_checkpoint(trainer, checkpoint)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what changed: adapters, modules of `train`, persistent buffers; never a parameter that is not finite."""
        broken = broken_values(pl_module)
        if broken:
            raise AdapterError(
                f"{broken[0]!r} is not finite at step {trainer.global_step}: no checkpoint was written, "
                "earlier ones are kept. Lower the learning rate or check the data"
            )
        if self.save_adapters_only:
            redundant = redundant_keys(pl_module)
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in redundant}
        self._resuming.on_save_checkpoint(trainer, pl_module, checkpoint)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the statistics of this step to all loggers, once."""
        if trainer.global_step == self._logged_step or not trainer.is_global_zero:
            return
        self._logged_step = trainer.global_step
        scalars: dict[str, float] = {}
        collected: dict[str, list[float]] = {}
        for name, adapter in adapter_layers(pl_module).items():
            if ("functions" if isinstance(adapter, NoRAActivation) else "weights") not in self.statistics:
                continue
            for statistic, value in adapter.statistics().items():
                scalars[f"adapter/{adapter.method}/{name}/{statistic}"] = value
                collected.setdefault(statistic, []).append(value)
        if self._annealer.beta is not None:
            scalars["adapter/beta"] = self._annealer.beta
        for statistic, values in collected.items():
            scalars[f"adapter/summary/{statistic}"] = sum(values) / len(values)
        for logger in trainer.loggers:
            if scalars:
                logger.log_metrics(scalars, step=trainer.global_step)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the figures of this step to TensorBoard."""
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        functions = {n: a for n, a in adapter_layers(pl_module).items() if isinstance(a, NoRAActivation)}
        if not (self.figures and writers and functions and trainer.is_global_zero):
            return
        for tag, changes in (("adapter/functions", False), ("adapter/changes", True)):
            for writer in writers:
                writer.add_figure(tag, functions_figure(functions, changes), trainer.global_step)
