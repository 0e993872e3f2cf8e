"""Agreement among the processes of a training: what stops one of them stops all, or the others would wait for it."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

from lit_adapters.errors import AdapterError

T = TypeVar("T")


def process_count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this process is the one that writes and logs."""
    return process_count() == 1 or distributed.get_rank() == 0


def gather_objects(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; every process calls this.

    Args:
        value: This process's own; picklable.

    Returns:
        One value per process, the same list in each of them.
    """
    values = [value] * process_count()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """The value of the first process, in all of them; every process calls this.

    Args:
        value: This process's own, which counts in the first one only; picklable.
    """
    values = [value]
    if process_count() > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def raise_together(failure: str | None, kind: type[AdapterError] = AdapterError) -> None:
    """Stop all processes if something went wrong in one; every process calls this.

    Args:
        failure: What went wrong in this process, or None.
        kind: The class of the error.

    Raises:
        AdapterError: A process has a failure; the message is that of the first one.
    """
    failures = [text for text in gather_objects(failure) if text is not None]
    if failures:
        raise kind(failures[0])
