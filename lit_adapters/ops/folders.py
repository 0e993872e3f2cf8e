"""The folder for files that can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder `$LIT_ADAPTERS_CACHE`, or `~/.cache/lit_adapters` if that is not set; it may not exist yet.

    Raises:
        RuntimeError: The variable is not set, and there is no home directory.
    """
    return Path(os.environ.get("LIT_ADAPTERS_CACHE") or "~/.cache/lit_adapters").expanduser()
