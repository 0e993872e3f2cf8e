"""The contrasts of a study as differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from lit_adapters.study.report.digits import number
from lit_adapters.study.report.front import FRONT, OTHER
from lit_adapters.study.report.summary import Contrast
from lit_adapters.study.settings import Metric

_NARROW = 5.0
_COLOURS = {"found": FRONT, "equivalent": "#3a7d44"}


def contrast_name(contrast: Contrast) -> str:
    """The two arms, as "first minus second"."""
    return f"{contrast.first.title} minus {contrast.second.title}"


def forest_figure(
    contrasts: Sequence[Contrast], metric: Metric, margin: float | None, places: int, width: float
) -> Figure:
    """One row a contrast: its difference and 95% interval, zero, and the margin of the equivalence test.

    Args:
        contrasts: With a comparison each.
        metric: Says in which direction a difference is an improvement.
        margin: Shaded around zero; None if there is none.
        places: Decimals of the numbers.
        width: In inches.
    """
    row = 0.44
    height = row * len(contrasts) + 0.85
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.12 / width, 0.6 / height, 1 - 0.12 / width, 1 - 0.08 / height)
    axes = figure.subplots()
    if margin is not None:
        axes.axvspan(-margin, margin, color="#e6efe8", zorder=0)
    axes.axvline(0, color="0.35", linewidth=1, zorder=1)
    ends = [0.0] if margin is None else [-margin, margin]
    for y, contrast in enumerate(contrasts):
        c = contrast.comparison
        assert c is not None
        colour = _COLOURS.get(contrast.verdict(), OTHER)
        if math.isfinite(c.low):
            axes.plot([c.low, c.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
            ends += [c.low, c.high]
        axes.plot(c.difference, y, "o", color=colour, markersize=6, zorder=3)
        ends.append(c.difference)
        bold = "bold" if contrast.verdict() == "found" else "normal"
        axes.annotate(
            contrast_name(contrast),
            (0, y),
            xycoords=("axes fraction", "data"),
            xytext=(2, 10),
            textcoords="offset points",
            fontsize=8.5 if width > _NARROW else 7.5,
            va="center",
            fontweight=bold,
        )
        axes.annotate(
            number(c.difference, places, sign=True),
            (c.difference, y),
            xytext=(0, -9),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="center",
            color=colour,
            fontweight=bold,
        )
    room = (max(ends) - min(ends) or 1.0) * 0.06
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_ylim(len(contrasts) - 0.5, -0.6)
    axes.set_yticks([])
    axes.tick_params(labelsize=8.5)
    unit = f", {metric.unit}" if metric.unit else ""
    better = "the first arm is better to the right of 0" if metric.better == "higher" else "better to the left of 0"
    if width < _NARROW:
        better = "better: right of 0" if metric.better == "higher" else "better: left of 0"
    axes.set_xlabel(f"difference{unit} ({better})", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure
