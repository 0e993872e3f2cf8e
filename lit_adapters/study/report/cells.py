"""How tables of the report write estimates with their intervals."""

from __future__ import annotations

import math

from lit_adapters.study.report.digits import decimals, number
from lit_adapters.study.report.summary import Estimate


def places_of_estimates(estimates: list[Estimate]) -> int:
    """Decimals of a column, from the intervals in it."""
    return decimals(estimate.half_width() for estimate in estimates)


def difference_cell(estimate: Estimate | None, places: int) -> str:
    """A difference with its sign, and its interval where there is one."""
    if estimate is None:
        return "-"
    text = number(estimate.mean, places, sign=True)
    if math.isfinite(estimate.low):
        text += f" ({number(estimate.low, places, sign=True)} to {number(estimate.high, places, sign=True)})"
    return text


def level_cell(estimate: Estimate | None, places: int) -> str:
    """A mean, and its interval where there is one."""
    if estimate is None:
        return "-"
    text = number(estimate.mean, places)
    if math.isfinite(estimate.low):
        text += f" ({number(estimate.low, places)} to {number(estimate.high, places)})"
    return text
