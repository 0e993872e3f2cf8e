"""What a person sees of a command line: one line for an error, and none of Lightning's advertisements."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_adapters import console


def run(main: Callable[[], Any]) -> None:
    """Run a command line; bad input ends it with one line on stderr and exit status 1."""
    quieten()
    console.run(main, MisconfigurationException)


def quieten() -> None:
    """Drop messages that a user of the recipes can do nothing about."""
    # Lightning's own use of torch; and its advice on loaders, which the recipes have weighed.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
    # Said whenever a checkpoint is tested, as each run logs to a folder of its own.
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from")
    chatter = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    chatter.addFilter(lambda record: not record.getMessage().startswith("💡 Tip:"))
