"""A row of data, where it stands, and how its values are shown and checked."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from typing import Any

from lit_adapters.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
# Breaks the spelling of a control token in a row's text while a template is applied; see `language.data.control`.
MARK = "\ufdd0"


@dataclass(frozen=True)
class Row:
    """One row of a file: its fields by name, and where it stands."""

    values: dict[str, Any]
    origin: str


class _Bounded(reprlib.Repr):
    """Short texts of values of any size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 60


_BOUNDED = _Bounded()


def shown(value: object) -> str:
    """The value as text for a message, at most 60 characters, whatever its size and depth."""
    return repr(value[:60]) if isinstance(value, str) else _BOUNDED.repr(value)[:60]


def names_of(values: dict[str, Any]) -> str:
    """The names of a row's fields for a message; of many, the first twenty."""
    names = [str(name)[:60] for name in list(values)[:20]]
    more = f" and {len(values) - 20} more" if len(values) > 20 else ""
    return ", ".join(names) + more if names else "none"


def check_characters(text: str, what: str) -> None:
    """Check that a text can be written as UTF-8 and tokenised.

    Args:
        text: The text.
        what: Where it stands, for the message.

    Raises:
        DataError: The text holds half of a surrogate pair, or the code point U+FDD0, which is no character.
    """
    if text.isascii():
        return
    if found := _SURROGATE.search(text):
        raise DataError(
            f"{what} holds half of a surrogate pair, U+{ord(found[0]):04X}, at character {found.start() + 1}: an emoji "
            "or another character was cut in two; correct or remove the row"
        )
    if MARK in text:
        raise DataError(f"{what} holds U+FDD0, which is no character; remove it")


def clean(text: str, what: str) -> str:
    r"""The text with line ends `\n`.

    Args:
        text: The text.
        what: Where it stands, for a message.

    Raises:
        DataError: As `check_characters`.
    """
    check_characters(text, what)
    return text.replace("\r\n", "\n")
