"""Hooks of mkdocs: pages outside docs/ become pages of the site, and links to them follow."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# File outside docs/: page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/results/breadth.md": "every-model.md",
    "benchmarks/results/tables.md": "tables.md",
}
_LINK = re.compile(rf"\]\((?:\.\./)?({'|'.join(map(re.escape, PAGES))})(#[\w-]+)?\)")
# A link to a file that is no page of the site keeps its words alone.
_OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)?(?:examples|configs|benchmarks|tests|language|vision|lit_adapters)\b[^)]*\)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links from the place of the file in the repository to the place of the page on the site."""
    if page.file.src_uri in PAGES.values():
        markdown = markdown.replace("](docs/", "](")
    markdown = _indented(markdown)
    markdown = _LINK.sub(lambda link: f"]({PAGES[link[1]]}{link[2] or ''})", markdown)
    return _OUTSIDE.sub(r"\1", markdown)


def _indented(markdown: str) -> str:
    """Write lists as Python-Markdown wants them, where GitHub wants less.

    What belongs to an item is indented by four spaces. A blank line precedes an item after one of several paragraphs.
    """
    lines: list[str] = []
    in_item = in_fence = several = False
    for line in markdown.split("\n"):
        if line.startswith("```"):
            in_fence = not in_fence
        if line.startswith("- ") and not in_fence:
            if several and lines[-1]:
                lines.append("")
            in_item, several = True, False
        elif line and not line.startswith("  "):
            in_item = several = False
        elif line and in_item:
            several = several or not lines[-1]
            line = f"  {line}"
        lines.append(line)
    return "\n".join(lines)
