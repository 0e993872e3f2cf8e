"""The callback that goes with any LightningModule whose module tree holds adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_adapters.errors import AdapterError
from lit_adapters.lightning.annealing import Annealer
from lit_adapters.lightning.calibration import calibrate_in_trainer
from lit_adapters.lightning.record.recorder import Recorder
from lit_adapters.lightning.resume.callback import Resuming
from lit_adapters.lightning.resume.sharded import check_keys, expect_missing_keys
from lit_adapters.model.attach import adapters
from lit_adapters.training.attached import attached_models, redundant_keys
from lit_adapters.training.nonfinite import locate_nonfinite, nonfinite_gradient, nonfinite_values
from lit_adapters.training.participation import Probe
from lit_adapters.training.processes import raise_together

Statistic = Literal["functions", "weights", "subspace"]


class AdapterCallback(Callback):
    """Anneals, probes, calibrates, logs and checkpoints adapters while a Trainer runs.

    Annealed adapters move with every optimiser step, by the share of all steps that are done; the largest beta is in
    the progress bar and logged as `adapter/beta`. An adaptive schedule looks at the loss, or at what `training_step`
    returns as `followed` beside it where the loss does not tell progress: a tensor that falls as training succeeds.

    Scalars go to every logger: `adapter/<method>/<layer>/<statistic>`, averaged over the layers
    `adapter/summary/<statistic>`, and of all functions together `adapter/subspace/<statistic>`; layers are named as in
    the report of `attach`, statistics explained in docs/reading-tensorboard.md. TensorBoard also gets a page of charts,
    the recipe, the final metrics beside the hyperparameters, and figures and histograms: at the end of the training,
    and of epochs that take fifty times as long as the drawing.

    Args:
        log_every_n_steps: optimiser steps between two records.
        statistics: "functions" (drift and slope of NoRA's activations, their inputs), "weights" (size and nonlinearity
            of weight updates), "subspace" (ranks and spectra of what these learned).
        figures: draw functions, spectra and maps of the layers, and histograms.
        save_adapters_only: leave frozen base parameters out of checkpoints; loading takes them from the base model.
        calibration_batches: training batches shown to the adapters before the first step, where a method asks for it;
            they pass through the module's `predict_step`.
        allow_unused: regular expressions of trainable parameters that may receive no gradient.
        finalize: put an early stop (`EarlyStopping`, `Timer`) off until annealing has ended and a twentieth of the
            training has been linear; otherwise stopping early only warns that the adapters are still nonlinear.

    Raises:
        AdapterError: an argument is out of range; no module of the tree was prepared by `lit_adapters.attach`; there is
            something to anneal and no end of the training; a ModelCheckpoint has `save_weights_only`, which bypasses
            callbacks; an adapter does not run, a trainable parameter does not learn, or the loss or a parameter to be
            saved is not finite.
    """

    def __init__(
        self,
        log_every_n_steps: int = 50,
        statistics: Sequence[Statistic] = ("functions", "weights", "subspace"),
        figures: bool = True,
        save_adapters_only: bool = True,
        calibration_batches: int = 4,
        allow_unused: Sequence[str] = (),
        finalize: bool = False,
    ) -> None:
        for name, value in (("log_every_n_steps", log_every_n_steps), ("calibration_batches", calibration_batches)):
            if value < 1:
                raise AdapterError(f"{name} {value} must be at least 1")
        unknown = sorted(set(statistics) - set(get_args(Statistic)))
        if unknown:
            raise AdapterError(f"unknown statistics {unknown}; choose among 'functions', 'weights' and 'subspace'")
        self.log_every_n_steps = log_every_n_steps
        self.statistics = tuple(statistics)
        self.figures = figures
        self.save_adapters_only = save_adapters_only
        self.calibration_batches = calibration_batches
        self.allow_unused = tuple(allow_unused)
        self.finalize = finalize
        self._annealer = Annealer()
        self._probe: Probe | None = None
        self._recorder: Recorder | None = None
        self._batch: Any = None
        self._recorded: dict[str, Any] = {}  # of the run being resumed
        self._resuming = Resuming()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse checkpoints that would bypass this callback; before a fit, forget an earlier one."""
        if stage == "fit":
            self._annealer, self._resuming = Annealer(), Resuming()
            self._recorder, self._recorded = None, {}
        self._resuming.setup(trainer)
        for callback in trainer.checkpoint_callbacks:
            if self.save_adapters_only and isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise AdapterError(
                    "ModelCheckpoint(save_weights_only=True) bypasses callbacks and would hold the whole base model; "
                    "use save_weights_only=False, or AdapterCallback(save_adapters_only=False)"
                )

        if self.save_adapters_only:
            expect_missing_keys(trainer, pl_module)

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
        self._annealer.start(trainer, pl_module, self.finalize)
        self._probe = Probe(pl_module, self.allow_unused)
        self._recorder = Recorder(pl_module, self.statistics, self._recorded)
        self._recorder.start(trainer, self._annealer.beta)
        self._resuming.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch at hand while it trains, to find the layer if its loss is not finite; observe its inputs."""
        self._batch = batch
        if self._recorder is not None:
            self._recorder.before_batch(trainer, self.log_every_n_steps)
        self._resuming.on_train_batch_start(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check that all adapters took part in the first batch; stop at a loss that is not finite, whenever."""
        if self._probe is not None and self._probe.watching and pl_module.automatic_optimization:
            raise_together(self._probe.after_forward())
        finite = bool(torch.isfinite(loss).all())
        if not trainer.strategy.reduce_boolean_decision(finite):
            # In every process, whosever loss it is: a sharded model runs in all of them together.
            with trainer.precision_plugin.forward_context():
                where = locate_nonfinite(pl_module, self._batch, lambda batch: pl_module.predict_step(batch, 0))
            failure = (
                f"the loss is {loss.mean().item()} at step {trainer.global_step}: {where}. Lower the learning rate or "
                "check the data; checkpoints were written before this step"
            )
            raise_together(None if finite else failure)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check gradients: that there are some in the first steps, that they are finite in all."""
        if self._probe is not None:
            self._probe.before_step(optimizer, trainer.optimizers)
        # A gradient scaler looks at the gradients itself and skips such steps.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        broken = None if scaled else nonfinite_gradient(pl_module)
        if broken:  # in all processes: gradients are reduced by now
            raise AdapterError(
                f"the gradient of {broken!r} is not finite at step {trainer.global_step}, though the loss was. Lower "
                "the learning rate or clip gradients; checkpoints were written before this step"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Anneal; log every `log_every_n_steps` optimiser steps."""
        self._batch = None
        assert self._recorder is not None
        self._recorder.after_batch(trainer)
        if self._probe is not None and self._probe.watching:  # several losses may have taken turns
            raise_together(self._probe.after_forward())
        followed = outputs.get("followed", outputs.get("loss")) if isinstance(outputs, dict) else outputs
        self._annealer.after_batch(trainer, followed)
        if self._annealer.beta is not None:
            pl_module.log("adapter/beta", self._annealer.beta, prog_bar=True, logger=False, batch_size=1)
        if trainer.global_step % self.log_every_n_steps == 0:
            self._recorder.record(trainer, self._annealer.beta)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and draw."""
        assert self._recorder is not None
        self._recorder.stop()  # a batch may have been broken off
        self._recorder.record(trainer, self._annealer.beta)
        if self.figures:
            self._recorder.draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw how it ended."""
        if self._recorder is not None and self.figures:
            self._recorder.draw(trainer, last=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how far the loops are."""
        self._resuming.on_validation_end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind; save a checkpoint if SIGTERM is what stops the run."""
        self._batch = None
        if self._probe is not None:
            self._probe.stop()
        if self._recorder is not None:
            self._recorder.stop()
        self._resuming.on_exception(trainer, exception)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if something is still nonlinear; record the final metrics."""
        if self._recorder is not None and not trainer.interrupted:
            self._annealer.finish(trainer)
            self._recorder.finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What an adaptive schedule has seen of the loss, and what the next record needs of the last."""
        recorded = self._recorded if self._recorder is None else self._recorder.state_dict()
        return {"annealing": self._annealer.state_dict(), "recorded": recorded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._annealer.load_state_dict(state_dict["annealing"])
        self._recorded = state_dict["recorded"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse what was not written by this run; keep the random states for the start of the training."""
        self._resuming.on_load_checkpoint(trainer, checkpoint)
        if self.save_adapters_only:
            check_keys(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what changed: adapters, modules of `train`, persistent buffers; never a parameter that is not finite."""
        broken = nonfinite_values(pl_module)
        failure = (
            f"{broken[0]!r} is not finite at step {trainer.global_step}: no checkpoint was written, "
            "earlier ones are kept. Lower the learning rate or check the data"
            if broken
            else None
        )
        raise_together(failure)
        if self.save_adapters_only:
            redundant = redundant_keys(pl_module)
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in redundant}
        self._resuming.on_save_checkpoint(trainer, pl_module, checkpoint)
