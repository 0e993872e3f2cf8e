"""Ask questions one after the other, each in a process of its own, within a budget of time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.gpu.questions import Question
from benchmarks.gpu.setting import Record, Setting
from benchmarks.results_file import append

LEAST = 0.05  # of the whole time: with less left no question is begun
_LOG_CHARACTERS = 2000  # of what a process printed last, kept where it failed
_ROOT = Path(__file__).parents[2]


def ask(questions: Sequence[Question], setting: Setting, minutes: float, out: Path) -> list[Record]:
    """Ask the questions and append one record for each to `out` as soon as it ends.

    A question may take its share of the time, and no more than is left; then it is stopped. What it has yielded until
    then is kept, also where it fails.

    Returns:
        The records: `status` is "answered", "failed", "stopped" or "not run".
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    run = datetime.now().isoformat(timespec="seconds")
    end = time.monotonic() + 60 * minutes
    records = []
    for question in questions:
        left = end - time.monotonic()
        begin = time.monotonic()
        if left < LEAST * 60 * minutes:
            answer: Record = {"status": "not run", "results": []}
        else:
            print(f"{question.name}: up to {min(left, question.share * 60 * minutes):.0f} s", flush=True)
            answer = _answer(question, setting, min(left, question.share * 60 * minutes))
        records.append(
            {
                "run": run,
                "question": question.name,
                "device": setting.device,
                "size": setting.size,
                "minutes": minutes,
                "seconds": round(time.monotonic() - begin, 1),
                **answer,
            }
        )
        append(out, records[-1])
        print(f"{question.name}: {answer['status']}, {len(answer['results'])} results", flush=True)
        if "error" in answer:
            print(answer["error"], flush=True)
    return records


def _answer(question: Question, setting: Setting, seconds: float) -> Record:
    """Status, results and environment of a question, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder, "lines"), Path(folder, "log")
        settings = {"TMPDIR": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if setting.device == "cpu":
            settings["TRITON_INTERPRET"] = "1"
        code = _run([question.function, *setting, str(lines)], settings, seconds, log)
        written = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        found = {kind: value for line in written for kind, value in line.items()}
        answer: Record = {
            "status": "stopped" if code is None else found.get("end", "failed"),
            "results": [line["result"] for line in written if "result" in line],
            "environment": found.get("environment"),
        }
        if answer["status"] == "failed":
            printed = log.read_text(errors="replace")[-_LOG_CHARACTERS:]
            answer["error"] = found.get("error") or f"the process ended with code {code}: {printed}"
        return answer


def _run(arguments: Sequence[str], settings: dict[str, str], seconds: float, log: Path) -> int | None:
    """The exit code of a process that answers a question; None where it was stopped after `seconds`.

    Args:
        arguments: Of `benchmarks.gpu.answer`.
        settings: Variables of its environment, beside those of this process.
        seconds: The most that it may take.
        log: Where it prints.
    """
    with log.open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.answer", *arguments],
            cwd=_ROOT,
            env=os.environ | settings,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to stop the processes that it starts as well
        )
        with _ended(process):
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """Leave nothing of a process and of those that it started, however the block ends."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
