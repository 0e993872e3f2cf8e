"""The tables and the plot of preferences, reinforcement and speculative decoding; called by `benchmarks.tables`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lit_adapters.learned.pictures import save_figure

Record = dict[str, Any]
# The arms and their names, in the order of the rows.
NAMES = {
    "untouched": "untouched",
    "none": "no adapter",
    "lora": "LoRA",
    "afa": "AFA-LoRA",
    "dora": "DoRA",
    "nora_plus_plus": "NoRA++",
    "loran": "LoRAN, r = 64, q and v",
}


def _estimate(metric: Record, digits: int = 3) -> str:
    error = metric.get("stderr")
    return f"{metric['value']:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _full_runs(records: list[Record]) -> list[Record]:
    """The full runs, in the order of the names."""
    full = [r for r in records if r.get("protocol", "full") == "full"]
    return sorted(full, key=lambda r: list(NAMES).index(r["arm"]))


def _name(record: Record) -> str:
    return NAMES[record["arm"]] + ("" if record["precision"] == "bf16-mixed" else " (fp32)")


PREFERENCES = ["arm", "trained", "rate", "reward accuracy", "minus LoRA, paired", "reward margin", "KL a token"]


def preference_rows(records: list[Record]) -> list[list[str]]:
    """One row for each run; differences from LoRA are those on the same pairs."""
    rows = []
    lora = {r["precision"]: r for r in _full_runs(records) if r["arm"] == "lora"}
    for r in _full_runs(records):
        other = lora.get(r["precision"])
        known = other is not None and r["arm"] not in ("lora", "untouched")
        row = [_name(r), f"{r['trainable']:,}", f"{r['rate']:g}" if r["steps"] else ""]
        row.append(_estimate(r["metrics"]["reward accuracy"]))
        row.append(_paired(r, other, "reward accuracy") if known else "")  # type: ignore[arg-type]
        rows.append([*row, *(_estimate(r["metrics"][name]) for name in ("reward margin", "kl"))])
    return rows


def _paired(record: Record, other: Record, name: str) -> str:
    values = [[float(v) for v in r["items"][name].split()] for r in (record, other)]
    differences = [a - b for a, b in zip(*values, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.3f} ± {error:.3f}"


REINFORCEMENT = ["arm", "trained", "right, before", "right, after", "a number alone, before", "after", "reward, after"]


def reinforcement_rows(records: list[Record]) -> list[list[str]]:
    """One row for each run."""
    rows = []
    for r in _full_runs(records):
        before, after = r["before"], r["after"]
        shown = [before["exact_number"], after["exact_number"], before["number_only"], after["number_only"]]
        rows.append([_name(r), f"{r['trainable']:,}", *map(_estimate, [*shown, after["reward"]])])
    return rows


def reinforcement_figure(records: list[Record], path: Path) -> None:
    """Reward, and its parts, of the sampled completions against steps."""
    picture = Figure(figsize=(9, 3), layout="constrained")
    titles = {"reward": "reward", "exact_number": "right numbers", "number_only": "nothing but a number"}
    for axes, (name, title) in zip(picture.subplots(1, 3), titles.items(), strict=True):
        for record in _full_runs(records):
            values = [float(value) for value in record["curve"][name].split()]
            every = record["curve"]["every"]
            axes.plot([every * (i + 0.5) for i in range(len(values))], values, label=_name(record))
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
    picture.axes[0].legend()
    save_figure(picture, path, dpi=110)


DISTILLED = ["arm", "trained", "rate", "KL", "agreement", "expected acceptance"]
DECODED = ["arm", "temperature", "tokens a pass", "acceptance", "identical", "tokens/s", "alone", "speed-up, median"]


def distilled_rows(records: list[Record]) -> list[list[str]]:
    """One row for each run: quality on held-out rows."""
    return [
        [_name(r), f"{r['trainable']:,}", f"{r['rate']:g}" if r["steps"] else ""]
        + [_estimate(r["metrics"][name]) for name in ("kl", "agreement", "acceptance")]
        for r in _full_runs(records)
    ]


def decoded_rows(records: list[Record]) -> list[list[str]]:
    """One row for each run and temperature: speed when prompts are continued."""
    rows = []
    for temperature in ("0", "1"):
        for r in _full_runs(records):
            found = {
                name.removeprefix(f"temperature {temperature}: "): metric
                for name, metric in r["metrics"].items()
                if name.startswith(f"temperature {temperature}: ")
            }
            row = [_name(r), temperature, *(_estimate(found[n]) for n in ("accepted length", "acceptance"))]
            row.append(f"{found['identical']['value']:.2f}" if "identical" in found else "")
            rows.append([*row, *(f"{found[n]['value']:.1f}" for n in ("tokens/s", "tokens/s alone"))])
            rows[-1].append(f"{found['speedup']['value']:.2f}")
    return rows
