"""A page as one HTML file without any request to a network: figures are embedded as SVG."""

from __future__ import annotations

import base64
import io
import re
from html import escape
from importlib.resources import files
from string import Template

from matplotlib import rc_context

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

_WIDE = 8.4  # inches; the page is a little wider, so that text of 9 points is well readable
_NARROW = 3.7
_PHONE = "(max-width: 600px)"
_PATH = re.compile(r' d="[^"]*"')
_LONG_NUMBER = re.compile(r"(\.\d\d)\d+")


def html_page(page: Page) -> str:
    """The page as HTML."""
    template = Template(files("lit_adapters.study.report").joinpath("page.html").read_text(encoding="utf-8"))
    body = "\n".join(_block(block) for block in page.blocks)
    return template.substitute(title=escape(page.title), body=body)


def _block(block: Block) -> str:
    if isinstance(block, Title):
        return f"<h1>{escape(block.text)}</h1>"
    if isinstance(block, Heading):
        return f"<h2>{escape(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f'<p class="small">{_inline(block.text)}</p>' if block.small else f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Points):
        items = "".join(f"\n<li>{_inline(item)}</li>" for item in block.items)
        return f'<ul class="answer">{items}\n</ul>' if block.answer else f"<ul>{items}\n</ul>"
    if isinstance(block, Code):
        return f"<pre>{escape(block.text)}</pre>"
    return _table(block) if isinstance(block, Table) else _picture(block)


def _inline(text: Inline) -> str:
    return "".join(_piece(piece) for piece in pieces(text))


def _piece(piece: str) -> str:
    if isinstance(piece, Strong):
        return f"<strong>{_piece(str(piece))}</strong>"
    if isinstance(piece, InlineCode):
        return f"<code>{escape(piece)}</code>"
    return escape(piece).replace(" = ", "&nbsp;=&nbsp;")  # "n = 8" stays on one line


def _table(table: Table) -> str:
    right = [' class="right"' if column.startswith(">") else "" for column in table.columns]
    head = "".join(
        f"<th{side}>{escape(column.removeprefix('>'))}</th>" for side, column in zip(right, table.columns, strict=True)
    )
    rows = [
        "<tr>" + "".join(f"<td{side}>{_inline(cell)}</td>" for side, cell in zip(right, row, strict=True)) + "</tr>"
        for row in table.rows
    ]
    body = "\n".join(rows)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _picture(picture: Picture) -> str:
    caption = f"\n<figcaption>{_inline(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f'<figure><picture><source media="{_PHONE}" srcset="{_data(picture, _NARROW)}">'
        f'<img src="{_data(picture, _WIDE)}" alt="{escape(picture.alt)}"></picture>{caption}</figure>'
    )


def _data(picture: Picture, width: float) -> str:
    """A figure as the address of embedded SVG; equal figures give equal text."""
    written = io.BytesIO()
    with rc_context({"svg.hashsalt": picture.name}):
        picture.draw(width).savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is more than any screen shows; matplotlib writes six decimals.
    drawing = _PATH.sub(lambda path: _LONG_NUMBER.sub(r"\1", path[0]), written.getvalue().decode())
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.encode()).decode()
