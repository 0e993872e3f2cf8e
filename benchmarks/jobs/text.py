"""Rows of text for the jobs on language models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.jobs.job import Data, SizeName

_LONGEST = {"tiny": 120, "real": 1000}  # characters of a row: whole rows fit into the lengths of the jobs
_TINY_ROWS = 60


def alpaca_rows(size: SizeName, data: Data, count: int) -> list[dict[str, str]]:
    """The first rows that are not too long.

    Args:
        size: At tiny size rows are made.
        data: Where the rows of real size are.
        count: How many.

    Raises:
        SystemExit: No file is given, or it has too few rows.
    """
    if size == "tiny":
        rows = [_made(number) for number in range(_TINY_ROWS)]
    elif data.rows is None:
        raise SystemExit("error: this job needs --rows, a file of Alpaca rows in jsonl")
    else:
        rows = read_rows(data.rows)
    texts = [{name: row.get(name) or "" for name in ("instruction", "input", "output")} for row in rows]
    fitting = [text for text in texts if text["output"] and sum(map(len, text.values())) <= _LONGEST[size]]
    if len(fitting) < count:
        raise SystemExit(
            f"error: {data.rows} has {len(fitting)} rows of at most {_LONGEST[size]} characters, not {count}"
        )
    return fitting[:count]


def _made(number: int) -> dict[str, str]:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    listed = [words[(number + i) % len(words)] for i in range(2 + number % 5)]
    return {"instruction": f"Say it backwards, {number}.", "input": " ".join(listed), "output": " ".join(listed[::-1])}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as jsonl; returns the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
