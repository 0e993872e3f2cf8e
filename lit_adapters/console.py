"""How a command line ends on bad input: one line on stderr, and exit status 1."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from lit_adapters.errors import AdapterError

# How jsonargparse tells that a value fitted none of several types; the reasons stand between these lines.
_FRAME = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Expected a <class '(NoneType|list)'>|Given value type:"
    r"|Given value: .*[({]"  # a whole section, whose key is named already
)


def one_line(message: object) -> str:
    """A message without line breaks, repetitions and jsonargparse's frame around the reasons."""
    lines = [line.strip().removeprefix("- ") for line in str(message).splitlines()]
    kept = [line for line in dict.fromkeys(lines) if line and not _FRAME.match(line)]
    return re.sub(r"([:;,.]);", r"\1", "; ".join(kept))


def run(main: Callable[[], Any], *errors: type[Exception]) -> None:
    """Run a command line; an `AdapterError`, or one of `errors`, ends it with one line and exit status 1."""
    ended_by: tuple[type[Exception], ...] = (AdapterError, *errors)
    try:
        main()
    except ended_by as error:
        sys.exit(f"error: {one_line(error)}")
