"""The part of AdapterCallback that finishes a run whose last step was done when it was killed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_adapters.lightning.resume.loop_state import between_epochs, in_mid_epoch


class Finishing(Callback):
    """Lets a run that is resumed at `max_steps` enter its training loop, which Lightning skips where no step is left.

    The limit on steps is lifted until the loop has begun. If all batches of an epoch were read before the kill, it is
    lifted once more for the end of that epoch: for the validation that is due, the records and the figures. `last_part`
    has to be the last part of the callback, because other parts read the limit.
    """

    def __init__(self) -> None:
        self._is_over = False
        self._max_steps: int | None = None
        self.last_part = _FinishingEpoch(self)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether a step is left."""
        self._is_over = trainer.state.fn == "fit" and 0 <= trainer.max_steps <= checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lift the limit, so that the loop begins."""
        self.lift(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the limit back, for the other parts to read."""
        self.restore(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the limit back, where the loop did not begin."""
        self.restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the limit back."""
        self.restore(trainer)

    def lift(self, trainer: Trainer) -> None:
        """Lift the limit on the steps of a run that is over."""
        if self._is_over:
            self._max_steps, trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, -1

    def restore(self, trainer: Trainer) -> None:
        """Put the limit back."""
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None


class _FinishingEpoch(Callback):
    """Lifts the limit for the end of an epoch whose batches were all read, after the other parts have read it."""

    def __init__(self, finishing: Finishing) -> None:
        self._finishing = finishing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (in_mid_epoch(trainer) or between_epochs(trainer)):
            self._finishing.lift(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finishing.restore(trainer)
