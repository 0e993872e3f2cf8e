"""Runs as jobs of Slurm, through submitit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError
from lit_adapters.study import attempt as attempts
from lit_adapters.study.attempt import MOST_REPEATS, SLURM, Attempt
from lit_adapters.study.executors.cluster import ClusterExecutor, Outcome, outcome_of
from lit_adapters.study.jobs import Job

_TIME = 60  # minutes; submitit's own default of 5 ends most trainings
_OURS = ("cpus_per_task", "nodes", "tasks_per_node", "name")
_SUCCESS = ("COMPLETED", "FINISHED", "UNKNOWN")  # states of Slurm and of submitit
_LOST = ("PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "INTERRUPTED")  # the last is of submitit's local jobs


class SlurmExecutor(ClusterExecutor[Any]):
    """Submits a job for each run.

    Slurm and submitit restart a job that was preempted or ran out of time. If it ended before they could, this class
    submits it again.

    Args:
        options: Parameters of submitit's AutoExecutor, such as `timeout_min`, `gpus_per_node` or `slurm_partition`.
        cluster: "slurm", or "local" for processes of this machine, which tests use.

    Raises:
        AdapterError: submitit is not installed, this machine has no Slurm, or an option is unknown.
    """

    def __init__(self, options: Mapping[str, Any], cluster: str = "slurm") -> None:
        super().__init__()
        for name in _OURS:
            if name in options:
                raise AdapterError(f"run.options.{name} follows from the study (run.threads); leave it out")
        try:
            import cloudpickle
            import submitit
        except ImportError as error:
            raise AdapterError(f"submitit cannot be imported ({error}): pip install 'lit-adapters[cluster]'") from error
        self._submitit = submitit
        self._cluster = cluster
        self._options = {"timeout_min": _TIME, **options}
        cloudpickle.register_pickle_by_value(attempts)

    def _start(self, job: Job, attempt: Attempt) -> Any:
        try:
            executor = self._submitit.AutoExecutor(
                job.folder / SLURM, self._cluster, slurm_max_num_timeout=MOST_REPEATS
            )
            executor.update_parameters(name=job.folder.name, cpus_per_task=job.threads, **self._options)
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise AdapterError(f"run.options: {one_line(error)}") from error
        except RuntimeError as error:
            raise AdapterError(f"Slurm cannot be used: {one_line(error)}") from error
        try:
            return executor.submit(attempt)
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            raise AdapterError(f"Slurm did not take the run {job.folder.name}: {one_line(error)}") from error

    def _outcome(self, handle: Any) -> Outcome | None:
        if not handle.done():
            return None
        if not handle.paths.result_pickle.exists():
            state = handle.state.split()[0]
            if state not in _SUCCESS:
                limit = f" (timeout_min: {self._options['timeout_min']})" if state == "TIMEOUT" else ""
                return Outcome(f"Slurm ended its job: {state}{limit}", lost=state in _LOST)
        error = handle.exception()  # waits for the result that another machine wrote
        if error is None:
            return outcome_of(handle.result())
        if "not requeued" in str(error):
            limit = self._options["timeout_min"]
            return Outcome(f"it was preempted, or ran out of time, {MOST_REPEATS + 1} times (timeout_min: {limit})")
        last = str(error).strip().splitlines()[-1]
        return Outcome(f"its job failed: {last} (logs of Slurm: {handle.paths.folder})")

    def stop(self) -> None:
        """End all jobs."""
        for _, handle in self._running:
            handle.cancel(check=False)
        self._running = []
