"""Training runs that are kept in a result file: what was run is not run again, and the best rate is chosen."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks.results_file import append, load

Record = dict[str, Any]
# Options of a run that leaves nothing but its measurements.
QUIET = [
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.callbacks=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


class Steps(Callback):
    """Seconds between the ends of training steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Median seconds a step."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


def rate_options(rate: float) -> list[str]:
    """Options that set the learning rate and the highest one of the schedule."""
    return [f"--optimizer.lr={rate}", f"--lr_scheduler.max_lr={rate}"]


@dataclass(frozen=True)
class Runner:
    """Runs that are kept in a result file.

    Attributes:
        path: The result file.
        run: Trains and measures; takes the values of the key as keyword arguments and returns a record that holds them.
        shown: The measurements of a record in a few words.
    """

    path: Path
    run: Callable[..., Record]
    shown: Callable[[Record], str]

    def once(self, **key: Any) -> Record:
        """The first record with these values; trains if the file has none."""
        if not self._known(key):
            append(self.path, self.run(**key))
        record = self._known(key)[0]
        values = ", ".join(f"{name} {value}" for name, value in key.items())
        print(f"{values}: {self.shown(record)}", flush=True)
        return record

    def best_rate(self, rates: Iterable[float], loss: Callable[[Record], float], **key: Any) -> float:
        """The learning rate of the smallest loss after a short run at each."""
        tried = [self.once(protocol="rate", rate=rate, **key) for rate in rates]
        rate: float = min(tried, key=loss)["rate"]
        return rate

    def _known(self, key: Record) -> list[Record]:
        return [record for record in load(self.path) if key.items() <= record.items()]


def parser(description: str | None, arms: Iterable[str]) -> argparse.ArgumentParser:
    """A command line with the options of a benchmark that trains: arms and threads.

    Args:
        description: The docstring of the benchmark.
        arms: The arms to choose from.
    """
    arms = list(arms)
    created = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    created.add_argument("--arms", nargs="+", default=arms, choices=arms)
    created.add_argument("--threads", type=int, default=torch.get_num_threads())
    return created
