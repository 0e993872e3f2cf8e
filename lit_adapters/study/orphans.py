"""End the process of a run whose study has ended: the next `study run` would start the same run in the same folder."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

_INTERVAL = 0.2  # seconds


def end_with(alive: Callable[[], bool]) -> None:
    """End this process as soon as a condition no longer holds; a thread checks it.

    Args:
        alive: Returns whether the study still waits for the process.
    """
    if not alive():
        _end()
    threading.Thread(target=_watch, args=(alive,), name="end_with", daemon=True).start()


def _watch(alive: Callable[[], bool]) -> None:
    while alive():
        time.sleep(_INTERVAL)
    _end()


def _end() -> None:
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)  # with the processes that load data
    os._exit(1)
