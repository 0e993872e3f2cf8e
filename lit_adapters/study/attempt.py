"""One attempt at a run, on whatever machine of a cluster calls it.

Plain Python that imports nothing of this package: Ray and submitit send it to the node as it is, so that the process
that waits for a run does not import torch. The run itself has a fresh process, so that nothing passes from one run to
the next.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

JOB = "job.json"
RECIPE = "recipe.yaml"
LOG = "log.txt"
OWNER = "owner.txt"
MOST_REPEATS = 3  # of a run whose process was killed
SLURM = "slurm"  # where submitit keeps its files
_KEPT = (JOB, RECIPE, OWNER, SLURM)
_INTERVAL = 0.1  # seconds; short, as Ray interrupts a task only between two calls
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # the system, or a user, sends these


class Attempt:
    """Carries out a run and returns how it ended.

    Args:
        folder: Of the run.
        directory: Where the study was started; paths of the study are relative to it.
        owner: What the run's folder holds in owner.txt while this attempt is the one that counts.
        wait: Seconds to wait for a file that another machine wrote.
    """

    def __init__(self, folder: str, directory: str, owner: str, wait: float = 20.0) -> None:
        self.folder = folder
        self.directory = directory
        self.owner = owner
        self.wait = wait

    def __call__(self) -> dict[str, Any]:
        """Carry out the run.

        Returns:
            `host`, the machine's name; `code`, the exit code of the run's process (below 0 for the signal that ended
            it); or `problem`, why no process was started.
        """
        host = socket.gethostname()
        for place in (self.folder, self.directory):
            if not self._seen(Path(place)):
                problem = f"the folder {place} is not there; all machines must share it under the same path"
                return {"host": host, "problem": problem}
        if not owns(self.folder, self.owner):
            return {"host": host, "problem": "the study was started again, and with it this run"}
        self._clear()
        line = [sys.executable, "-m", "lit_adapters.study.worker", self.folder, str(os.getpid()), self.owner]
        with (Path(self.folder) / LOG).open("wb") as log:
            process = subprocess.Popen(
                line,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    time.sleep(_INTERVAL)
            finally:
                kill_group(process.pid)
                process.wait()
        return {"host": host, "code": process.returncode}

    def checkpoint(self) -> Any:
        """What Slurm starts after it preempted the job or ended its time; submitit calls this.

        Returns:
            The same run from its beginning; None if it was repeated `MOST_REPEATS` times or another attempt counts.
        """
        from submitit.helpers import DelayedSubmission

        if repeats(self.folder) >= MOST_REPEATS or not owns(self.folder, self.owner):
            return None
        return DelayedSubmission(Attempt(self.folder, self.directory, claim(self.folder), self.wait))

    def _seen(self, place: Path) -> bool:
        end = time.monotonic() + self.wait
        wanted = place / OWNER if str(place) == self.folder else place
        while not wanted.exists():
            if time.monotonic() > end:
                return False
            time.sleep(_INTERVAL)
        return True

    def _clear(self) -> None:
        """Remove what an earlier attempt left; its log is kept under a number."""
        folder = Path(self.folder)
        if (folder / LOG).exists():
            (folder / LOG).rename(folder / f"log.{repeats(self.folder) + 1}.txt")
        for path in folder.iterdir():
            if path.name in _KEPT or path.name.startswith("log."):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def claim(folder: str) -> str:
    """Write a new owner into a run's folder: its attempt counts from now on, and processes of earlier ones end.

    Returns:
        The new content of owner.txt.
    """
    owner = secrets.token_hex(8)
    new = Path(folder) / f"{OWNER}.{owner}"
    new.write_text(owner)
    new.replace(Path(folder) / OWNER)
    return owner


def owns(folder: str, owner: str) -> bool:
    """Whether an attempt is still the one that counts."""
    try:
        return (Path(folder) / OWNER).read_text() == owner
    except FileNotFoundError:
        return False
    except OSError:  # network file systems fail now and then; the next look decides
        return True


def repeats(folder: str) -> int:
    """How many attempts before the present one have started."""
    return len(list(Path(folder).glob("log.*.txt")))


def kill_group(leader: int) -> None:
    """Kill a process that leads a group and what it has started, such as the processes that load data."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def killed_from_outside(code: int) -> bool:
    """Whether the system or a user ended a process, by its exit code; the run may succeed another time."""
    return -code in _OUTSIDE


def exit_reason(code: int) -> str:
    """Which signal ended a process, by its exit code; empty for other codes, which the log explains."""
    if code >= 0:
        return ""
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", as the system does when memory runs out: give it more, or start fewer runs at a time"
    return f"its process was killed by {name}{hint if -code == signal.SIGKILL else ''}"
