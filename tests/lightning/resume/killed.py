"""Both applications' smoke recipes in processes of their own, ended by a signal at a given batch."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_adapters.lightning.cli import run
from tests.language import tiny
from tests.vision import smoke

APPS: dict[str, Any] = {"vision": smoke, "language": tiny}


class Signal(Callback):
    """Sends this process a signal at the beginning of the batch after `batches`, counted over all epochs."""

    def __init__(self, number: int, batches: int) -> None:
        self.number = number
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batches:
            os.kill(os.getpid(), self.number)


def train(app: str, folder: Path, options: list[str], number: int = 0, batches: int = -1) -> None:
    """Fit, with a checkpoint `kept/step.ckpt` at each optimiser step, and leave the end in `end.ckpt`."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a process from a shell
    keep = ModelCheckpoint(folder / "kept", filename="step", every_n_train_steps=1, enable_version_counter=False)
    callbacks = [keep, *([Signal(number, batches)] if number else [])]
    save = [f"--trainer.logger.init_args.save_dir={folder}"]
    if app == "language":
        save.append(f"--data.path={tiny.ROWS}")
    application = APPS[app]
    line = ["fit", f"--config={application.CONFIGS / 'smoke/afa.yaml'}", *save, *application.QUIET, *options]

    def command() -> None:
        cli = application.quick_main(line, trainer_defaults={"callbacks": callbacks})
        cli.trainer.save_checkpoint(folder / "end.ckpt")

    run(command)


KILL, TERMINATE = signal.SIGKILL, signal.SIGTERM
