"""The part of AdapterCallback that stops several processes at the same batch after SIGTERM."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

from lit_adapters.training.processes import process_count


class Stopping(Callback):
    """Lets all processes stop after the same batch, whichever of them SIGTERM reaches.

    Lightning's own handler of the signal waits for the other processes, while these may wait for a gradient: then none
    goes on, and no checkpoint is written. Here a process only notes the signal. After each training batch the processes
    tell each other, in place of Lightning's message before each batch, and Lightning ends the training in all of them.
    A validation is finished first, because processes may have different numbers of its batches.
    """

    def __init__(self) -> None:
        self._asked = False  # this process
        self._agreed = False
        self._noting: Any = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler, which has just been set."""
        self._take_over(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler, where there was no sanity check."""
        self._take_over(trainer)

    def _take_over(self, trainer: Trainer) -> None:
        if self._noting or process_count() == 1:
            return
        # Lightning puts this one back at the end.
        earlier: Any = trainer._signal_connector._original_handlers.get(signal.SIGTERM)

        def note(number: int, frame: FrameType | None) -> None:
            self._asked = True
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)  # type: ignore[arg-type]  # hands it to processes it has started
            if callable(earlier):
                earlier(number, frame)

        self._asked = self._agreed = False
        self._noting = note
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, note)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        """Agree whether to stop."""
        if self._noting is None:
            return
        asked = torch.tensor(int(self._asked), device=trainer.strategy.root_device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        self._agreed = bool(asked)
        if self._agreed:
            trainer._signal_connector.received_sigterm = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a validation after the last batch of an epoch run to its end."""
        if self._agreed:
            trainer._signal_connector.received_sigterm = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after it."""
        if self._agreed:
            trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave Lightning's loop as it was."""
        self._give_back(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave Lightning's loop as it was."""
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if self._noting is not None:
            del trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor
            self._noting, self._agreed = None, False
