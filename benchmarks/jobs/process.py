"""One side of a whole job: a command in a process of its own, and what it took."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs.report import stage_seconds, steady_seconds

ROOT = Path(__file__).parents[2]
LAUNCH = Path(__file__).with_name("launch.py")


def read_report(side: Side) -> dict[str, Any]:
    """What the process has reported."""
    found: dict[str, Any] = json.loads(side.report.read_text())
    return found


@dataclass(frozen=True)
class Side:
    """A command.

    Attributes:
        module: The Python module that is run.
        arguments: Its arguments.
        folder: What it writes: `report.json`, and in `out` what it saves.
        saves: The pattern of the files in `out` that hold adapters; none where the job saves nothing.
        read: Makes the report of what the process has written, as `Report` has it.
    """

    module: str
    arguments: Sequence[str]
    folder: Path
    saves: str | None = None
    read: Callable[[Side], dict[str, Any]] = read_report

    @property
    def report(self) -> Path:
        """The file that the process reports to."""
        return self.folder / "report.json"

    @property
    def out(self) -> Path:
        """The folder that the process saves to."""
        return self.folder / "out"


def run(side: Side, threads: int, profile: Path | None = None) -> dict[str, Any]:
    """Run one side of a job, from the start of the process to its end.

    Args:
        side: The command.
        threads: Threads of the process.
        profile: Where cProfile writes, if it is to watch.

    Returns:
        `seconds`; `peak_mib`, resident; `stages`, in seconds; `counts`; `answers`, where the model is asked; of a job
        with steps `steady_seconds`, of one step; and `first_loss`, where it was reported.

    Raises:
        SystemExit: The command fails, or saves no adapter.
    """
    shutil.rmtree(side.folder, ignore_errors=True)
    side.out.mkdir(parents=True)
    result, output = side.folder / "result.json", side.folder / "output.txt"
    watched = ["-m", "cProfile", "-o", str(profile)] if profile is not None else []
    command = [sys.executable, *watched, "-m", side.module, *side.arguments]
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(LAUNCH), str(result), str(output), *command],
        cwd=ROOT,
        env=_variables(threads),
    )
    if done.returncode:
        raise SystemExit(f"error: {side.module} failed; its last lines:\n{_tail(output)}")
    found: dict[str, Any] = json.loads(result.read_text())
    report = side.read(side)
    found["stages"] = stage_seconds(report, found.pop("started"), found["seconds"])
    found["counts"], found["answers"] = report["counts"], report["answers"]
    found["first_loss"] = report.get("first_loss")
    if report["steps"]:
        found["counts"]["steps"] = len(report["steps"])
        found["steady_seconds"] = steady_seconds(report["steps"])
    if side.saves is not None and not list(side.out.rglob(side.saves)):
        raise SystemExit(f"error: {side.module} saved no {side.saves}; its last lines:\n{_tail(output)}")
    return found


def _variables(threads: int) -> dict[str, str]:
    """The environment of both sides: the same threads, no network to wait for, and imported modules compiled once."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    return given | offline | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def _tail(output: Path) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-30:])
