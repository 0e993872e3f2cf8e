"""Runs as processes of this machine.

The processes are forked from one that has imported the program already: importing torch, Lightning and a model library
takes as long as a short training.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
import time
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lit_adapters.study.attempt import LOG, exit_reason, kill_group
from lit_adapters.study.jobs import Ended, Job

_INTERVAL = 0.2  # seconds between two looks at the processes


class LocalExecutor:
    """Starts a process for each run.

    Args:
        program: What the runs call; imported beforehand if it keeps its work behind `if __name__ == "__main__"`.
    """

    def __init__(self, program: str) -> None:
        self._running: list[tuple[Job, BaseProcess]] = []
        # Forking a process that has threads is not safe; the server that is forked here has none.
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        self._context.set_forkserver_preload(["lit_adapters.study.worker", *_importable(program)])

    def submit(self, job: Job) -> None:
        """Start a job."""
        process = self._context.Process(target=_run, args=(job.folder, os.getcwd()), daemon=False)
        process.start()
        self._running.append((job, process))

    def ended(self, timeout: float) -> list[Ended]:
        """Jobs that have ended since the last call, well or not; waits up to `timeout` seconds for the first one."""
        end = time.monotonic() + timeout
        while True:
            codes = [(job, process, process.exitcode) for job, process in self._running]
            self._running = [(job, process) for job, process, code in codes if code is None]
            ended = [Ended(job, exit_reason(code)) for job, _, code in codes if code is not None]
            if ended or time.monotonic() > end:
                return ended
            time.sleep(_INTERVAL)

    def stop(self) -> None:
        """Kill all jobs. Nothing is lost: records are written atomically, and an unfinished run starts anew."""
        for _, process in self._running:
            assert process.pid is not None
            kill_group(process.pid)
            process.kill()  # it may not lead its group yet
        for _, process in self._running:
            process.join()
        self._running = []


def _run(folder: Path, directory: str) -> None:
    """Carry out a run in this process, and write what it prints into its log."""
    os.setpgrp()  # Ctrl-C in a terminal is for the study, which ends its runs
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(directory)
    from lit_adapters.study.orphans import end_with
    from lit_adapters.study.worker import run

    study = multiprocessing.parent_process()
    assert study is not None
    end_with(study.is_alive)
    run(folder)


def _importable(program: str) -> list[str]:
    """The module that `python -m PROGRAM` runs, if it keeps its work behind `if __name__ == "__main__"`."""
    if program.endswith(".py"):
        return []
    for name in (f"{program}.__main__", program):
        try:
            spec = find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        guarded = any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in tree.body)
        return [name] if guarded else []
    return []
