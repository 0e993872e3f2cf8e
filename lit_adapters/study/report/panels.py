"""Small multiples, one panel an arm: the rates tried, and the learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lit_adapters.study.planning import Tried
from lit_adapters.study.records import Record
from lit_adapters.study.report.digits import rate as rate_text
from lit_adapters.study.report.front import BAD, FRONT, OTHER, axis_title, wrapped
from lit_adapters.study.report.summary import ArmSummary, Summary

_PANEL = 2.05  # inches wide, at least
_POINTS = 60  # of a curve; more cannot be told apart in a panel
_WIDEST = 2.8
_HEIGHT = 1.15
_NOT_CURVES = ("step", "epoch")


def _panels(titles: Sequence[str], width: float, room: int = 4) -> tuple[Figure, list[Axes]]:
    columns = min(max(int(width // _PANEL), 2), len(titles))
    rows = math.ceil(len(titles) / columns)
    letters = max(int(width / columns * 72 / 4.6) - room, 12)
    texts = [wrapped(title, letters) for title in titles]
    head = 0.17 * max(text.count("\n") + 1 for text in texts) + 0.08
    height = rows * (_HEIGHT + head) + (rows - 1) * 0.12 + 0.62
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        0.68 / width,
        0.55 / height,
        min(1 - 0.08 / width, (0.68 + _WIDEST * columns) / width),
        1 - (head + 0.04) / height,
        wspace=0.08,
        hspace=(head + 0.12) / _HEIGHT,
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flatten())
    for panel, text in zip(panels, texts, strict=False):
        panel.set_title(text, fontsize=8, loc="left", pad=3)
        panel.tick_params(labelsize=7.5)
        panel.grid(color="0.93", linewidth=0.7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    # The last panel of each column has the axis, also where the last row is not full.
    for panel in panels[max(len(titles) - columns, 0) : len(titles)]:
        panel.tick_params(labelbottom=True)
    return figure, panels[: len(titles)]


def searches(summary: Summary) -> list[tuple[str, ArmSummary, list[Tried]]]:
    """What was tried, by arm and group of parameters: the panel's title, the arm, and its rates in rising order."""
    found = []
    for arm in summary.arms.values():
        tried = arm.chosen.tried if arm.chosen is not None else []
        groups = list(dict.fromkeys(t.group for t in tried))
        for group in groups:
            of_group = sorted((t for t in tried if t.group == group), key=lambda t: t.rates[group])
            if any(t.mean is not None for t in of_group):
                title = f"{arm.title}: {group}" if len(groups) > 1 else arm.title
                found.append((title, arm, of_group))
    return found


def rates_figure(summary: Summary, width: float) -> Figure:
    """The search metric against the rate; the chosen rate is marked, rates that diverged are crosses at the edge."""
    search = summary.study.search
    assert search is not None
    shown = searches(summary)
    figure, panels = _panels([title for title, *_ in shown], width, room=10)
    means = [t.mean for *_, tried in shown for t in tried if t.mean is not None and math.isfinite(t.mean)]
    values = np.array(means) * search.metric.scale
    low, high = _range(values, worst_above=search.metric.better == "lower")
    worst = high if search.metric.better == "lower" else low
    for panel, (_, arm, tried) in zip(panels, shown, strict=True):
        group = tried[0].group
        known = [(t.rates[group], t.mean) for t in tried if t.mean is not None]
        finite = [(x, mean * search.metric.scale) for x, mean in known if math.isfinite(mean)]
        panel.plot([x for x, _ in finite], [y for _, y in finite], "o-", color=OTHER, markersize=3.5, linewidth=1)
        outside = [x for x, y in finite if not low <= y <= high]
        panel.plot(
            outside, [worst] * len(outside), _arrow(search.metric.better), color=OTHER, markersize=5, clip_on=False
        )
        gone = [x for x, mean in known if not math.isfinite(mean)]
        panel.plot(gone, [worst] * len(gone), "x", color=BAD, markersize=6, clip_on=False)
        rates = arm.chosen.rates if arm.chosen is not None else None
        best = [(x, y) for x, y in finite if rates is not None and x == rates[group]]
        panel.plot([x for x, _ in best], [y for _, y in best], "o", color=FRONT, markersize=7)
        for x, _ in best:
            panel.set_title(rate_text(x), fontsize=8, loc="right", pad=3, color=FRONT, fontweight="bold")
    for panel in panels:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(numticks=6))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: rate_text(x)))
        panel.yaxis.set_major_locator(MaxNLocator(4))
    panels[0].set_ylim(*_with_room(low, high))
    _axis_titles(figure, "learning rate", axis_title(search.metric))
    return figure


