"""Questions that end in every way, for processes of their own, which must not import more than this."""

from __future__ import annotations

import os
import time


def answers(setting):
    """A question that is answered."""
    yield {"device": setting.device}


def fails(setting):
    """A question that fails after its first result."""
    yield {"part": 1}
    raise ValueError("no such kernel")


def dies(setting):
    """A question whose process ends on the spot."""
    print("out of luck", flush=True)
    os._exit(3)
    yield {}


def never_ends(setting):
    """A question that takes longer than any budget."""
    time.sleep(3600)
    yield {}
