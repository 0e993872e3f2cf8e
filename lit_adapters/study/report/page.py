"""Write the report of a study."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lit_adapters.files.atomic import write_together
from lit_adapters.study.records import Results
from lit_adapters.study.report.content import study_page
from lit_adapters.study.report.html import html_page
from lit_adapters.study.report.markdown import markdown_page, png_files
from lit_adapters.study.report.summary import summarise
from lit_adapters.study.settings import Study


def write_report(study: Study, results: Results, folder: Path) -> Path:
    """Write `report.html`, `report.md` and its figures, such as `front.png`; the study need not have ended.

    Args:
        study: The study.
        results: Its finished runs.
        folder: Where to; created if missing.

    Returns:
        The HTML file.

    Raises:
        AdapterError: Runs that are compared have different test items, or a file cannot be written.
    """
    page = study_page(summarise(study, results))
    contents = {"report.html": html_page(page).encode(), "report.md": markdown_page(page).encode(), **png_files(page)}
    write_together(folder, {name: partial(_write, content) for name, content in contents.items()})
    return folder / "report.html"


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)
