"""Tables and figure of the language measurements; called by `python -m benchmarks.tables`.

Differences from LoRA are paired: the same rows, questions or texts, so that what makes one hard for both cancels.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lit_adapters.learned.pictures import save_figure

# The arms and their names, in the order of the rows.
NAMES = {
    "untouched": "untouched model",
    "lora": "LoRA",
    "afa": "AFA-LoRA",
    "nora_plus_plus": "NoRA++, anchored",
    "dora": "DoRA",
    "loran": "LoRAN, r = 64, q and v",
    "loran_identity": "LoRAN, amplitude 0",  # Sinter's control: the same without its sine
}
# Metrics that only the untouched model has, and their names.
ONLY_UNTOUCHED = {"accuracy by likelihood": "by likelihood"}
CATEGORIES = ("STEM", "Humanities", "Social Sciences", "Other")
Record = dict[str, Any]


def items(record: Record, name: str) -> list[float]:
    """One value for each test row, question or text."""
    return [float(value) for value in record["items"][name].split()]


def paired(record: Record, other: Record, name: str) -> tuple[float, float]:
    """Mean difference of two runs on the same items, and its standard error; losses weigh rows by their tokens."""
    pairs = zip(items(record, name), items(other, name), strict=True)
    differences = [a - b for a, b in pairs]
    if name != "loss":
        return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    tokens = items(record, "tokens")
    mean = sum(d * n for d, n in zip(differences, tokens, strict=True)) / sum(tokens)
    squares = sum(((d - mean) * n) ** 2 for d, n in zip(differences, tokens, strict=True))
    rows = len(tokens)
    return mean, math.sqrt(squares * rows / (rows - 1)) / sum(tokens)


def full_table(records: list[Record], task: str) -> tuple[list[str], list[list[str]]]:
    """Header, and one row for each arm: parameters, rate, metrics, and the paired difference from LoRA.

    LoRA is that of the same precision.
    """
    metrics, difference = TASKS[task]
    rows = []
    for arm, name in NAMES.items():
        if not any(r["arm"] == arm for r in records):
            continue
        found = _full(records, arm)
        if not found:
            rows.append([name, *["not run"] * (len(metrics) + 3)])
        for precision, record in found.items():
            shown = name if precision == "bf16-mixed" else f"{name} (fp32)"
            row = [shown, f"{record['trainable']:,}", f"{record['rate']:g}" if record["steps"] else ""]
            row += [_estimate(record["metrics"][key]) if key in record["metrics"] else "" for key in metrics]
            lora = _full(records, "lora").get(precision)
            known = lora is not None and arm not in ("lora", "untouched")
            rows.append([*row, _difference(record, lora, difference) if known else ""])  # type: ignore[arg-type]
    return ["arm", "trained", "rate", *metrics.values(), f"{metrics[difference]} minus LoRA's"], rows


def page_table(records: list[Record], task: str) -> tuple[list[str], list[list[str]]]:
    """The columns of `full_table` that tell arms apart; the number of trained parameters in the first table alone."""
    header, rows = full_table(records, task)
    left_out = {*CATEGORIES, *ONLY_UNTOUCHED.values()}
    if len(_rates(records)) < 2:
        left_out.add("rate")
    if task != next(iter(TASKS)):
        left_out.add("trained")
    kept = [i for i, name in enumerate(header) if name not in left_out]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def notes(records: list[Record], task: str) -> str:
    """What `page_table` leaves out because it is the same in all rows or stands in one, and Sinter's control."""
    told = []
    if len(rates_used := _rates(records)) == 1:
        told.append(f"Rate {rates_used.pop():g} in every arm.")
    for record in _full(records, "untouched").values():
        told += [
            f"The untouched model, {name}: {_estimate(record['metrics'][key])}."
            for key, name in ONLY_UNTOUCHED.items()
            if key in record["metrics"]
        ]
    return " ".join([*told, control(records, TASKS[task][1])]).strip()


def _rates(records: list[Record]) -> set[float]:
    """The rates of the runs that were asked, without the untouched model."""
    return {r["rate"] for r in records if r["protocol"] == "full" and r["steps"]}


