"""The picture of a study: each arm's metric against its trained parameters."""

from __future__ import annotations

import math
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lit_adapters.study.report.digits import count
from lit_adapters.study.report.labels import place_labels
from lit_adapters.study.report.summary import ArmSummary, Summary
from lit_adapters.study.settings import Metric

FRONT, OTHER, BAD = "#2f5fb3", "#7b8794", "#b3372f"
_NARROW = 5.0  # inches; below it labels break earlier


def axis_title(metric: Metric) -> str:
    """What a metric's axis says."""
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{metric.title or metric.name}{unit} ({metric.better} is better)"


def wrapped(title: str, letters: int) -> str:
    """A title in lines of about so many letters; "r = 8" stays on one line."""
    together = title.replace(" = ", "\u00a0=\u00a0")
    return fill(together, letters, break_long_words=False)


def front_figure(summary: Summary, width: float) -> Figure:
    """Metric against trained parameters without the head, with intervals; the front is marked.

    Args:
        summary: The numbers; at least one arm is measured.
        width: In inches.
    """
    narrow = width < _NARROW
    metric = summary.study.metric
    measured = [a for a in summary.arms.values() if metric.name in a.estimates and a.parameters is not None]
    height = (0.95 if narrow else 0.5) * width + 0.1 * len(measured)
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.62 / width, 0.55 / height, 1 - 0.12 / width, 1 - 0.12 / height)
    axes = figure.subplots()
    _style(axes, metric)
    places = _positions(axes, measured)
    front = {arm.key for arm in summary.front()}
    points, bars, styles = [], [], []
    for arm in measured:
        estimate, on_front = arm.estimates[metric.name], arm.key in front
        x, colour = places[arm.key], FRONT if on_front else OTHER
        ends = (estimate.low, estimate.high) if math.isfinite(estimate.low) else (estimate.mean, estimate.mean)
        axes.plot([x, x], ends, color=colour, linewidth=1.3, alpha=0.75, zorder=2)
        inside = colour if arm.complete() else "white"
        axes.plot(x, estimate.mean, "o", color=colour, markerfacecolor=inside, markersize=6, zorder=3)
        points.append((x, estimate.mean))
        bars.append(ends)
        styles.append({"color": colour if on_front else "#404a56", "fontweight": "bold" if on_front else "normal"})
    _limits(axes, bars)
    steps = [(places[arm.key], arm.estimates[metric.name].mean) for arm in summary.front()]
    right = axes.get_xlim()[1]
    axes.step(
        [x for x, _ in steps] + [right],
        [y for _, y in steps] + [steps[-1][1]],
        where="post",
        color=FRONT,
        linewidth=1.2,
        alpha=0.35,
        zorder=1,
    )
    texts = [wrapped(arm.title, 16 if narrow else 26) for arm in measured]
    place_labels(axes, points, texts, bars, styles)
    return figure


def _style(axes: Axes, metric: Metric) -> None:
    axes.set_ylabel(axis_title(metric), fontsize=9)
    axes.set_xlabel("trained parameters without the head", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _positions(axes: Axes, arms: list[ArmSummary]) -> dict[str, float]:
    """Where arms stand on the logarithmic axis; those without trained parameters stand left of the others, at "0"."""
    numbers = {arm.key: arm.parameters or 0 for arm in arms}
    above = [n for n in numbers.values() if n > 0] or [1]
    low, high = min(above), max(above)
    span = max(math.log10(high / low), 0.5)
    zero = low / 10 ** (0.16 * span)
    axes.set_xscale("log")
    has_zero = 0 in numbers.values()
    left = zero / 10 ** (0.06 * span) if has_zero else low / 10 ** (0.08 * span)
    axes.set_xlim(left, high * 10 ** (0.1 * span))
    powers = [10.0**k for k in range(12) if low / 2 <= 10**k <= high * 10 ** (0.1 * span)]
    if len(powers) < 2:
        powers = sorted({float(n) for n in above})
    ticks = [zero, *powers] if has_zero else powers
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if has_zero and x <= zero else _short(x)))
    return {key: float(n) if n > 0 else zero for key, n in numbers.items()}


def _short(number: float) -> str:
    """1k where `count` says 1.0k, for an axis of whole powers."""
    return count(round(number)).replace(".0", "")


def _limits(axes: Axes, bars: list[tuple[float, float]]) -> None:
    low, high = min(bar[0] for bar in bars), max(bar[1] for bar in bars)
    room = (high - low or abs(high) or 1.0) * 0.1
    axes.set_ylim(low - room, high + room)
