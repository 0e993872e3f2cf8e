"""One run of a study: python -m lit_adapters.study.worker FOLDER [PARENT OWNER]

The process calls the study's program as its users do, with `fit` and then with `validate` (in the search) or `test`.
It writes the record when both have ended. With the number of its parent process, and the content of owner.txt in the
folder, it ends when the parent ends or another process is given the run.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lit_adapters.lightning.run_record import CHECKPOINT, EVALUATION, FAILURE, FIT
from lit_adapters.study.attempt import JOB, RECIPE, owns
from lit_adapters.study.environment import environment, peak_memory_mib
from lit_adapters.study.orphans import end_with
from lit_adapters.study.records import Record, write_record

_RECORDER = "lit_adapters.lightning.run_record.RunRecord"


def arguments(folder: Path, stage: str, paths: dict[str, str]) -> tuple[list[str], list[str]]:
    """The command lines of the training and of the evaluation, without the program."""
    common = [
        f"--config={folder / RECIPE}",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.callbacks+={_RECORDER}",
        f"--trainer.callbacks.folder={folder}",
        *(f"--{key}={value}" for key, value in paths.items()),
    ]
    evaluation = "validate" if stage == "search" else "test"
    # One process sees all items in their order, also where the training uses several.
    one = ["--trainer.devices=1", "--trainer.num_nodes=1"]
    return ["fit", *common], [evaluation, *common, *one, f"--ckpt_path={folder / CHECKPOINT}"]


def call(program: str, args: list[str]) -> None:
    """Call a program as from a command line: a module, or a .py file.

    Raises:
        SystemExit: The program ended with an error.
    """
    sys.argv = [program, *args]
    try:
        if program.endswith(".py"):
            sys.path.insert(0, str(Path(program).resolve().parent))
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise


def _leave_group(before: dict[str, str]) -> None:
    """Undo what Lightning leaves after a training on several devices: the next one would take itself for a part of it.

    Args:
        before: The environment before the training.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def run(folder: Path) -> None:
    """Carry out the run that a folder describes, and write its record.

    Raises:
        SystemExit: The program ended with an error, and its values were finite.
    """
    import torch

    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    fit, evaluation = arguments(folder, job["stage"], job["paths"])
    status, message = "done", ""
    try:
        before = dict(os.environ)
        call(job["program"], fit)
        _leave_group(before)
        call(job["program"], evaluation)
    except BaseException:
        failure = _read(folder / FAILURE)
        if not failure.get("diverged"):
            raise
        status, message = "diverged", str(failure["message"])
    fitted, metrics = _read(folder / FIT), _read(folder / EVALUATION).get("metrics", {})
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if status == "done" and broken and len(broken) == len(metrics):
        status, message = "diverged", f"{broken[0]} is {metrics[broken[0]]}"
    record = Record(
        id=job["id"],
        arm=job["arm"],
        stage=job["stage"],
        set=job["set"],
        seed=job["seed"],
        rates=job["rates"],
        status=status,  # type: ignore[arg-type]
        metrics=metrics,
        curve=_rounded(fitted.get("curve", [])),
        parameters=fitted.get("parameters", {}),
        seconds={"fit": round(fitted.get("seconds", 0.0), 1), "total": round(time.perf_counter() - start, 1)},
        peak_memory_mib=round(peak_memory_mib()),
        environment=environment(),
        message=message,
        protocol=job.get("protocol", {}),
        ended=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    _tidy(folder)
    write_record(folder, record)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _rounded(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: float(f"{value:.5g}") for name, value in point.items()} for point in curve]


def _tidy(folder: Path) -> None:
    """Remove what the record holds, and checkpoints, which would fill the disk."""
    for name in (FIT, EVALUATION, FAILURE):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in folder.rglob("*.ckpt"):
        checkpoint.unlink()


def main(folder: str, parent: str = "", owner: str = "") -> None:
    """Carry out a run as a process of its own.

    Args:
        folder: The run's folder.
        parent: Number of the process that waits for this one; if it ends, this one ends too. Empty for none.
        owner: What owner.txt in the folder holds while the run belongs to this process.
    """
    if parent:
        end_with(lambda: os.getppid() == int(parent) and owns(folder, owner))
    run(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads that the program started may still run, and would keep the process alive
