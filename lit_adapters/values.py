"""Checks of single settings: one error that names the setting, its value and what it must be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lit_adapters.errors import AdapterError, shown

LARGEST = 1e9  # of a factor: beyond it float32 overflows where factors are multiplied


def check_number(name: str, value: Any, low: float = -LARGEST, high: float = LARGEST) -> None:
    """Check that a value is a finite number from `low` to `high`, both included; True and False are no numbers.

    Raises:
        AdapterError: It is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise AdapterError(f"{name} {shown(value)} must be a finite number from {low:g} to {high:g}")


def check_factor(name: str, value: Any) -> None:
    """Check that a value is a finite number other than 0; with a factor of 0 nothing would train.

    Raises:
        AdapterError: It is no number, is 0, or its size is below 1e-9 or above 1e9.
    """
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not 1 / LARGEST <= abs(value) <= LARGEST:
        raise AdapterError(
            f"{name} {shown(value)} must be a finite number other than 0, of a size from {1 / LARGEST:g} to {LARGEST:g}"
        )


def check_whole(name: str, value: Any, low: int = 1, high: int | None = None, otherwise: str = "") -> None:
    """Check that a value is a whole number of type int, `low` or more, and at most `high`.

    Args:
        name: The setting.
        value: Its value.
        low: The smallest valid value.
        high: The largest valid value; None if there is none.
        otherwise: What else is valid, for the message, such as "or None".

    Raises:
        AdapterError: It is no whole number, or outside these bounds.
    """
    valid = isinstance(value, int) and not isinstance(value, bool)
    if not valid or value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise AdapterError(
            f"{name} {shown(value)} must be a whole number, at least {low}{most}{otherwise and ', '}{otherwise}"
        )


def check_probability(name: str, value: Any) -> None:
    """Check that a value lies in [0, 1).

    Raises:
        AdapterError: It is no number, or lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise AdapterError(f"{name} {shown(value)} must lie in [0, 1)")


def check_flag(name: str, value: Any) -> None:
    """Check that a value is True or False.

    Raises:
        AdapterError: It is anything else, also 0 or 1.
    """
    if not isinstance(value, bool):
        raise AdapterError(f"{name} {shown(value)} must be True or False")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check that a value is one of some names.

    Raises:
        AdapterError: It is none of them.
    """
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        listed = " or ".join(map(repr, known)) if len(known) == 2 else f"one of {', '.join(map(repr, known))}"
        raise AdapterError(f"{name} {shown(value)} must be {listed}")


def check_pattern(name: str, value: Any) -> None:
    """Check that a value is a regular expression.

    Raises:
        AdapterError: It cannot be compiled.
    """
    try:
        re.compile(value)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{name} {shown(value)} is not a regular expression: {error}") from error


def list_of_names(name: str, value: Any) -> list[str]:
    """A list of names from any collection of texts. A single text is refused: its letters would become the names.

    Raises:
        AdapterError: It is a single text or no collection, or an item is empty or no text.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise AdapterError(f"{name} {shown(value)} must be a list of names")
    names = list(value)
    for item in names:
        if not isinstance(item, str) or not item:
            raise AdapterError(f"{name} {shown(names)} must hold names only, and {shown(item)} is none")
    return names
