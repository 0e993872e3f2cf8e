"""What Ray and Slurm have in common: watch the attempts at each run, and repeat a run whose process was killed."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from lit_adapters.study.attempt import MOST_REPEATS, Attempt, claim, exit_reason, killed_from_outside
from lit_adapters.study.jobs import Ended, Job

_INTERVAL = 0.5  # seconds between two looks at the cluster
_VISIBLE = 60.0  # seconds to wait for a record that another machine wrote

Handle = TypeVar("Handle")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        reason: Why it failed; empty if it succeeded, or if its log shows that.
        lost: Whether it was ended from outside, so that another attempt may succeed.
        complete: Whether the run's process ended without an error.
    """

    reason: str = ""
    lost: bool = False
    complete: bool = False


class ClusterExecutor(ABC, Generic[Handle]):
    """Carries out each run as a fresh process on some machine of a cluster."""

    def __init__(self) -> None:
        self._running: list[tuple[Job, Handle]] = []
        self._lost: dict[Path, int] = {}

    @abstractmethod
    def _start(self, job: Job, attempt: Attempt) -> Handle:
        """Hand an attempt to the cluster."""

    @abstractmethod
    def _outcome(self, handle: Handle) -> Outcome | None:
        """How an attempt ended; None while it runs."""

    @abstractmethod
    def stop(self) -> None:
        """End all jobs."""

    def submit(self, job: Job) -> None:
        """Ask the cluster to start a job as soon as it has room."""
        attempt = Attempt(str(job.folder), os.getcwd(), claim(str(job.folder)))
        self._running.append((job, self._start(job, attempt)))

    def ended(self, timeout: float) -> list[Ended]:
        """Jobs that have ended since the last call, well or not; waits up to `timeout` seconds for the first one."""
        end = time.monotonic() + timeout
        while True:
            outcomes = [(job, handle, self._outcome(handle)) for job, handle in self._running]
            self._running = [(job, handle) for job, handle, outcome in outcomes if outcome is None]
            ended = [
                Ended(job, outcome.reason)
                for job, _, outcome in outcomes
                if outcome is not None and not self._repeated(job, outcome)
            ]
            if ended or time.monotonic() > end:
                return ended
            time.sleep(_INTERVAL)

    def _repeated(self, job: Job, outcome: Outcome) -> bool:
        """Start a job again if its attempt was ended from outside, at most `MOST_REPEATS` times; whether it was."""
        end = time.monotonic() + (_VISIBLE if outcome.complete else 0.0)
        while not job.finished and time.monotonic() < end:
            time.sleep(_INTERVAL)
        if job.finished or not outcome.lost:
            return False
        lost = self._lost[job.folder] = self._lost.get(job.folder, 0) + 1
        if lost > MOST_REPEATS:
            return False
        text = f"the run {job.folder.name} is started again ({lost} of at most {MOST_REPEATS} times): {outcome.reason}"
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
        self.submit(job)
        return True


def outcome_of(result: dict[str, Any]) -> Outcome:
    """The outcome of an attempt, from what `Attempt` returned."""
    if "problem" in result:
        return Outcome(f"on {result['host']} {result['problem']}")
    code = result["code"]
    if code == 0:
        return Outcome("its process ended without an error, but no record of it is seen here", complete=True)
    reason = exit_reason(code)
    return Outcome(f"{reason} on {result['host']}" if reason else "", lost=killed_from_outside(code))
