"""Compare two arms at equal accuracy: read another value, such as the loss, where both reached the same accuracy.

A method that learns more slowly can have a lower test loss or a smaller calibration error for that reason alone. So
each pair of runs is read at the best accuracy that both reached: at that point of each training the other value is
interpolated between the two validations around it. `statistics.compare` then compares the values over training sets.

The level is chosen from the runs themselves, so that such a comparison is exploratory. Validations must be frequent:
between two of them the path from one accuracy to the other is taken to be straight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lit_adapters.errors import AdapterError

Curve = Sequence[Mapping[str, float]]


def at_level(
    curve: Curve, by: str, level: float, read: str, better: Literal["higher", "lower"] = "higher"
) -> float | None:
    """Return `read` where `by` first is as good as `level`, by linear interpolation; None if it never is.

    Args:
        curve: The values of a training in its order, as `Record.curve` holds them. Points without both are left out.
        by: The name of the value that is made equal, such as `val/acc1`.
        level: The level of `by`. A curve that begins better is read at its first point.
        read: The name of the value that is read, such as `val/loss`.
        better: Whether higher or lower values of `by` are better.

    Raises:
        AdapterError: No point of the curve has both values.
    """
    path = _path(curve, by, read)
    sign = 1 if better == "higher" else -1
    reached = np.flatnonzero(sign * path[:, 0] >= sign * level)
    if not len(reached):
        return None
    end = int(reached[0])
    if end == 0:
        return float(path[0, 1])
    (before, value_before), (after, value_after) = path[end - 1], path[end]
    return float(value_before + (level - before) / (after - before) * (value_after - value_before))


def at_equal(
    curve_a: Curve, curve_b: Curve, by: str, read: str, better: Literal["higher", "lower"] = "higher"
) -> tuple[float, float, float]:
    """Return the best level of `by` that both trainings reach, and `read` of the first and of the second there.

    Args:
        curve_a: The training of the first arm.
        curve_b: That of the second, on the same training set.
        by: The name of the value that is made equal.
        read: The name of the value that is read.
        better: Whether higher or lower values of `by` are better.

    Raises:
        AdapterError: No point of a curve has both values, or one training began better than the other ended.
    """
    sign = 1 if better == "higher" else -1
    first, second = (sign * _path(curve, by, read)[:, 0] for curve in (curve_a, curve_b))
    level = min(first.max(), second.max())
    if level < max(first[0], second[0]):
        raise AdapterError(
            f"one training begins at a better {by} than the other reaches ({sign * level:.4g}); validate "
            "earlier in the training, or compare other arms"
        )
    a, b = (at_level(curve, by, sign * level, read, better) for curve in (curve_a, curve_b))
    assert a is not None
    assert b is not None
    return float(sign * level), a, b


def _path(curve: Curve, by: str, read: str) -> np.ndarray:
    """The points of a curve that have both finite values, shape (points, 2)."""
    points = [(point[by], point[read]) for point in curve if by in point and read in point]
    path = np.array([point for point in points if np.isfinite(point).all()], dtype=np.float64)
    if not len(path):
        raise AdapterError(f"no point of the curve has both {by} and {read}; validate during the training and log both")
    return path