def _full(records: list[Record], arm: str) -> dict[str, Record]:
    """The runs of an arm that were asked, by precision."""
    return {r["precision"]: r for r in records if r["protocol"] == "full" and r["arm"] == arm}


def control(records: list[Record], difference: str) -> str:
    """What Sinter adds to its own control, in a sentence; empty until both were run."""
    sinter, identity = _full(records, "loran"), _full(records, "loran_identity")
    both = [precision for precision in sinter if precision in identity]
    if not both:
        return ""
    shown = _difference(sinter[both[0]], identity[both[0]], difference)
    return f"LoRAN minus the same with amplitude 0: {shown}."


def _difference(record: Record, other: Record, name: str) -> str:
    mean, error = paired(record, other, name)
    shown = f"{mean:+.4f} ± {error:.4f}"
    return f"**{shown}**" if abs(mean) > 2 * error else shown


def _estimate(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.4f} ± {metric['stderr']:.4f}"


TASKS: dict[str, tuple[dict[str, str], str]] = {
    "alpaca": (
        {"loss": "held-out loss", "mmlu": "MMLU", **{f"mmlu {c}": c for c in CATEGORIES}},
        "loss",
    ),
    "newsgroups": ({"accuracy": "accuracy", **ONLY_UNTOUCHED}, "accuracy"),
    "samsum": ({"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}, "rougeL"),
}


def rates(measured: dict[str, list[Record]]) -> list[list[str]]:
    """Validation loss of every rate tried: a row an arm, a column a task."""
    tried = {task: [r for r in records if r["protocol"] == "rate"] for task, records in measured.items()}
    rows = []
    for arm, name in NAMES.items():
        cells = []
        for runs in tried.values():
            losses = {(r["rate"], r["precision"]): r["metrics"]["loss"]["value"] for r in runs if r["arm"] == arm}
            shown = (
                f"{rate:g}{'' if precision == 'bf16-mixed' else ' (fp32)'}: {loss:.3f}"
                for (rate, precision), loss in losses.items()
            )
            cells.append(", ".join(shown))
        if any(cells):
            rows.append([name, *cells])
    return rows


def _compared(records: list[Record]) -> dict[str, tuple[Record, Record]]:
    """The run of each arm, and LoRA's of the same precision."""
    lora, pairs = _full(records, "lora"), {}
    for arm in NAMES:
        runs = _full(records, arm)
        found = [(runs[p], lora[p]) for p in ("bf16-mixed", "32-true") if p in runs and p in lora]
        if found and arm not in ("lora", "untouched"):
            pairs[arm] = found[0]
    return pairs


def figure(measured: dict[str, list[Record]], path: Path) -> None:
    """Differences from LoRA in each task, with two standard errors."""
    measured = {task: records for task, records in measured.items() if _compared(records)}
    picture = Figure(figsize=(9, 2.6), layout="constrained")
    panels = picture.subplots(1, len(measured), squeeze=False)[0]
    for panel, (task, records) in zip(panels, measured.items(), strict=True):
        arms = _compared(records)
        for row, (run, lora) in enumerate(arms.values()):
            mean, error = paired(run, lora, TASKS[task][1])
            panel.errorbar(mean, row, xerr=2 * error, fmt="o", color="#2f5d94", capsize=3)
        panel.axvline(0, color="gray", linewidth=0.8)
        short = [NAMES[a].split(",")[0] if a != "loran_identity" else NAMES[a] for a in arms]
        panel.set_yticks(range(len(arms)), short if panel is panels[0] else [])
        panel.set_ylim(len(arms) - 0.5, -0.5)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
        better = "less is better" if task == "alpaca" else "more is better"
        metric = {"alpaca": "held-out loss", "newsgroups": "accuracy", "samsum": "ROUGE-L"}[task]
        panel.set_title(f"{task}: {metric} minus LoRA's\n{better}, two std. errors", fontsize=7)
    save_figure(picture, path, dpi=110)
