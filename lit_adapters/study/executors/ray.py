"""Runs as tasks of a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError, shown
from lit_adapters.study import attempt as attempts
from lit_adapters.study.attempt import Attempt
from lit_adapters.study.executors.cluster import ClusterExecutor, Outcome, outcome_of
from lit_adapters.study.jobs import Job

_OPTIONS = ("num_gpus", "resources")
_STORE = 100 * 2**20  # bytes of the object store of a Ray of our own; a task returns a few numbers
_PATIENCE = 5.0  # seconds


class RayExecutor(ClusterExecutor[Any]):
    """Starts a task for each run, on the cluster at RAY_ADDRESS or on this machine; without either on a Ray of its own.

    Args:
        options: `num_gpus` and `resources` of each task, as Ray takes them.

    Raises:
        AdapterError: Ray is not installed, the cluster cannot be reached, or an option is unknown or not a number.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        _check(options)
        try:
            import ray
        except ImportError as error:
            raise AdapterError(f"Ray cannot be imported ({error}): pip install 'lit-adapters[cluster]'") from error
        self._ray = ray
        self._options = dict(options)
        self._own = False
        self._connect()
        ray.cloudpickle.register_pickle_by_value(attempts)
        self._task: Any = ray.remote(max_retries=0, **options)(lambda attempt: attempt())

    def _connect(self) -> None:
        ray = self._ray
        quiet = {"log_to_driver": False, "logging_level": "warning"}
        address = os.environ.get("RAY_ADDRESS") or _recorded()
        _check_reachable(address)  # Ray itself tries for minutes, and then ends the process
        try:
            if address != "local":
                ray.init(address=address, **quiet)
        except ConnectionError as error:
            if address != "auto":
                raise _unreachable(address, error) from error
            address = "local"
        except (RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
            raise _unreachable(address, error) from error
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(address=address, include_dashboard=False, object_store_memory=_STORE, **quiet)
            self._own = True
        resources = ray.cluster_resources()
        where = "no cluster is running, so Ray uses this machine alone" if self._own else f"Ray cluster at {address}"
        has = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
        Console(stderr=True).print(f"{where}: {has}", highlight=False, markup=False, soft_wrap=True)

    def _start(self, job: Job, attempt: Attempt) -> Any:
        self._check_room(job)
        return self._task.options(num_cpus=job.threads, name=job.folder.name).remote(attempt)

    def _check_room(self, job: Job) -> None:
        """Raise if no node is large enough, as the task would wait for ever; a cluster may grow."""
        resources = {"CPU": job.threads, "GPU": self._options.get("num_gpus", 0), **self._options.get("resources", {})}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if self._own and not any(all(node.get(k, 0) >= v for k, v in resources.items()) for node in nodes):
            wanted = ", ".join(f"{value:g} {name}" for name, value in resources.items() if value)
            raise AdapterError(
                f"a run asks Ray for {wanted}, and this machine has less; lower run.threads or run.options"
            )

    def _outcome(self, handle: Any) -> Outcome | None:
        errors = self._ray.exceptions
        if not self._ray.wait([handle], timeout=0)[0]:
            return None
        try:
            return outcome_of(self._ray.get(handle))
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError) as error:
            return Outcome(f"its process or its node has died ({type(error).__name__})", lost=True)
        except errors.OutOfMemoryError:
            return Outcome("Ray ended it as the memory of its node ran out", lost=True)
        except errors.RayError as error:
            return Outcome(f"Ray could not carry it out: {one_line(error)}")

    def stop(self) -> None:
        """End all jobs, and leave the cluster."""
        handles = [handle for _, handle in self._running]
        for handle in handles:
            self._ray.cancel(handle)
        if handles:
            late = self._ray.wait(handles, num_returns=len(handles), timeout=_PATIENCE)[1]
            for handle in late:
                self._ray.cancel(handle, force=True)
        self._running = []
        self._ray.shutdown()


def _check(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in _OPTIONS:
            raise AdapterError(f"run.options.{name} is unknown; the executor ray has {' and '.join(_OPTIONS)}")
        values = value.values() if name == "resources" and isinstance(value, Mapping) else [value]
        if not all(isinstance(v, (int, float)) and v >= 0 for v in values):
            raise AdapterError(f"run.options.{name} is {shown(value)}; give a number, or a number for each resource")


def _recorded() -> str:
    """Where to look for a cluster that `ray start` started here; "local" if the one that it recorded has crashed."""
    record = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if record.exists():
        try:
            _check_reachable(record.read_text().strip())
        except AdapterError:
            return "local"
    return "auto"


def _check_reachable(address: str) -> None:
    """Raise if nobody listens at an address; one without host and port is left to Ray."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = parts.hostname, parts.port
        if host is not None and port is not None:
            socket.create_connection((host, port), timeout=_PATIENCE).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: BaseException) -> AdapterError:
    hint = "start it with `ray start --head`, or correct RAY_ADDRESS"
    return AdapterError(f"no Ray cluster can be used at {address}: {one_line(error)}; {hint}")
