"""A study in memory: arms with known means, differences and rates, as if their runs had finished."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from lit_adapters.study.planning import Plan
from lit_adapters.study.records import Record, Results
from lit_adapters.study.settings import Arm, Metric, Repeat, Search, Study

ACCURACY = Metric("test/acc1", "higher", 100, "points", "test accuracy", "correct")
LOSS = Metric("test/loss", "lower", items="loss", title="test loss")
ITEMS = 2000


def synthetic_study(folder: Path, arms, **changes) -> Study:
    """A study of `arms` (titles by key), whose files are in `folder`.

    Args:
        folder: Gets the study's file and a recipe.
        arms: Titles by key, or arms.
        changes: Fields of the study that differ.
    """
    (folder / "base.yaml").write_text("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1}}\n")
    (folder / "study.yaml").write_text("question: ...\n")
    settings = {
        "question": "Does it pay?",
        "program": "vision",
        "recipe": "base.yaml",
        "metric": ACCURACY,
        "arms": {
            key: arm if isinstance(arm, Arm) else Arm(arm, {"model.name": key}, {key: "search"})
            for key, arm in arms.items()
        },
        "repeat": Repeat([0, 1, 2, 3], ["data.subset_index"]),
        "search": Search(Metric("val/loss", "lower"), [1e-3, 3e-3, 1e-2], 1, [100]),
        "also": [LOSS],
        "path": folder / "study.yaml",
    }
    return Study(**{**settings, **changes})


def searched(study: Study, results: Results, best=None, edge=()) -> Results:
    """Add search runs until every arm has its rates: the middle of the grid, or the highest rate for arms in `edge`."""
    plan = Plan(study)
    for key in study.arms:
        while True:
            due = [run for run in plan.chosen(results, key).due]
            if not due:
                break
            for run in due:
                rate = run.rates[key]
                loss = -math.log10(rate) / 10 if key in edge else abs(math.log10(rate / (best or 3e-3)))
                results.add(_record(run, {"val/loss": 1 + loss}))
    return results


def finished(
    study: Study, means, spread=0.5, missing=(), diverged=(), parameters=None, seed=0, stage="final", items=True
) -> Results:
    """Results with a search and final runs for all arms.

    Args:
        study: The study.
        means: Of each arm, in points; the metric's own unit if its scale is 1.
        spread: Deviation of a run around the arm's mean and the set's common effect, in the same unit.
        missing: (arm, set) without a run.
        diverged: (arm, set) whose run diverged.
        parameters: Trained parameters of each arm.
        seed: Of the spread.
        stage: "final" or "noise".
        items: Whether runs leave per-item values.
    """
    results = searched(study, Results())
    plan, draw = Plan(study), np.random.default_rng(seed)
    for index, key in enumerate(study.arms):
        size = (parameters or {}).get(key, 400 * 9**index)
        for run in plan.final_runs(key, plan.chosen(results, key).rates, stage):
            value = means[key] + run.set + spread * draw.standard_normal()
            value = round(value / 100 * ITEMS) / ITEMS * 100 if items else value
            if (key, run.set) in missing:
                continue
            bad = (key, run.set) in diverged
            metrics = {} if bad else {study.metric.name: value / study.metric.scale, "test/loss": 2 - value / 100}
            curve = [{"step": s, "train/loss": 2.3 * math.exp(-s / 40) + draw.random() / 20} for s in range(0, 100, 5)]
            record = _record(run, metrics, curve, size, "diverged" if bad else "done")
            results.add(record, _items(study, value, draw) if items and not bad else None)
    return results


def _items(study, value, draw):
    right = np.zeros(ITEMS)
    right[: round(value / 100 * ITEMS)] = 1
    return {"correct": right, "loss": 2 - value / 100 + draw.permuted(np.linspace(-1, 1, ITEMS))}


def _record(run, metrics, curve=(), size=None, status="done") -> Record:
    return Record(
        run.id,
        run.arm,
        run.stage,
        run.set,
        run.seed,
        dict(run.rates),
        status,
        metrics,
        list(curve),
        {} if size is None else {"trainable": size + 3850, "without_head": size},
        {"fit": 30.0, "total": 40.0},
        1500.0,
        {"torch": "2.9.0", "processor": "a <CPU> & more", "date": f"2026-11-2{run.set % 10}"},
        "loss is nan at step 30" if status == "diverged" else "",
    )


def changed(results: Results, change) -> Results:
    """A copy of results whose records went through `change`, such as `lambda r: replace(r, metrics={})`."""
    copy = Results()
    for record in results.records:
        copy.add(change(record), results.items(record))
    return copy


replace = dataclasses.replace
