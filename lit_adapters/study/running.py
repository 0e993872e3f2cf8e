"""Carry out a study: start what is due, collect what has ended, and say how long it will take."""

from __future__ import annotations

import fcntl
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.arrays import read_arrays
from lit_adapters.study.executors import Executor, create_executor
from lit_adapters.study.jobs import Ended, prepare
from lit_adapters.study.planning import Plan
from lit_adapters.study.records import ITEMS, RECORD, Record, Results, read_record
from lit_adapters.study.report.digits import duration
from lit_adapters.study.settings import Study

_LOCK = ".lock"  # holds the name of the study
_WAIT = 5.0  # seconds between two estimates of the time left
_PACK_EVERY = 300.0  # seconds between two writings of the packed files


def run_study(study: Study, folder: Path, workers: int | None = None, hours: float | None = None) -> Results:
    """Carry out all runs that are not finished.

    Args:
        study: The study.
        folder: Where results go; the finished runs in it are not run again.
        workers: Runs at a time; the study's own number by default.
        hours: Start no run after this time.

    Returns:
        All results.

    Raises:
        AdapterError: Another process runs this study, the folder holds another study or cannot be written to, a run
            fails (one that diverges does not), a run does not log what the study compares, or a file is damaged.
    """
    plan = Plan(study)
    program = study.called()
    workers = study.run.workers if workers is None else workers
    with _alone(folder, study.name):
        results = Results.load(folder)
        executor = create_executor(study.run.executor, program, study.run.options)
        try:
            _Loop(plan, program, results, executor, workers, hours).run()
        finally:
            executor.stop()
            results.save()
    return results


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Keep other processes from running the study of a folder at the same time, and other studies from its folder.

    Raises:
        AdapterError: Another process runs the study, or the folder is another study's or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+")
    except OSError as error:
        raise AdapterError(f"{folder} cannot be written to ({error.strerror}); give another folder by --out") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AdapterError(f"another process runs the study of {folder}: wait for it, or stop it") from error
        check_owner(folder, name)
        lock.truncate(0)
        lock.write(name)
        lock.flush()
        yield


def check_owner(folder: Path, name: str) -> None:
    """Check that a folder holds the results of the study of this name, or of none.

    Raises:
        AdapterError: It holds those of another one.
    """
    path = folder / _LOCK
    owner = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if owner and owner != name:
        raise AdapterError(
            f"{folder} holds the results of the study {shown(owner)}, and this is {shown(name)}; give another folder "
            f"by --out, or delete {path} if its file was renamed"
        )


class _Loop:
    def __init__(
        self, plan: Plan, program: str, results: Results, executor: Executor, workers: int, hours: float | None
    ) -> None:
        self.plan, self.results, self.executor, self.workers = plan, results, executor, workers
        self.program = program
        self.running: dict[Path, str] = {}
        self.end = None if hours is None else time.monotonic() + 3600 * hours
        self.packed = time.monotonic()
        self.failure: Ended | None = None

    def run(self) -> None:
        used = self.plan.used(self.results)
        for record in self.results.records:
            if record.id in used:
                self.plan.check(record, self.results.items(record))
        left = self.plan.expected(self.results)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True)) as progress:
            done = len(used)
            task = progress.add_task(self.plan.study.name, total=done + left, completed=done, left="")
            while self._start() or self.running:
                for ended in self.executor.ended(_WAIT):
                    self._collect(ended, progress)
                left = self.plan.expected(self.results)
                seconds = seconds_left(self.plan, self.results) / self.workers
                done = len(self.plan.used(self.results))
                progress.update(
                    task,
                    completed=done,
                    total=done + left,
                    left=f"about {duration(seconds)} left",
                )
        if self.failure is not None:
            raise AdapterError(
                f"the run {self.failure.job.folder.name} failed: {self.failure.failure()}. Mend it and run the study "
                "again; finished runs are kept"
            )

    def _start(self) -> bool:
        """Start as many due runs as there is room for, and return whether any was started."""
        late = self.end is not None and time.monotonic() > self.end
        if self.failure is not None or late or len(self.running) >= self.workers:
            return False
        study, folder = self.plan.study, self.results.folder
        assert folder is not None
        running = set(self.running.values())
        waiting = [run for run in self.plan.due(self.results) if run.id not in running]
        started = waiting[: self.workers - len(self.running)]
        for run in started:
            try:
                job = prepare(run, self.program, study.paths, folder)
            except OSError as error:
                raise AdapterError(
                    f"the run {run.id} could not be started: {error}; see that {folder} can be written to and has room"
                ) from error
            self.running[job.folder] = run.id
            self.executor.submit(job)
        return bool(started)

    def _collect(self, ended: Ended, progress: Progress) -> None:
        job = ended.job
        self.running.pop(job.folder)
        if not job.finished:
            self.failure = self.failure or ended
            return
        record = read_record(job.folder / RECORD)
        self.results.add(record, read_arrays(job.folder / ITEMS))
        self.plan.check(record, self.results.items(record))
        progress.console.print(describe(self.plan.study, record), highlight=False)
        if time.monotonic() - self.packed > _PACK_EVERY:
            self.results.save()
            self.packed = time.monotonic()


def describe(study: Study, record: Record) -> str:
    """A finished run in a line."""
    metric = study.search.metric if record.stage == "search" and study.search is not None else study.metric
    rates = ", ".join(f"{group} {rate:g}" for group, rate in record.rates.items())
    value = record.metrics.get(metric.name)
    outcome = record.message if record.status == "diverged" or value is None else f"{metric.name} {value:.4f}"
    return (
        f"{record.stage} {record.arm} set {record.set} ({rates}): {outcome}, {record.seconds.get('total', 0.0):.0f} s"
    )


def seconds_left(plan: Plan, results: Results) -> float:
    """Estimate the seconds that all runs left take one after the other, from earlier runs of the arm or stage."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in results.records:
        for key in ((record.stage, record.arm), (record.stage, ""), ("", "")):
            times[key].append(record.seconds.get("total", 0.0))
    due = plan.due(results)
    known = sum(_mean(times, run.stage, run.arm) for run in due)
    return known + (plan.expected(results) - len(due)) * _mean(times, "final", "")


def _mean(times: Mapping[tuple[str, str], list[float]], stage: str, arm: str) -> float:
    values = times.get((stage, arm)) or times.get((stage, "")) or times.get(("", "")) or [0.0]
    return sum(values) / len(values)
