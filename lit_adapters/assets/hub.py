"""Use the model hub on machines that may not reach it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

PROBE_SECONDS = 5.0


@contextlib.contextmanager
def short_hub_waits(needed: bool) -> Iterator[None]:
    """Inside the block, use only the local cache if the hub does not answer within `PROBE_SECONDS`.

    Otherwise huggingface_hub, which comes with timm and transformers, would retry each file for half a minute.

    Args:
        needed: Whether to ask the hub at all.
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