def _arrow(better: str) -> str:
    return "^" if better == "lower" else "v"


def _range(values: np.ndarray, worst_above: bool) -> tuple[float, float]:
    """The range that is shown: rates far worse than most would flatten all others, and are cut off."""
    if not len(values):
        return 0.0, 1.0
    low, middle, high = float(values.min()), float(np.median(values)), float(values.max())
    if worst_above:
        return low, min(high, middle + 2.0 * (middle - low) or high)
    return max(low, middle - 2.0 * (high - middle) or low), high


def _with_room(low: float, high: float) -> tuple[float, float]:
    room = (high - low or abs(high) or 1.0) * 0.12
    return low - room, high + room


def _axis_titles(figure: Figure, below: str, left: str) -> None:
    width, height = figure.get_size_inches()
    middle = (figure.subplotpars.left + figure.subplotpars.right) / 2
    figure.text(middle, 0.08 / height, below, ha="center", va="bottom", fontsize=9)
    upright = (figure.subplotpars.bottom + figure.subplotpars.top) / 2
    figure.text(0.06 / width, upright, left, ha="left", va="center", rotation="vertical", fontsize=9)


def curve_names(summary: Summary) -> list[str]:
    """What the curves of final runs hold, the training's loss first."""
    runs = [record for arm in summary.arms.values() for record in arm.finals.values()]
    names = {name for record in runs for point in record.curve for name in point if name not in _NOT_CURVES}
    return sorted(names, key=lambda name: (not name.startswith("train"), "loss" not in name, name))


def curves_figure(summary: Summary, name: str, width: float) -> Figure:
    """One panel an arm: its runs, their mean, and behind them the means of the other arms."""
    arms = [arm for arm in summary.arms.values() if any(_curve(r, name)[0].size for r in arm.finals.values())]
    figure, panels = _panels([arm.title for arm in arms], width)
    runs = {arm.key: [(record, *_curve(record, name)) for record in arm.finals.values()] for arm in arms}
    means = {arm.key: _mean([(x, y) for record, x, y in runs[arm.key] if record.status == "done"]) for arm in arms}
    for panel, arm in zip(panels, arms, strict=True):
        for key, (x, y) in means.items():
            if key != arm.key:
                panel.plot(x[::3], y[::3], color="0.85", linewidth=0.7, zorder=1)
        for record, x, y in runs[arm.key]:
            bad = record.status == "diverged"
            panel.plot(x, y, color=BAD if bad else FRONT, linewidth=0.6, alpha=0.9 if bad else 0.3, zorder=2)
            if bad and x.size:
                panel.plot(x[-1], y[-1], "x", color=BAD, markersize=5, zorder=3)
        panel.plot(*means[arm.key], color=FRONT, linewidth=1.5, zorder=4)
        panel.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    good = [y for arm in arms for record, _, y in runs[arm.key] if record.status == "done" and y.size]
    if good:
        values = np.concatenate(good)
        low, high = float(values.min()), float(np.quantile(values, 0.998))
        if low > 0 and high / low > 30:
            panels[0].set_yscale("log")
            panels[0].set_ylim(low / 1.2, high * 1.2)
        else:
            panels[0].set_ylim(*_with_room(low, high))
    _axis_titles(figure, "step", name)
    return figure


def _curve(record: Record, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a curve, thinned to what a panel can show."""
    points = [(p["step"], p[name]) for p in record.curve if "step" in p and math.isfinite(p.get(name, math.nan))]
    stride = math.ceil(len(points) / _POINTS) or 1
    kept = np.array(points[::stride] if len(points) > 1 else points, dtype=np.float64).reshape(-1, 2)
    return kept[:, 0], kept[:, 1]


def _mean(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of several curves over the steps that all of them reach."""
    whole = [(x, y) for x, y in curves if x.size]
    if not whole:
        return np.empty(0), np.empty(0)
    steps = np.unique(np.concatenate([x for x, _ in whole]))
    start, end = max(x[0] for x, _ in whole), min(x[-1] for x, _ in whole)
    steps = steps[(steps >= start) & (steps <= end)]
    return steps, np.mean([np.interp(steps, x, y) for x, y in whole], axis=0)
