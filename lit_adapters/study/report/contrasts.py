"""The sections of a report on differences between arms: those named beforehand, and exploratory ones."""

from __future__ import annotations

import math
from functools import partial

from lit_adapters.study.report.blocks import Block, Heading, Inline, Paragraph, Picture, Points, Strong, Table
from lit_adapters.study.report.cells import difference_cell, level_cell, places_of_estimates
from lit_adapters.study.report.digits import number, probability
from lit_adapters.study.report.forest import contrast_name, forest_figure
from lit_adapters.study.report.sentences import items_note, places_of, with_unit
from lit_adapters.study.report.summary import Contrast, Estimate, Summary
from lit_adapters.study.settings import AtEqual, Metric


def contrast_blocks(summary: Summary) -> list[Block]:
    """The contrasts named beforehand: picture, table and what its columns mean."""
    study = summary.study
    if not summary.contrasts:
        return []
    blocks: list[Block] = [Heading("Contrasts named before the first run")]
    measured = [contrast for contrast in summary.contrasts if contrast.comparison is not None]
    if not measured and all(contrast.verdict() == "pending" for contrast in summary.contrasts):
        return [*blocks, Points([contrast_name(contrast) for contrast in summary.contrasts])]
    places = places_of(summary.contrasts)
    if measured:
        draw = partial(forest_figure, measured, study.metric, study.margin, places)
        shade = f" Shaded: within {with_unit(f'{study.margin:g}', study.metric)}." if study.margin is not None else ""
        caption = f"Differences, first arm minus second, with 95% intervals. Blue and bold: found after Holm.{shade}"
        alt = "the difference of each contrast with its interval; the table below has the numbers"
        blocks.append(Picture("contrasts", alt, draw, caption))
    columns = ["first minus second", ">difference", ">95% interval", ">n", ">p", ">p, Holm", ">paired t, Holm"]
    columns += [">p, equivalent, Holm"] if study.margin is not None else []
    columns += [">detectable", ">bootstrap, 95%", "result"]
    blocks.append(Table(columns, [_contrast_row(summary, contrast, places) for contrast in summary.contrasts]))
    blocks.append(Paragraph(_explanation(summary), small=True))
    if study.also and measured:
        words = f"The same contrasts in the other metrics (exploratory, intervals only).{items_note(summary)}"
        blocks.append(Paragraph(words))
        heads = [f">{m.title or m.name} ({m.better} is better)" for m in study.also]
        also = [places_of_estimates([c.also[m.name] for c in measured if m.name in c.also]) for m in study.also]
        rows: list[list[Inline]] = [
            [contrast_name(c), *(difference_cell(c.also.get(m.name), p) for m, p in zip(study.also, also, strict=True))]
            for c in measured
        ]
        blocks.append(Table(["first minus second", *heads], rows))
    if study.at_equal is not None and measured:
        blocks += equal_blocks(study.at_equal, measured)
    return blocks


def equal_blocks(at: AtEqual, contrasts: list[Contrast]) -> list[Block]:
    """Differences where both trainings were equally good: an explanation, a table, and what could not be compared.

    Args:
        at: What is equal there, and what is read.
        contrasts: The compared arms.
    """
    by = at.by.title or at.by.name
    text = (
        f"The same contrasts at equal {by} (exploratory, intervals only): each pair of trainings is read where the"
        f" {by} is the best that both reached, between the validations around it. Intervals are for these very"
        " validation items."
    )
    compared = [(c, c.equal) for c in contrasts if c.equal is not None]
    levels = places_of_estimates([equal.level for _, equal in compared if equal.level is not None])
    places = [
        places_of_estimates([equal.differences[m.name] for _, equal in compared if m.name in equal.differences])
        for m in at.read
    ]
    unit = f", {at.by.unit}" if at.by.unit else ""
    heads = [f">{by}{unit}", *(f">{m.title or m.name} ({m.better} is better)" for m in at.read)]
    rows: list[list[Inline]] = [
        [
            contrast_name(c),
            level_cell(equal.level, levels),
            *(difference_cell(equal.differences.get(m.name), p) for m, p in zip(at.read, places, strict=True)),
        ]
        for c, equal in compared
    ]
    failures: list[Inline] = [f"{contrast_name(c)}: {equal.failure}." for c, equal in compared if equal.failure]
    blocks: list[Block] = [Paragraph(text), Table(["first minus second", *heads], rows)]
    return [*blocks, Points(failures)] if failures else blocks


