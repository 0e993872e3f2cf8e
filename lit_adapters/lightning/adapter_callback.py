"""The callback that goes with any LightningModule whose module tree holds adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_adapters.errors import AdapterError
from lit_adapters.lightning.annealing import Annealing
from lit_adapters.lightning.averaging import Averaging
from lit_adapters.lightning.calibration import Calibration
from lit_adapters.lightning.checks import Finiteness, Participation, Settings
from lit_adapters.lightning.linearity import Linearity
from lit_adapters.lightning.parts import CallbackOfParts
from lit_adapters.lightning.rank_allocation import Allocating
from lit_adapters.lightning.recording import Recording
from lit_adapters.lightning.resume.adapters_only import AdaptersOnly
from lit_adapters.lightning.resume.callback import Resuming
from lit_adapters.lightning.resume.finishing import Finishing
from lit_adapters.lightning.resume.stopping import Stopping
from lit_adapters.model.record import adapters
from lit_adapters.training.attached import attached_models
from lit_adapters.training.recording import Statistic, checked_statistics


class AdapterCallback(CallbackOfParts):
    """Calibrates, anneals, checks, records and checkpoints adapters while a Trainer runs.

    Each of these is a part, a callback of its own; `_new_parts` lists them in the order in which their hooks run.

    Annealed adapters have a factor beta that falls from 1 (nonlinear) to 0 (linear). It moves after every optimiser
    step, as a function of the share of steps done; the largest beta is in the progress bar and logged as
    `adapter/beta`. An adaptive schedule looks at the loss, or at a logged value that it names:
    `Adaptive(monitor="train/reward")`.

    Every logger gets these scalars: `adapter/<method>/<layer>/<statistic>` for each layer,
    `adapter/summary/<statistic>`, its mean over the layers, and `adapter/subspace/<statistic>`, one value for all
    learned functions together. Layers are named as in the report of `attach`; docs/reading-tensorboard.md explains the
    statistics. Records are taken at the start, every `log_every_n_steps` optimiser steps, and at ends of epochs.
    Statistics of inputs (`outside_range`, `nonlinearity`) come from the batches of those steps; histograms of inputs,
    and the curves "inputs seen in training" in figures, add up over the run.

    TensorBoard also gets a page of charts (the first expects that the module logs `train/loss` and `val/loss`), the
    recipe, and the final metrics in the table of hyperparameters (with `default_hp_metric=False`). It gets figures and
    histograms at the end of the training, and at the end of an epoch once fifty times the drawing time has passed
    since the last ones.

    The ranks of AdaLoRA are allocated after every optimiser step, by the schedule of its configuration. The penalty
    that keeps its factors orthogonal is added to the gradients. `adapter/peft/<layer>/rank` shows the ranks.

    A warning comes once, after a fifth of the steps (at least 10), if LoRAN's function is linear at the size that B A
    has by then, so that it does what LoRA does.

    Examples:
        >>> trainer = Trainer(callbacks=[AdapterCallback(log_every_n_steps=10)])
        >>> trainer.fit(module, loader)

    Args:
        log_every_n_steps: Optimiser steps between two records.
        statistics: "functions" (drift and slope of NoRA's activations, their inputs), "weights" (size and nonlinearity
            of weight updates), "subspace" (ranks and spectra of what these learned).
        figures: Draw functions, spectra and maps of the layers, and histograms.
        save_adapters_only: Save what training changes: adapters, modules of `train`, and buffers such as running
            statistics. Frozen base parameters are left out; loading takes them from the base model.
        calibration_batches: Training batches shown to the adapters before the first step, where a method asks for it.
            They pass through the module's `forward_batch(batch)`, if it defines this hook, else through `predict_step`.
        allow_unused: Regular expressions of trainable parameters that may receive no gradient.
        finalize: If True, `EarlyStopping` and `Timer` cannot end the training before all annealing has reached 0 and a
            further twentieth of the steps has run. If False they can, and a warning says that adapters are nonlinear.

    Raises:
        AdapterError: An argument is out of range; no module of the tree was prepared by `lit_adapters.attach`; or a
            check of a part fails (`Settings`, `Annealing`, `Calibration`, `Participation`, `Finiteness`, `Allocating`,
            `Resuming`, `AdaptersOnly`).
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
        self.log_every_n_steps = log_every_n_steps
        self.statistics = checked_statistics(statistics)
        self.figures = figures
        self.save_adapters_only = save_adapters_only
        self.calibration_batches = calibration_batches
        self.allow_unused = tuple(allow_unused)
        self.finalize = finalize
        self.parts = self._new_parts()

    def _new_parts(self) -> list[Callback]:
        self._annealing = Annealing(self.finalize)
        self._allocating = Allocating()
        self._recording = Recording(self.log_every_n_steps, self.statistics, self.figures, self._annealing)
        finishing = Finishing()
        return [
            finishing,
            Settings(),
            Calibration(self.calibration_batches),
            self._annealing,
            Averaging(),
            Participation(self.allow_unused),
            Finiteness(),
            self._allocating,  # its penalty adds to gradients that have been checked
            Linearity(),
            self._recording,
            Stopping(),
            Resuming(),  # restores random states at the start of a training, so after all that might draw from them
            *([AdaptersOnly()] if self.save_adapters_only else []),
            finishing.last_part,
        ]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit before a new one, and set the parts up."""
        if stage == "fit":
            self.parts = self._new_parts()
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if no model was given to `attach`, or if an adapter is merged."""
        if not attached_models(pl_module):
            raise AdapterError(
                f"{type(pl_module).__name__} has no adapters: call lit_adapters.attach in configure_model, "
                "or remove AdapterCallback"
            )
        merged = [name for name, adapter in adapters(pl_module) if adapter.merged]
        if merged:
            raise AdapterError(f"{merged[0]!r} is merged and would not learn; call lit_adapters.unmerge(model) first")
        super().on_fit_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The betas, what adaptive schedules and the rank allocation have seen, and what the next record needs."""
        return {
            "annealing": self._annealing.state_dict(),
            "recorded": self._recording.state_dict(),
            **self._allocating.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each part its saved state."""
        self._annealing.load_state_dict(state_dict["annealing"])
        self._recording.load_state_dict(state_dict["recorded"])
        self._allocating.load_state_dict(state_dict)
