"""The exceptions of the library. Each message names the offending value and the fix."""

from __future__ import annotations

import reprlib


class AdapterError(RuntimeError):
    """Something about adapters is wrong: configuration, targets, state or files."""


class TargetsNotFound(AdapterError):
    """A target specification matched no module. The message lists near misses."""


class AssetError(AdapterError):
    """A ``package://`` asset could not be fetched, failed its checksum, or lacks the requested member."""


class DataError(AdapterError):
    """A data file or folder is missing, torn or badly formed. The message names the file and the row."""


def shown(value: object, width: int = 100) -> str:
    """The `repr` of a value for a message, cut to `width` characters: a value from a file may be huge."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = width
    text = short.repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


class NotFiniteError(AdapterError):
    """A loss, gradient or parameter of a training is not finite."""
