"""How the report writes numbers: as many digits as say something."""

from __future__ import annotations

import math
from collections.abc import Iterable

_MOST_DECIMALS = 6


def count(number: int) -> str:
    """A number of parameters: 936, 7.7k, 74k, 21.5M."""
    if number < 1000:
        return str(number)
    for size, letter, whole in ((1e3, "k", 10), (1e6, "M", 100), (1e9, "B", 100)):
        value = number / size
        text = f"{value:.1f}" if round(value, 1) < whole else f"{value:.0f}"
        if float(text) < 1000 or letter == "B":
            return f"{text}{letter}"
    raise AssertionError("the last size takes every number")


def decimals(widths: Iterable[float]) -> int:
    """How many decimals a column needs, from the half-widths of its intervals.

    The middle half-width gets two digits if it begins with 1, 2 or 3, else one digit.

    Args:
        widths: Half-widths; those that are 0 or not finite do not count. Without any other, the result is 1.
    """
    known = sorted(width for width in widths if 0 < width < math.inf)
    if not known:
        return 1
    width = known[len(known) // 2]
    exponent = math.floor(math.log10(width))
    needed = (1 if width / 10**exponent < 3.55 else 0) - exponent
    return min(max(needed, 0), _MOST_DECIMALS)


def number(value: float, places: int, sign: bool = False) -> str:
    """A number with a fixed number of decimals; a value that rounds to 0 has no sign, one that is not finite is "-"."""
    if not math.isfinite(value):
        return "-"
    text = f"{value:+.{places}f}" if sign else f"{value:.{places}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def probability(p: float) -> str:
    """A p value with its sign of relation: "= 0.012", "< 0.001"."""
    if not math.isfinite(p):
        return "-"
    if p < 0.001:
        return "< 0.001"
    places = 2 if p >= 0.1 else 3
    while round(p, places) == 0.05 and p != 0.05 and places < _MOST_DECIMALS:
        places += 1
    return f"= {p:.{places}f}"


def rate(value: float) -> str:
    """A learning rate: 1e-3, 3e-5, 1.5e-4; from 0.1 on as it is."""
    if value >= 0.1:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours: 40 s, 2.4 min, 1.3 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def enumeration(names: Iterable[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"; with semicolons where a name has a comma."""
    *others, last = names
    if not others:
        return last
    separator = "; " if any("," in name for name in (*others, last)) else ", "
    return f"{separator.join(others)} and {last}"
