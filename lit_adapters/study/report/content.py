"""The page of a study: what stands on it, in which order."""

from __future__ import annotations

import json
from functools import partial

from lit_adapters.study.report.arms import arm_blocks, curve_blocks, rate_blocks
from lit_adapters.study.report.blocks import (
    Block,
    Heading,
    Inline,
    InlineCode,
    Page,
    Paragraph,
    Picture,
    Points,
    Strong,
    Title,
)
from lit_adapters.study.report.contrasts import contrast_blocks, exploratory_blocks
from lit_adapters.study.report.costs import cost_blocks
from lit_adapters.study.report.digits import decimals, enumeration, number
from lit_adapters.study.report.front import front_figure
from lit_adapters.study.report.sentences import answer, with_unit
from lit_adapters.study.report.summary import Summary

_FEW_SETS = 5  # below, intervals are several times as wide as with many


def study_page(summary: Summary) -> Page:
    """The page of a finished or unfinished study."""
    study = summary.study
    page = Page(study.question)
    page.add(Title(study.question), *_state(summary), Points(answer(summary), answer=True), _protocol(summary))
    page.add(
        *_front(summary), *noise_blocks(summary), *contrast_blocks(summary), *arm_blocks(summary), *rate_blocks(summary)
    )
    page.add(*curve_blocks(summary), *exploratory_blocks(summary), *_limits(summary), *cost_blocks(summary))
    return page


def _state(summary: Summary) -> list[Block]:
    done, due = summary.finished(), summary.due()
    blocks: list[Block] = []
    if summary.changes:
        changed = f" {'; '.join(summary.changes)}. Contrasts and tests are not what was named beforehand."
        blocks.append(Paragraph([Strong("Changed after the first final run:"), changed]))
    if done == due:
        return blocks
    words = (
        f" {done} of {due} final runs have finished. Numbers will change; p values of a study that is looked at early"
    )
    return [*blocks, Paragraph([Strong("Unfinished:"), f"{words} are too small."])]


def _protocol(summary: Summary) -> Paragraph:
    study, repeat = summary.study, summary.study.repeat
    metric = study.metric
    unit = f" in {metric.unit}" if metric.unit else ""
    sets, seeds = len(repeat.sets), len(repeat.seeds)
    runs = f"{sets} training set{'s' if sets > 1 else ''}, {seeds} seed{'s' if seeds > 1 else ''} on each"
    rates = ""
    if study.search is not None:
        tuning = len(study.search.sets)
        rates = f" Learning rates were chosen by {study.search.metric.name} on {tuning} further training set"
        rates += f"{'s' if tuning > 1 else ''}."
    text = f"Metric: {metric.title or metric.name}{unit}, {metric.better} is better. Each arm: {runs}.{rates}"
    return Paragraph(text, small=True)


def _front(summary: Summary) -> list[Block]:
    metric = summary.study.metric
    measured = [arm for arm in summary.arms.values() if metric.name in arm.estimates and arm.parameters is not None]
    if not measured:
        return []
    front = enumeration([arm.title for arm in summary.front()])
    caption = (
        f"Means and 95% intervals. Blue: no arm with as few or fewer trained parameters has a better mean ({front})."
    )
    if any(not arm.complete() for arm in measured):
        caption += " Hollow: some final runs are missing."
    absent = [arm.title for arm in summary.arms.values() if arm not in measured]
    if absent:
        caption += f" Not shown, as runs are missing or diverged: {enumeration(absent)}."
    alt = (
        f"{metric.title or metric.name} of {len(measured)} arms against their trained parameters; best by size: {front}"
    )
    return [Picture("front", alt, partial(front_figure, summary), caption)]


def noise_blocks(summary: Summary) -> list[Block]:
    """The noise floor in a sentence; nothing if the study has none."""
    floor, metric = summary.noise_floor, summary.study.metric
    if floor is None:
        return []
    places = decimals([floor.rms])
    rms, largest = with_unit(number(floor.rms, places), metric), number(floor.largest, places)
    pairs = f"{floor.n} pair{'s' if floor.n > 1 else ''} of runs"
    text = f" runs of {floor.title} with other rounding alone differ by {rms} (root mean square of {pairs}, largest"
    text += f" {largest}). The intervals of the contrasts include this. A smaller difference of two single runs may be"
    text += " rounding."
    if floor.n and not floor.largest:
        text = f" {pairs} of {floor.title} ended equal, so the change of noise_floor does not seem to affect rounding"
        text += " here, and no floor was measured. Give another change, such as another implementation of attention."
    if not floor.n:
        text = f" no pair of runs of {floor.title} could be compared."
    if floor.diverged:
        text += f" {floor.diverged} more pair{'s' if floor.diverged > 1 else ''} diverged."
    return [Paragraph([Strong("Noise floor:"), text])]


def _limits(summary: Summary) -> list[Block]:
    study, repeat = summary.study, summary.study.repeat
    limits: list[Inline] = list(study.notes)
    if summary.over == "seeds":
        limits.append("There is one training set: intervals and tests hold for it, not for other training sets.")
    n = len(repeat.sets) if summary.over == "training sets" else len(repeat.seeds)
    if 1 < n < _FEW_SETS:
        limits.append(f"With n = {n} intervals are wide, and the detectable differences are rough.")
    if any(arm.exploratory for arm in summary.arms.values()):
        late = enumeration([arm.title for arm in summary.arms.values() if arm.exploratory])
        limits.append(f"Added after results of other arms were known, so exploratory: {late}.")
    limits += _file_limits(summary)
    limits.append("Front and learning curves compare means; neighbours may differ by chance.")
    return [Heading("Limits"), Points(limits)]


def _file_limits(summary: Summary) -> list[Inline]:
    """What a reader should know of the file: its earlier versions, and where runs differ by stage."""
    study = summary.study
    limits: list[Inline] = []
    if summary.unused:
        finals = sum(record.stage == "final" for record in summary.unused)
        limits.append(
            f"{len(summary.unused)} finished runs, {finals} of them final, are of an earlier version of the study's"
            " file, and are not used."
        )
    stages = [("Search runs", study.search.set if study.search is not None else {}), ("Final runs", study.final)]
    for name, overrides in stages:
        if overrides:
            limits.append([f"{name} alone have ", InlineCode(json.dumps(overrides, default=str)), "."])
    metric = study.metric
    if metric.items is not None and not summary.items and summary.finished():
        limits.append(
            f"Intervals leave out the chance of test items: some runs have no values {metric.items!r} whose mean is"
            f" {metric.name}."
        )
    return limits
