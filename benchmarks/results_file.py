"""Result files: JSON with one record a measurement, and what is needed to believe it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_adapters.files.atomic import write_atomically
from lit_adapters.study.environment import environment

RESULTS = Path(__file__).parent / "results"


def measurable(precisions: list[str]) -> list[str]:
    """All but bf16 where the processor has none: numbers are converted, and a step takes many times as long."""
    if "bf16" not in precisions or environment()["bfloat16"]:
        return precisions
    print("bf16 is left out: this processor has none", flush=True)
    return [p for p in precisions if p != "bf16"]


def load(path: Path) -> list[dict[str, Any]]:
    """The records of a result file; empty where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one record, atomically."""
    text = json.dumps([*load(path), record], indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))


def with_spread(value: dict[str, Any], digits: int = 2) -> str:
    """Median and quartiles as text."""
    low, high = value["quartiles"]
    return f"{value['median']:.{digits}f} ({span(low, high, digits)})"


def span(low: float, high: float, digits: int = 2) -> str:
    """A range as text."""
    return f"{low:.{digits}f}\N{EN DASH}{high:.{digits}f}"
