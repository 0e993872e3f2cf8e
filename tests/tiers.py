"""Which cases of a test run in the fast tier."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast_only(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases for `parametrize`: those that are not in `fast` are marked slow."""
    marked = [
        case if case in fast else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
    assert sum(case in fast for case in cases) == len(fast), "a fast case is no case"
    return marked
