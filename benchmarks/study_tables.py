"""Fill the blocks of README.md and docs/ that show results of the studies in configs/studies.

Between these comments stands what the study has measured; in place of {} are the names of a study and of its arms:

    <!-- study {} contrasts {}-{} {}-{} -->             a line for each pair of arms, first minus second
    <!-- study {} contrasts {}-{} of test/loss -->      the same of another metric of the study
    <!-- study {} detectable {}-{} {}-{} -->           which differences of these pairs one test would have found
    <!-- study {} equal {}-{} {}-{} of val/loss -->   a table of metrics where two arms were equally good
    <!-- study {} arms -->                              the table of arms
    <!-- study {} noise -->                             how much runs differ that differ by rounding alone
    <!-- study {} front -->                             the picture of accuracy against trained parameters
    <!-- study {} front {} -->                          the same with the other arms of another study on the same data

and <!-- /study --> ends each. Pairs that the study did not name beforehand are called exploratory.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from lit_adapters.files.atomic import write_text_atomically
from lit_adapters.learned.pictures import save_figure
from lit_adapters.study.reading import read_study
from lit_adapters.study.records import Results
from lit_adapters.study.report.arms import arm_blocks
from lit_adapters.study.report.blocks import Page, Paragraph, Table
from lit_adapters.study.report.content import noise_blocks
from lit_adapters.study.report.contrasts import equal_blocks
from lit_adapters.study.report.digits import decimals, number, probability
from lit_adapters.study.report.front import front_figure
from lit_adapters.study.report.markdown import markdown_page
from lit_adapters.study.report.sentences import items_note, with_unit
from lit_adapters.study.report.summary import Contrast, Summary, contrast_of, summarise
from lit_adapters.study.settings import Metric

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "configs" / "studies"
_BEGIN = "<!-- study "
_BLOCK = re.compile(rf"({_BEGIN}(\w+) (\w+) ?([^\n]*?) ?-->\n)((?!{_BEGIN}).)*?(<!-- /study -->)", re.DOTALL)
SHARED = ("program", "recipe", "metric", "repeat", "set", "final")  # by studies in one picture
_INCHES = 8.4  # width of a picture


def fill(root: Path) -> None:
    """Write all blocks of the pages below `root`, README.md and docs/*.md, and their pictures.

    Raises:
        AdapterError: A block names a study that has no file.
        SystemExit: A block names something else that is unknown, names a study that has not ended, or has no end.
    """
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        source = page.read_text(encoding="utf-8")
        if source.count(_BEGIN) != len(_BLOCK.findall(source)):
            raise SystemExit(f"error: {page}: a block of a study is misspelt, or has no <!-- /study --> at its end")
        filled = _BLOCK.sub(lambda match, page=page: _filled(match, page), source)
        if filled != source:
            write_text_atomically(page, filled)


def _filled(match: re.Match[str], page: Path) -> str:
    begin, study, kind, rest, _, end = match.groups()
    kinds: dict[str, Callable[[str, str, Path], str]] = {
        "contrasts": _contrasts,
        "detectable": _detectable,
        "equal": _equal,
        "arms": _arms,
        "noise": _noise,
        "front": _front,
    }
    if kind not in kinds:
        raise SystemExit(f"error: {page}: a block of a study shows {', '.join(kinds)}, not {kind!r}")
    return f"{begin}{kinds[kind](study, rest, page)}\n{end}"


@cache
def _results(name: str) -> Results:
    return Results.load(STUDIES / name)


@cache
def _summary(name: str) -> Summary:
    summary = summarise(read_study(STUDIES / f"{name}.yaml"), _results(name), resamples=0)
    done, due = summary.finished(), summary.due()
    if done < due:
        raise SystemExit(f"error: {STUDIES / name} has {done} of {due} final runs; pages show finished studies")
    if summary.changes:
        raise SystemExit(f"error: {STUDIES / name} was changed after its first final run: {'; '.join(summary.changes)}")
    return summary


def _contrasts(name: str, rest: str, page: Path) -> str:
    """A line for each pair, such as "NoRA minus BitFit: -3.2 points (95% interval -4.9 to -1.5, n = 8)"."""
    words, _, metric_name = rest.partition(" of ")
    summary = _summary(name)
    metrics = {metric.name: metric for metric in summary.metrics()}
    metric = metrics.get(metric_name or summary.study.metric.name)
    if metric is None:
        raise SystemExit(f"error: {page}: {name} has the metrics {', '.join(metrics)}, not {metric_name!r}")
    return "\n".join(_line(summary, contrast, metric, named) for contrast, named in _pairs(name, words, page))


def _pairs(name: str, words: str, page: Path) -> list[tuple[Contrast, bool]]:
    """The contrasts of pairs of arms, each with whether the study named it beforehand."""
    summary = _summary(name)
    named = {(c.first.key, c.second.key): c for c in summary.contrasts}
    pairs = [word.split("-") for word in words.split()]
    if any(len(pair) != 2 or not summary.arms.keys() >= {*pair} for pair in pairs):
        raise SystemExit(f"error: {page}: {name} has the arms {', '.join(summary.arms)}; give pairs such as a-b")
    found = []
    for first, second in pairs:
        contrast = named.get((first, second))
        other = contrast or contrast_of(summary.study, _results(name), summary.arms[first], summary.arms[second])
        found.append((other, contrast is not None))
    return found


def _detectable(name: str, rest: str, page: Path) -> str:
    """A sentence on the smallest and the largest of the detectable differences of some pairs."""
    metric = _summary(name).study.metric
    measured = [c for c, _ in _pairs(name, rest, page) if c.comparison is not None]
    sizes = sorted((c.comparison.detectable, c.first.title) for c in measured if c.comparison is not None)
    sizes = [(size, title) for size, title in sizes if math.isfinite(size)]
    if not sizes:
        raise SystemExit(f"error: {page}: {name} has no pair of arms with a difference that a test could find")
    shown = [f"{with_unit(number(size, decimals([size])), metric)} ({title})" for size, title in (sizes[0], sizes[-1])]
    return (
        "The smallest difference that one test, before Holm's correction, would have found with 80% power ranges, by "
        f"arm, from {shown[0]} to {shown[1]}."
    )


def _equal(name: str, rest: str, page: Path) -> str:
    """The report's table of a few metrics at equal accuracy."""
    words, _, metrics = rest.partition(" of ")
    at = _summary(name).study.at_equal
    known = {} if at is None else {metric.name: metric for metric in at.read}
    unknown = [metric for metric in metrics.split() if metric not in known]
    if at is None or unknown or not metrics:
        raise SystemExit(f"error: {page}: {name} compares at equal {', '.join(known) or 'nothing'}, not {unknown}")
    chosen = dataclasses.replace(at, read=[known[metric] for metric in metrics.split()])
    shown = Page("")
    shown.add(*equal_blocks(chosen, [contrast for contrast, _ in _pairs(name, words, page)]))
    return markdown_page(shown).strip()


def _line(summary: Summary, contrast: Contrast, metric: Metric, named: bool) -> str:
    head = f"- {contrast.first.title} minus {contrast.second.title}: "
    main, c = metric is summary.study.metric, contrast.comparison
    if c is None or not (main or metric.name in contrast.also):
        return f"{head}{'a run diverged' if contrast.verdict() == 'diverged' else 'not measured'}"
    low, high, difference = (c.low, c.high, c.difference) if main else _of(contrast, metric)
    places = decimals([(high - low) / 2])
    text = f"{head}**{with_unit(number(difference, places, sign=True), metric)}** (95% interval"
    text += f" {number(low, places, sign=True)} to {number(high, places, sign=True)}, n = {c.n} {summary.over}"
    if metric in summary.without_items():
        text += ", for these very test items"
    if not (named and main):
        return f"{text}, exploratory)"
    text += f", p {probability(c.p if c.p_holm is None else c.p_holm)} after Holm"
    if contrast.equivalent():
        text += f", equivalent within {with_unit(f'{c.margin:g}', metric)}"
    return f"{text})"


def _of(contrast: Contrast, metric: Metric) -> tuple[float, float, float]:
    estimate = contrast.also[metric.name]
    return estimate.low, estimate.high, estimate.mean


def _arms(name: str, rest: str, page: Path) -> str:
    summary, shown = _summary(name), Page("")
    shown.add(next(block for block in arm_blocks(summary) if isinstance(block, Table)))
    if note := items_note(summary).strip():
        shown.add(Paragraph(note))
    return markdown_page(shown).strip()


def _noise(name: str, rest: str, page: Path) -> str:
    shown = Page("")
    shown.add(*noise_blocks(_summary(name)))
    return markdown_page(shown).strip()


def _front(name: str, rest: str, page: Path) -> str:
    root = page.parent if page.name == "README.md" else page.parent.parent
    summary = _summary(name)
    for other in map(_summary, rest.split()):
        differ = [part for part in SHARED if getattr(summary.study, part) != getattr(other.study, part)]
        if differ:
            raise SystemExit(
                f"error: {page}: {name} and {rest} differ in {', '.join(differ)}, so no picture shows both"
            )
        summary = dataclasses.replace(summary, arms={**other.arms, **summary.arms})
    picture = root / "docs" / f"{name}-front.png"
    save_figure(front_figure(summary, _INCHES), picture, dpi=110)
    where = "docs/" if page.name == "README.md" else ""
    metric = summary.study.metric
    return f"![{metric.title or metric.name} against trained parameters]({where}{picture.name})"
