"""Collects what the adapters of a run say at a step, and sends it to the run's loggers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_adapters.lightning.record.tensorboard import add_figures, add_overview
from lit_adapters.methods.base import AdapterModule
from lit_adapters.model.sharding import gathered, is_sharded
from lit_adapters.training.attached import adapter_layers
from lit_adapters.training.observer import InputObserver
from lit_adapters.training.subspace_tracker import SubspaceTracker

_DRAWING_SHARE = 0.02  # of the time of a training, at most, apart from its last figures
_DRAWING_SECONDS = (1.0, 0.4)  # taken for granted before anything was drawn: in all, and for each adapted activation


class Recorder:
    """Scalars for every logger; histograms, figures, a page of charts and the recipe for TensorBoard.

    The first process computes and writes; of a sharded model all have to, as each gathers what the others hold.

    Args:
        pl_module: holds the adapters.
        statistics: "functions" (NoRA's activations), "weights" (updates of weights), "subspace" (ranks and spectra of
            both, also where only these are asked for).
        state: what `state_dict` returned, in a run that is resumed.
    """

    def __init__(
        self, pl_module: LightningModule, statistics: Sequence[str], state: Mapping[str, Any] | None = None
    ) -> None:
        self._module, self._chosen = pl_module, set(statistics)
        layers = adapter_layers(pl_module)
        self._layers = layers if "subspace" in self._chosen else self._of_chosen_kind(layers)
        state = state or {}
        self._tracker = SubspaceTracker(layers, state.get("coefficients")) if "subspace" in self._chosen else None
        self._functions = [a for a in layers.values() if a.learned_functions() is not None]
        self._observer = InputObserver(self._of_chosen_kind(layers))
        self._observer.scalars, self._observer.step = dict(state.get("observed", {})), state.get("observed_step", -1)
        self._sharded = is_sharded(pl_module)
        self._step, self._drawn_step = state.get("step", -1), -1
        fixed, each = _DRAWING_SECONDS
        self._drawn_at, self._drawing_seconds = time.monotonic(), fixed + each * len(self._functions)

    def _of_chosen_kind(self, layers: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
        return {n: a for n, a in layers.items() if _kind(a) in self._chosen}

    def state_dict(self) -> dict[str, Any]:
        """What the next record of a resumed run needs."""
        coefficients = {} if self._tracker is None else self._tracker.coefficients
        observed = {"observed": self._observer.scalars, "observed_step": self._observer.step}
        return {"step": self._step, "coefficients": coefficients, **observed}

    def start(self, trainer: Trainer, beta: float | None) -> None:
        """Tell TensorBoard what is to come, and record the start of a run that is not resumed."""
        for logger in _boards(trainer):
            add_overview(trainer, self._module, self._of_chosen_kind(self._layers), self._tracker is not None, logger)
        if self._step < 0:
            self.record(trainer, beta)

    def before_batch(self, trainer: Trainer, every: int) -> None:
        """Observe this batch's inputs if the step that it may lead to is going to be recorded."""
        before, ahead = trainer.global_step, trainer.global_step + max(1, len(trainer.optimizers))
        ends = trainer.is_last_batch or 0 <= trainer.max_steps <= ahead
        if ends or ahead // every > before // every:
            self._observer.start()

    def after_batch(self, trainer: Trainer) -> None:
        """Observe no longer."""
        self._observer.end_batch(trainer.global_step)

    def stop(self) -> None:
        """Observe no longer, whatever happened."""
        self._observer.stop()

    def record(self, trainer: Trainer, beta: float | None) -> None:
        """Send the statistics of this step to all loggers, once."""
        if trainer.global_step == self._step or not trainer.loggers:
            return
        self._step = trainer.global_step
        observed = self._observer.means(trainer.global_step)
        if not (trainer.is_global_zero or self._sharded):
            return
        scalars: dict[str, float] = {}
        collected: dict[str, list[float]] = {}
        for name, adapter in self._layers.items():
            with gathered(adapter):
                values = adapter.statistics() if _kind(adapter) in self._chosen else {}
                values |= observed.get(name, {})
                values |= self._tracker.layer(name) if self._tracker else {}
            for statistic, value in values.items():
                scalars[f"adapter/{adapter.method}/{name}/{statistic}"] = value
                collected.setdefault(statistic, []).append(value)
        if self._tracker is not None:
            with gathered(*self._functions):
                space = self._tracker.functions()
            scalars |= {f"adapter/subspace/{statistic}": value for statistic, value in space.items()}
        if beta is not None:
            scalars["adapter/beta"] = beta
        for statistic, values_ in collected.items():
            scalars[f"adapter/summary/{statistic}"] = sum(values_) / len(values_)
        if scalars and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)

    def draw(self, trainer: Trainer, last: bool = False) -> None:
        """Add histograms and figures of this step to TensorBoard, the `last` ones whatever time that takes.

        Others are left out if drawing would take more than a fiftieth of the time since the figures before, or the
        model is sharded.
        """
        takes_part = trainer.is_global_zero or self._sharded
        if trainer.global_step == self._drawn_step or not (takes_part and _boards(trainer) and self._layers):
            return
        start = time.monotonic()
        # Clocks differ, and all processes of a sharded model have to draw together.
        if not last and (self._sharded or start - self._drawn_at < self._drawing_seconds / _DRAWING_SHARE):
            return
        boards = [logger.experiment for logger in _boards(trainer)] if trainer.is_global_zero else []
        add_figures(boards, self._layers, self._observer, "subspace" in self._chosen, trainer.global_step)
        self._drawn_step, self._drawn_at = trainer.global_step, time.monotonic()
        self._drawing_seconds = self._drawn_at - start

    def finish(self, trainer: Trainer) -> None:
        """Put the final metrics beside the hyperparameters."""
        if trainer.is_global_zero:
            for logger in _boards(trainer):
                _log_final_metrics(logger, trainer.callback_metrics, trainer.global_step)


def _kind(adapter: AdapterModule) -> str:
    return "weights" if adapter.learned_functions() is None else "functions"


def _boards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _log_final_metrics(logger: TensorBoardLogger, metrics: Mapping[str, object], step: int) -> None:
    final = {f"final/{name}": float(value) for name, value in metrics.items()}  # type: ignore[arg-type]
    if final and logger.hparams:
        logger.log_hyperparams(dict(logger.hparams), final, step)
        logger.save()
