"""What a page consists of. Two renderers write the same list of blocks as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from matplotlib.figure import Figure


class Strong(str):
    """Words that are set in bold."""

    __slots__ = ()


class InlineCode(str):
    """Words that are set as code."""

    __slots__ = ()


# Text, or its pieces one after the other. Renderers escape every piece.
Inline: TypeAlias = str | Sequence[str]


@dataclass(frozen=True)
class Title:
    """The head of the page."""

    text: str


@dataclass(frozen=True)
class Heading:
    """The head of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `small` for remarks that a reader may skip."""

    text: Inline
    small: bool = False


@dataclass(frozen=True)
class Points:
    """A list of sentences; `answer` for those that the whole page is about."""

    items: list[Inline]
    answer: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: The headings. One that begins with ">" is aligned on the right, without that sign.
        rows: The cells of each row, one for each column.
    """

    columns: list[str]
    rows: list[list[Inline]]


@dataclass(frozen=True)
class Code:
    """Lines for a terminal."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A figure, drawn for wide pages and for phones.

    Attributes:
        name: Of its file, without suffix.
        alt: What it shows, for those who cannot see it.
        draw: Makes the figure, given its width in inches.
        caption: Text below it.
    """

    name: str
    alt: str
    draw: Callable[[float], Figure]
    caption: Inline = ""


Block: TypeAlias = Title | Heading | Paragraph | Points | Table | Code | Picture


@dataclass
class Page:
    """A page, in order.

    Attributes:
        blocks: What it consists of.
        title: Of the browser's window.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block) -> None:
        """Add blocks at the end."""
        self.blocks.extend(blocks)


def pieces(text: Inline) -> Sequence[str]:
    """The pieces of a text."""
    return [text] if isinstance(text, str) else text
