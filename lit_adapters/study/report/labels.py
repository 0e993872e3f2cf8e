"""Labels beside points, placed so that they cover neither each other nor what is drawn.

A search over positions around each point; matplotlib places no labels, and a package for it would be one more
dependency for one figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DISTANCES = (7.0, 12.0, 18.0, 25.0, 33.0, 43.0, 55.0, 70.0, 88.0)  # points from the marker to the label
_DIRECTIONS = 24
_SWEEPS = 8
_GAP = 1.5  # points around a label
_SHORT = 11.0  # points; a label that is nearer needs no line
# Costs, where a point of distance costs 1: a label beyond the frame; a square point that it covers of a marker or
# another label, and of a bar; a line through labels, and through other markers.
_OUTSIDE, _COVERED, _HIDDEN, _CROSSED, _PASSED = 2000.0, 8.0, 0.4, 150.0, 60.0


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    bars: Sequence[tuple[float, float]],
    styles: Sequence[Mapping[str, Any]],
) -> None:
    """Write a label beside each point, with a thin line where it stands apart.

    Args:
        axes: With its final limits and size.
        points: In data's units.
        texts: The labels.
        bars: Lower and upper end of the bar through each point, in data's units; labels keep off them.
        styles: Arguments of each label's text, such as its colour.
    """
    assert isinstance(axes.figure, Figure)
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    dot = axes.figure.dpi / 72  # pixels of a point
    frame = axes.get_window_extent(renderer)
    centres = axes.transData.transform(points)
    sizes = []
    for text, style in zip(texts, styles, strict=True):
        probe = axes.text(0, 0, text, fontsize=8, **style)
        box = probe.get_window_extent(renderer)
        sizes.append((box.width + 2 * _GAP * dot, box.height + 2 * _GAP * dot))
        probe.remove()
    markers = np.concatenate([centres - 4 * dot, centres + 4 * dot], axis=-1)
    drawn = np.array([_bar_box(axes, point, bar, dot) for point, bar in zip(points, bars, strict=True)])
    offsets = [_offsets(size, dot) for size in sizes]
    boxes = [_boxes(*each) for each in zip(centres, offsets, sizes, strict=True)]
    lines = [_lines(*each) for each in zip(centres, offsets, sizes, strict=True)]
    own = [_own_costs(*each, frame.extents, markers, drawn, dot) for each in zip(boxes, lines, strict=True)]
    chosen = [int(np.argmin(costs)) for costs in own]
    for _ in range(_SWEEPS):
        before = list(chosen)
        for i in range(len(texts)):
            costs = own[i].copy()
            for j, place in enumerate(chosen):
                if j != i:
                    costs += _COVERED * _overlap(boxes[i], boxes[j][place]) / dot**2
                    costs += _CROSSED * _share_inside(lines[j][place], boxes[i])
                    costs += _CROSSED * _share_inside(lines[i], boxes[j][place])
            chosen[i] = int(np.argmin(costs))
        if chosen == before:
            break
    to_data = axes.transData.inverted()
    for i, (text, style) in enumerate(zip(texts, styles, strict=True)):
        line = lines[i][chosen[i]]
        if np.hypot(*(line[-1] - line[0])) > _SHORT * dot:
            axes.plot(*to_data.transform(line[[0, -1]]).T, color="0.6", linewidth=0.7, zorder=2.5)
        middle = tuple(offsets[i][chosen[i]] / dot)
        axes.annotate(
            text,
            points[i],
            xytext=middle,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.3},
            zorder=2.6,
            **style,
        )


def _bar_box(axes: Axes, point: tuple[float, float], bar: tuple[float, float], dot: float) -> list[float]:
    (x, low), (_, high) = axes.transData.transform([(point[0], end) for end in bar])
    return [x - 2 * dot, low, x + 2 * dot, high]


def _offsets(size: tuple[float, float], dot: float) -> np.ndarray:
    """Positions (P, 2) of a label's centre from its point, in pixels: the label's edge is a distance away."""
    angles = np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS
    direction = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    # Above and below, the middle of the label; at the sides, its end.
    half = np.array(size) / 2 * np.clip(direction * np.array([1.4, 2.0]), -1, 1)
    return np.concatenate([direction * distance * dot + half for distance in _DISTANCES])


def _boxes(centre: np.ndarray, offsets: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Boxes (P, 4) as left, bottom, right, top."""
    middle, half = centre + offsets, np.array(size) / 2
    return np.concatenate([middle - half, middle + half], axis=-1)


def _overlap(boxes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Area that each box has in common with another one."""
    width = np.minimum(boxes[:, 2], other[2]) - np.maximum(boxes[:, 0], other[0])
    height = np.minimum(boxes[:, 3], other[3]) - np.maximum(boxes[:, 1], other[1])
    return np.clip(width, 0, None) * np.clip(height, 0, None)


def _lines(centre: np.ndarray, offsets: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Points (P, 16, 2) of the line from a marker to the nearest point of each position's box."""
    half = np.array(size) / 2
    ends = centre + offsets + np.clip(-offsets, -half, half)
    return centre + np.linspace(0.0, 1.0, 16)[:, None] * (ends - centre)[:, None]


def _own_costs(
    boxes: np.ndarray, lines: np.ndarray, frame: Sequence[float], markers: np.ndarray, bars: np.ndarray, dot: float
) -> np.ndarray:
    """Costs (P,) that other labels do not change: distance, the frame's edge, markers and bars."""
    costs = np.hypot(*(lines[:, -1] - lines[:, 0]).T) / dot
    left, bottom, right, top = frame
    beyond = np.clip(left - boxes[:, 0], 0, None) + np.clip(boxes[:, 2] - right, 0, None)
    beyond += np.clip(bottom - boxes[:, 1], 0, None) + np.clip(boxes[:, 3] - top, 0, None)
    costs += _OUTSIDE * (beyond > 0) + beyond / dot
    for marker in markers:
        costs += _COVERED * _overlap(boxes, marker) / dot**2 + _PASSED * _share_inside(lines[:, 6:], marker)
    for bar in bars:
        costs += _HIDDEN * _overlap(boxes, bar) / dot**2
    return costs


def _share_inside(lines: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Share of the points of lines (..., N, 2) that lie in boxes (..., 4)."""
    corners = boxes[..., None, :]
    return ((lines >= corners[..., :2]) & (lines <= corners[..., 2:])).all(-1).mean(-1)
