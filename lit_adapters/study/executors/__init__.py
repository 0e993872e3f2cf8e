"""Where runs are carried out: on this machine, or on a cluster.

An executor gets jobs and tells which have ended; whether a job succeeded is read from its folder, which all machines
share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from lit_adapters.study.jobs import Ended, Job


class Executor(Protocol):
    """Carries out jobs, several at a time."""

    def submit(self, job: Job) -> None:
        """Start a job, or ask the cluster to start it as soon as it has room."""

    def ended(self, timeout: float) -> list[Ended]:
        """Jobs that have ended since the last call, well or not; waits up to `timeout` seconds for the first one."""

    def stop(self) -> None:
        """End all jobs."""


def create_executor(name: Literal["local", "ray", "slurm"], program: str, options: Mapping[str, Any]) -> Executor:
    """The executor of a name.

    Args:
        name: "local", "ray" or "slurm".
        program: What the runs call.
        options: What the cluster takes for each run; "local" ignores them.

    Raises:
        AdapterError: The packages of a cluster are not installed, the cluster cannot be reached, or an option is
            unknown.
    """
    if name == "ray":
        from lit_adapters.study.executors.ray import RayExecutor

        return RayExecutor(options)
    if name == "slurm":
        from lit_adapters.study.executors.slurm import SlurmExecutor

        return SlurmExecutor(options)
    from lit_adapters.study.executors.local import LocalExecutor

    return LocalExecutor(program)
