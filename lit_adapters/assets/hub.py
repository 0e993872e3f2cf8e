"""The model hub, where it may be out of reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

PROBE_SECONDS = 5.0


@contextlib.contextmanager
def short_hub_waits(needed: bool) -> Iterator[None]:
    """Go offline for the duration if the hub does not answer, so that only the local cache is tried.

    huggingface_hub would otherwise retry each of several files for half a minute. It comes with timm and transformers.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not needed or constants.HF_HUB_OFFLINE:
        yield
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # which library's error it is depends on the version of huggingface_hub
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
