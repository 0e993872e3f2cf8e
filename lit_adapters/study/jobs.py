"""A run on disk: its folder holds what the process needs, and in the end its record."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from lit_adapters.console import one_line
from lit_adapters.study.attempt import JOB, LOG, RECIPE
from lit_adapters.study.planning import Run
from lit_adapters.study.records import RECORD, RUNS

_ERROR = re.compile(r"\s*(error|[\w.]*(Error|Exception))\b")  # how the message of an error begins
_ERROR_LINES = 20


@dataclass(frozen=True)
class Job:
    """A run that is to be carried out.

    Attributes:
        folder: Its folder.
        threads: Threads of its process.
    """

    folder: Path
    threads: int

    @property
    def finished(self) -> bool:
        """Whether its record is there."""
        return (self.folder / RECORD).exists()

    def log_tail(self, lines: int = 3) -> str:
        """The last lines that the process printed; more where its last error has more than one."""
        path = self.folder / LOG
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        kept = [line for line in text.splitlines() if line.strip()][-_ERROR_LINES:]
        errors = [place for place, line in enumerate(kept) if _ERROR.match(line)]
        return one_line("\n".join(kept[min(errors[-1] if errors else len(kept), len(kept) - lines) :])) if kept else ""


@dataclass(frozen=True)
class Ended:
    """A job that has ended; whether it is finished is read from its folder.

    Attributes:
        job: The job.
        reason: Why it is not finished; empty if its log shows that.
    """

    job: Job
    reason: str = ""

    def failure(self) -> str:
        """Why it is not finished, in a line."""
        reason = self.reason or self.job.log_tail(1) or "its process ended without a message"
        log = self.job.folder / LOG
        return f"{reason} (all of it: {log})" if log.exists() else reason


def prepare(run: Run, program: str, paths: Mapping[str, str], folder: Path) -> Job:
    """Make the folder of a run, anew if an earlier process left it unfinished."""
    place = (folder / RUNS / run.id).resolve()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / RECIPE).write_text(yaml.safe_dump(dict(run.recipe), sort_keys=False), encoding="utf-8")
    described = {
        "id": run.id,
        "arm": run.arm,
        "stage": run.stage,
        "set": run.set,
        "seed": run.seed,
        "rates": dict(run.rates),
        "program": program,
        "paths": dict(paths),
        "threads": run.threads,
        "protocol": dict(run.protocol),
    }
    (place / JOB).write_text(json.dumps(described, indent=1), encoding="utf-8")
    return Job(place, run.threads)
