"""A callback that ends its process by a signal, once: a file remembers that it did."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Stopping(Callback):
    """Sends this process a signal after a step.

    Args:
        marker: The file that is written then; if it is there, nothing is sent.
        step: After which optimiser step.
        name: Of the signal.
        rank: Of the process; None for all.
        launcher: Where the environment has this value for NODE, the signal goes to the process and to torchrun, which
            started it; None to send it to the processes of `rank` alone.
    """

    def __init__(self, marker: str, step: int, name: str, rank: int | None = None, launcher: str | None = None) -> None:
        self.marker, self.step, self.signal, self.rank = Path(marker), step, signal.Signals[name], rank
        self.launcher = launcher

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Send the signal if it is time."""
        mine = self.rank in (None, trainer.global_rank) and self.launcher in (None, os.environ.get("NODE"))
        marker = self.marker.with_name(f"{self.marker.name}{trainer.global_rank}")
        if mine and trainer.global_step == self.step and not marker.exists():
            marker.touch()
            if self.launcher is not None:
                os.kill(os.getppid(), self.signal)
            os.kill(os.getpid(), self.signal)
