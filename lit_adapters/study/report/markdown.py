"""A page as Markdown that GitHub and mkdocs show; figures are PNG files beside it."""

from __future__ import annotations

import io
import re

from lit_adapters.study.report.blocks import (
    Block,
    Code,
    Heading,
    Inline,
    InlineCode,
    Page,
    Paragraph,
    Picture,
    Points,
    Strong,
    Table,
    Title,
    pieces,
)

_WIDE = 8.4  # inches
_DOTS = 150  # an inch
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$])")
_BEGINNING = re.compile(r"^(\s*)([#+-]|\d+(?=[.)]))")  # what would begin a heading, a list or a line


def markdown_page(page: Page) -> str:
    """The page as Markdown."""
    return "\n\n".join(_block(block) for block in page.blocks) + "\n"


def png_files(page: Page) -> dict[str, bytes]:
    """The figures of the page by the names of their files."""
    return {f"{block.name}.png": _png(block) for block in page.blocks if isinstance(block, Picture)}


def _png(picture: Picture) -> bytes:
    written = io.BytesIO()
    picture.draw(_WIDE).savefig(written, format="png", dpi=_DOTS, metadata={"Software": None})
    return written.getvalue()


def _block(block: Block) -> str:
    if isinstance(block, Title):
        return f"# {_escape(block.text)}"
    if isinstance(block, Heading):
        return f"## {_escape(block.text)}"
    if isinstance(block, Paragraph):
        return _line(block.text)
    if isinstance(block, Points):
        return "\n".join(f"- {_line(item)}" for item in block.items)
    if isinstance(block, Code):
        return "\n".join(f"    {line}" for line in block.text.splitlines())
    return _table(block) if isinstance(block, Table) else _picture(block)


def _escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.replace("&", "&amp;").split("\n")))


def _inline(text: Inline) -> str:
    return "".join(_piece(piece) for piece in pieces(text))


def _line(text: Inline) -> str:
    """Text at the beginning of a line."""
    return _BEGINNING.sub(r"\1\\\2", _inline(text))


def _piece(piece: str) -> str:
    if isinstance(piece, Strong):
        return f"**{_escape(piece.strip())}**"  # with a space inside, the stars would be shown
    if isinstance(piece, InlineCode):
        return f"<code>{_escape(piece)}</code>"  # backquotes would need other escapes, in tables too
    return _escape(piece)


def _table(table: Table) -> str:
    head = "| " + " | ".join(_escape(column.removeprefix(">")) for column in table.columns) + " |"
    sides = "|" + "|".join("---:" if column.startswith(">") else "---" for column in table.columns) + "|"
    rows = ["| " + " | ".join(_inline(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join([head, sides, *rows])


def _picture(picture: Picture) -> str:
    image = f"![{_escape(picture.alt)}]({picture.name}.png)"
    return f"{image}\n\n{_line(picture.caption)}" if picture.caption else image