_RESULTS = {
    "equivalent": "equivalent",
    "unclear": "unclear",
    "unseen": "not seen",
    "pending": "no test",
    "diverged": "diverged",
}


def _contrast_row(summary: Summary, contrast: Contrast, places: int) -> list[Inline]:
    c, margin = contrast.comparison, summary.study.margin
    result: Inline = _RESULTS.get(contrast.verdict(), "")
    if c is not None and contrast.verdict() == "found":
        result = Strong("better" if c.gain > 0 else "worse")
    if c is None:
        empty: list[Inline] = ["-"] * (9 if margin is not None else 8)
        return [contrast_name(contrast), *empty, result]
    row: list[Inline] = [
        contrast_name(contrast),
        number(c.difference, places, sign=True),
        _ends((c.low, c.high), places),
        str(c.n),
        _p(c.p),
        _p(c.p_holm),
        _p(c.t_p_holm),
    ]
    row += [_p(c.p_equivalent_holm)] if margin is not None else []
    return [*row, number(c.detectable, places), _ends(c.bootstrap, places), result]


def _ends(interval: tuple[float, float] | None, places: int) -> str:
    if interval is None or not math.isfinite(interval[0]):
        return "-"
    return f"{number(interval[0], places, sign=True)} to {number(interval[1], places, sign=True)}"


def _p(p: float | None) -> str:
    return "-" if p is None else probability(p).removeprefix("= ")


def _explanation(summary: Summary) -> str:
    study = summary.study
    unit = f"in {study.metric.unit}" if study.metric.unit else "in the metric's unit"
    family = summary.family
    text = (
        f"Differences {unit}, paired over {summary.over}. Interval and p cover the choice of {_chance(summary)}."
        f" Holm: p corrected for {family} contrast{'s' if family > 1 else ''}; a difference is found if it is below"
        " 0.05. Paired t: the same without the chance of test items. Detectable: the difference that one test at 5%,"
        " before Holm, would find with 80% power at this n and spread. Bootstrap: percentiles when sets and items are"
        " resampled; with few sets they are not a 95% interval."
    )
    if study.margin is not None:
        margin = with_unit(f"{study.margin:g}", study.metric)
        text += f" Equivalent: two one-sided tests against {margin}, below 0.05, corrected in the same way."
    return text


def _chance(summary: Summary) -> str:
    """What intervals and tests take as drawn by chance."""
    return f"{summary.over} and test items" if summary.items else f"{summary.over}, not that of test items"


def exploratory_blocks(summary: Summary) -> list[Block]:
    """Differences that were not named beforehand."""
    study = summary.study
    shown = [contrast for contrast in summary.exploratory if contrast.comparison is not None]
    if not shown:
        return []
    metrics: list[Metric] = summary.metrics()
    estimates = [{study.metric.name: _estimate_of(c), **c.also} for c in shown]
    places = [places_of_estimates([e[m.name] for e in estimates if m.name in e]) for m in metrics]
    heads = [f">{m.title or m.name} ({m.better} is better)" for m in metrics]
    cells = [[difference_cell(e.get(m.name), p) for m, p in zip(metrics, places, strict=True)] for e in estimates]
    text = (
        "Not named beforehand, so nothing here is tested. Among many differences some are large by chance: read an"
        f" interval without 0 as a hint for the next study.{items_note(summary)}"
    )
    blocks: list[Block] = [Heading("Exploratory: other differences"), Paragraph(text)]
    reference = next(iter(summary.arms.values()))
    named: list[list[Inline]] = []
    against: list[list[Inline]] = []
    for contrast, row in zip(shown, cells, strict=True):
        if contrast.second is reference:
            against.append([contrast.first.title, *row])
        else:
            named.append([contrast_name(contrast), *row])
    if named:
        blocks.append(Table(["first minus second", *heads], named))
    if against:
        blocks.append(Table([f"minus {reference.title}", *heads], against))
    return blocks


def _estimate_of(contrast: Contrast) -> Estimate:
    c = contrast.comparison
    assert c is not None
    return Estimate(c.difference, c.low, c.high, c.n)
