"""What a person sees of a command line: one line for an error, and none of the libraries' advertisements."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

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


def run(main: Callable[[], Any]) -> None:
    """Run a command line; bad input ends it with one line on stderr and exit status 1."""
    quieten()
    try:
        main()
    except (AdapterError, MisconfigurationException) as error:
        sys.exit(f"error: {one_line(error)}")


def quieten() -> None:
    """Drop messages that a user of the recipes can do nothing about."""
    # Lightning's own use of torch; and its advice on loaders, which the recipes have weighed.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
    # Said whenever a checkpoint is tested, as each run logs to a folder of its own.
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from")
    chatter = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    chatter.addFilter(lambda record: not record.getMessage().startswith("💡 Tip:"))
