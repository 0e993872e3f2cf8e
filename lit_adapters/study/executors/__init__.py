"""Where runs are carried out: on this machine, or on a cluster.

An executor gets jobs and tells which have ended; whether a job succeeded is read from its folder, which all machines
share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from lit_adapters.study.jobs import Job


class Executor(Protocol):
    """Carries out jobs, several at a time."""

    def submit(self, job: Job) -> None:
        """Start a job as soon as there is room."""

    def ended(self, timeout: float) -> list[Job]:
        """Jobs that have ended since the last call, well or not; waits up to `timeout` seconds for the first one."""

    def stop(self) -> None:
        """End all jobs."""


def create_executor(
    name: Literal["local", "ray", "slurm"], workers: int, program: str, options: Mapping[str, Any]
) -> Executor:
    """The executor of a name.

    Args:
        name: "local", "ray" or "slurm".
        workers: Runs at a time.
        program: What the runs call.
        options: Of the executor.

    Raises:
        AdapterError: The packages of a cluster are not installed, or an option is unknown.
    """
    from lit_adapters.study.executors.local import LocalExecutor

    return LocalExecutor(workers, program)
