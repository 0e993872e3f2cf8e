"""The part of AdapterCallback that records: scalars for every logger, figures and histograms for some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_adapters.lightning.annealing import Annealing
from lit_adapters.model.record import attachment
from lit_adapters.training.attached import attached_models
from lit_adapters.training.boards import Board, MLflow, TensorBoard, WeightsAndBiases
from lit_adapters.training.recording import Recorder
from lit_adapters.training.tensorboard import overview_layout

_BOARDS: dict[str, Callable[[Any], Board]] = {  # by the loggers' names, as they import what may be missing
    "TensorBoardLogger": lambda logger: TensorBoard(logger.experiment),
    "WandbLogger": lambda logger: WeightsAndBiases(logger.experiment),
    "MLFlowLogger": lambda logger: MLflow(logger.experiment, logger.run_id),
}


class Recording(Callback):
    """Records every few optimiser steps and at the ends of epochs; draws at the ends of epochs and of the training.

    Args:
        log_every_n_steps: Optimiser steps between two records.
        statistics: What is recorded; see `AdapterCallback`.
        figures: Whether figures and histograms are drawn.
        annealing: Knows beta, which goes along with each record.
    """

    def __init__(self, log_every_n_steps: int, statistics: Sequence[str], figures: bool, annealing: Annealing) -> None:
        self._every = log_every_n_steps
        self._statistics = statistics
        self._figures = figures
        self._annealing = annealing
        self._recorder: Recorder | None = None
        self._state: dict[str, Any] = {}  # of the run being resumed
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know where values are logged."""
        self._trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the page of charts and the recipe to TensorBoard; record the start of a run that is not resumed."""
        self._recorder = recorder = Recorder(pl_module, self._statistics, self._state)
        for logger in _tensorboards(trainer) if trainer.is_global_zero else ():
            logger.experiment.add_custom_scalars(overview_layout(recorder.charted, recorder.subspace))
            logger.experiment.add_text("recipe", _recipe(trainer, pl_module), trainer.global_step)
        if recorder.step < 0:
            self._record(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Observe the inputs of the batch if the step that it may lead to is going to be recorded."""
        before, ahead = trainer.global_step, trainer.global_step + max(1, len(trainer.optimizers))
        ends = trainer.is_last_batch or 0 <= trainer.max_steps <= ahead
        if self._recorder is not None and (ends or ahead // self._every > before // self._every):
            self._recorder.observer.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Record every few optimiser steps."""
        assert self._recorder is not None
        self._recorder.observer.end_batch(trainer.global_step)
        if trainer.global_step % self._every == 0:
            self._record(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record, and draw."""
        assert self._recorder is not None
        self._recorder.observer.stop()  # a batch may have been broken off
        self._record(trainer)
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw how it ended; record it, if the epoch had ended before the run was resumed."""
        if self._recorder is not None:
            self._record(trainer)
            self._draw(trainer, last=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        if self._recorder is not None:
            self._recorder.observer.stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the final metrics beside the hyperparameters; of a run that had ended when it was resumed, too."""
        if trainer.interrupted or (self._recorder is None and not self._state):
            return
        if self._recorder is None:
            self._recorder = Recorder(pl_module, self._statistics, self._state)
            self._record(trainer)
            self._draw(trainer, last=True)
        if not trainer.is_global_zero:
            return
        final = {f"final/{name}": value for name, value in self._metrics().items()}
        for logger in _tensorboards(trainer):
            if final and logger.hparams:
                logger.log_hyperparams(dict(logger.hparams), final, trainer.global_step)
                logger.save()

    def _record(self, trainer: Trainer) -> None:
        assert self._recorder is not None
        if not trainer.loggers:
            return
        scalars = self._recorder.record(trainer.global_step, self._annealing.beta)
        for logger in trainer.loggers if scalars and trainer.is_global_zero else ():
            logger.log_metrics(scalars, step=trainer.global_step)

    def _draw(self, trainer: Trainer, last: bool = False) -> None:
        assert self._recorder is not None
        showing = {logger: kind for logger in trainer.loggers if (kind := _kind_of(logger)) is not None}
        if self._figures and showing:
            boards = [_BOARDS[kind](logger) for logger, kind in showing.items()] if trainer.is_global_zero else []
            self._recorder.draw(boards, trainer.global_step, last)

    def _metrics(self) -> dict[str, float]:
        """The values that were logged last; those of the run being resumed, where none came since."""
        logged = {} if self._trainer is None else self._trainer.callback_metrics
        return self._state.get("metrics", {}) | {name: float(value) for name, value in logged.items()}

    def state_dict(self) -> dict[str, Any]:
        """What the next record needs of the last, and the values logged last."""
        state = self._state if self._recorder is None else self._recorder.state_dict()
        return state | {"metrics": self._metrics()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` returned for the start of the training."""
        self._state = state_dict


def _kind_of(logger: Any) -> str | None:
    """The kind of board that a logger has, or its base class; None if it has none."""
    return next((kind.__name__ for kind in type(logger).__mro__ if kind.__name__ in _BOARDS), None)


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _recipe(trainer: Trainer, pl_module: LightningModule) -> str:
    """The command line's configuration as Markdown, or what is known without one: methods and hyperparameters."""
    text = ""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            text = callback.parser.dump(callback.config, skip_none=False)
    if not text:
        methods = {
            name or type(model).__name__: attachment(model).methods
            for name, model in attached_models(pl_module).items()
        }
        text = yaml.safe_dump(_yaml_value({"adapters": methods, "hparams": dict(pl_module.hparams)}), sort_keys=False)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _yaml_value(value: Any) -> Any:
    """The value as YAML can hold it: subclasses of plain types, as NumPy's numbers, are written out."""
    if isinstance(value, dict):
        return {str(k): _yaml_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_yaml_value(v) for v in value]
    return value if type(value) in (bool, int, float, str, type(None)) else repr(value)
