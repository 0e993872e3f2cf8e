"""The part of AdapterCallback that records: scalars for every logger, figures and histograms for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_adapters.lightning.annealing import Annealing
from lit_adapters.lightning.record.recorder import Recorder


class Recording(Callback):
    """Records every few optimiser steps and at the ends of epochs; draws at the ends of epochs and of the training.

    Args:
        log_every_n_steps: optimiser steps between two records.
        statistics: what is recorded; see `AdapterCallback`.
        figures: whether figures and histograms are drawn.
        annealing: knows beta, which goes along with each record.
    """

    def __init__(self, log_every_n_steps: int, statistics: Sequence[str], figures: bool, annealing: Annealing) -> None:
        self._every = log_every_n_steps
        self._statistics = statistics
        self._figures = figures
        self._annealing = annealing
        self._recorder: Recorder | None = None
        self._state: dict[str, Any] = {}  # of the run being resumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start of a run that is not resumed."""
        self._recorder = Recorder(pl_module, self._statistics, self._state)
        self._recorder.start(trainer, self._annealing.beta)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Observe the inputs of a batch that leads to a record."""
        if self._recorder is not None:
            self._recorder.before_batch(trainer, self._every)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Record every few optimiser steps."""
        assert self._recorder is not None
        self._recorder.after_batch(trainer)
        if trainer.global_step % self._every == 0:
            self._recorder.record(trainer, self._annealing.beta)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record, and draw."""
        assert self._recorder is not None
        self._recorder.stop()  # a batch may have been broken off
        self._recorder.record(trainer, self._annealing.beta)
        if self._figures:
            self._recorder.draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw how it ended."""
        if self._recorder is not None and self._figures:
            self._recorder.draw(trainer, last=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        if self._recorder is not None:
            self._recorder.stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the final metrics."""
        if self._recorder is not None and not trainer.interrupted:
            self._recorder.finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What the next record needs of the last."""
        return self._state if self._recorder is None else self._recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` returned for the start of the training."""
        self._state = state_dict
