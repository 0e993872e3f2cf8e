"""Results of an evaluation: a JSON file, written atomically, and a table to read."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from language.evaluate.metrics import Estimate
from lit_adapters.console import text_table
from lit_adapters.files.atomic import write_text_atomically

_PACKAGES = ("lit-adapters", "torch", "transformers", "tokenizers", "torchmetrics", "lm_eval")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES if find_spec(name.replace("-", "_"))},
    }


def as_plain(value: Any) -> Any:
    """The value in JSON's own types; estimates become `{value, stderr, n}`, NaN and infinity null."""
    if isinstance(value, Estimate):
        return as_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write the result as JSON; if that fails, an earlier file at `path` stays as it was."""
    text = json.dumps(as_plain(result), indent=1, allow_nan=False) + "\n"
    write_text_atomically(Path(path), text)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each metric of each task: value, standard error, number of observations."""
    rows = [("task", "metric", "value", "± stderr", "n")]
    for task, result in results.items():
        metrics = dict(result["metrics"])
        for category, averages in result.get("categories", {}).items():
            metrics |= {f"{category} ({kind})": estimate for kind, estimate in averages.items()}
        rows += [
            (task, name, f"{e.value:.4f}", "" if math.isnan(e.stderr) else f"{e.stderr:.4f}", f"{e.n:,}")
            for name, e in metrics.items()
        ]
    notes = [
        f"{task}: {result['truncated']} prompts were longer than the context and lost their beginning"
        for task, result in results.items()
        if result.get("truncated")
    ]
    return "\n".join([text_table(rows, right=(2, 3, 4)), *notes])
