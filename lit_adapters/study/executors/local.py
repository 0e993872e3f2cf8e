"""Runs as processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping

from lit_adapters.study.jobs import LOG, Job

_INTERVAL = 0.2  # seconds between two looks at the processes


def command(job: Job) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "lit_adapters.study.worker", str(job.folder)]


def variables(job: Job) -> Mapping[str, str]:
    """The environment of a run: its number of threads, and programs of the working directory can be imported."""
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class LocalExecutor:
    """Starts a process for each run, `workers` at a time.

    Args:
        workers: Processes at a time.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._waiting: deque[Job] = deque()
        self._running: list[tuple[Job, subprocess.Popen[bytes]]] = []

    def submit(self, job: Job) -> None:
        """Start a job as soon as there is room."""
        self._waiting.append(job)
        self._fill()

    def ended(self, timeout: float) -> list[Job]:
        """Jobs that have ended since the last call, well or not; waits up to `timeout` seconds for the first one."""
        end = time.monotonic() + timeout
        while True:
            ended = [job for job, process in self._running if process.poll() is not None]
            self._running = [(job, process) for job, process in self._running if process.returncode is None]
            self._fill()
            if ended or time.monotonic() > end:
                return ended
            time.sleep(_INTERVAL)

    def stop(self) -> None:
        """End all jobs."""
        self._waiting.clear()
        for _, process in self._running:
            process.terminate()
        for _, process in self._running:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running = []

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            job = self._waiting.popleft()
            with (job.folder / LOG).open("wb") as log:
                process = subprocess.Popen(
                    command(job), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables(job)
                )
            self._running.append((job, process))
