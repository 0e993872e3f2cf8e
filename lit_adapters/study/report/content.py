"""The page of a study: what stands on it, in which order."""

from __future__ import annotations

import json
import math
import shlex
from functools import partial
from typing import Any

from lit_adapters.study.records import Record
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
)
from lit_adapters.study.report.digits import count, decimals, duration, enumeration, number, probability, rate
from lit_adapters.study.report.forest import contrast_name, forest_figure
from lit_adapters.study.report.front import front_figure
from lit_adapters.study.report.panels import curve_names, curves_figure, rates_figure, searches
from lit_adapters.study.report.sentences import answer, places_of, with_unit
from lit_adapters.study.report.summary import ArmSummary, Contrast, Estimate, Summary
from lit_adapters.study.settings import Metric

_MOST_CURVES = 3
_FEW_SETS = 5  # below, intervals are several times as wide as with many


def study_page(summary: Summary) -> Page:
    """The page of a finished or unfinished study."""
    study = summary.study
    page = Page(study.question)
    page.add(Title(study.question), *_state(summary), Points(answer(summary), answer=True), _protocol(summary))
    page.add(*_front(summary), *_noise(summary), *_contrasts(summary), *_arms(summary), *_rates(summary))
    page.add(*_curves(summary), *_exploratory(summary), *_limits(summary), *_costs(summary))
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


def _noise(summary: Summary) -> list[Block]:
    floor, metric = summary.noise_floor, summary.study.metric
    if floor is None:
        return []
    places = decimals([floor.rms])
    rms, largest = with_unit(number(floor.rms, places), metric), number(floor.largest, places)
    pairs = f"{floor.n} pair{'s' if floor.n > 1 else ''} of runs"
    text = f" results of runs of {floor.title} that differ by rounding alone differ by {rms} (root mean square of"
    text += f" {pairs}, largest {largest}). The intervals below include this. A smaller difference of two single runs"
    text += " may be rounding."
    if not floor.n:
        text = f" no pair of runs of {floor.title} could be compared."
    if floor.diverged:
        text += f" {floor.diverged} more pair{'s' if floor.diverged > 1 else ''} diverged."
    return [Paragraph([Strong("Noise floor:"), text])]


def _contrasts(summary: Summary) -> list[Block]:
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
    columns = ["first minus second", ">difference", ">95% interval", ">n", ">p", ">p, Holm"]
    columns += [">p, equivalent"] if study.margin is not None else []
    columns += [">detectable", ">bootstrap, 95%", "result"]
    blocks.append(Table(columns, [_contrast_row(summary, contrast, places) for contrast in summary.contrasts]))
    blocks.append(Paragraph(_explanation(summary), small=True))
    if study.also and measured:
        blocks.append(Paragraph("The same contrasts in the other metrics (exploratory, intervals only):"))
        heads = [f">{m.title or m.name} ({m.better} is better)" for m in study.also]
        also = [_places_of_estimates([c.also[m.name] for c in measured if m.name in c.also]) for m in study.also]
        rows: list[list[Inline]] = [
            [contrast_name(c), *(_difference(c.also.get(m.name), p) for m, p in zip(study.also, also, strict=True))]
            for c in measured
        ]
        blocks.append(Table(["first minus second", *heads], rows))
    return blocks


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
        empty: list[Inline] = ["-"] * (8 if margin is not None else 7)
        return [contrast_name(contrast), *empty, result]
    row: list[Inline] = [
        contrast_name(contrast),
        number(c.difference, places, sign=True),
        _ends((c.low, c.high), places),
        str(c.n),
        _p(c.p),
        _p(c.p_holm),
    ]
    row += [_p(c.p_equivalent)] if margin is not None else []
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
    family = len(summary.contrasts)
    text = (
        f"Differences {unit}, paired over {summary.over}. Interval and p cover the choice of {_chance(summary)}."
        f" Holm: p corrected for {family} contrast{'s' if family > 1 else ''}; a difference is found if it is below"
        " 0.05. Detectable: the difference that one test at 5%, before Holm, would find with 80% power at this n and"
        " spread. Bootstrap: percentiles when sets and items are resampled; with few sets they are not a 95% interval."
    )
    if study.margin is not None:
        margin = with_unit(f"{study.margin:g}", study.metric)
        text += f" Equivalent: two one-sided tests against {margin}, below 0.05, not corrected."
    return text


def _chance(summary: Summary) -> str:
    """What intervals and tests take as drawn by chance."""
    return f"{summary.over} and test items" if summary.items else f"{summary.over}, not that of test items"


def _places_of_estimates(estimates: list[Estimate]) -> int:
    return decimals(estimate.half_width() for estimate in estimates)


def _difference(estimate: Estimate | None, places: int) -> str:
    if estimate is None:
        return "-"
    text = number(estimate.mean, places, sign=True)
    if math.isfinite(estimate.low):
        text += f" ({number(estimate.low, places, sign=True)} to {number(estimate.high, places, sign=True)})"
    return text


def _level(estimate: Estimate | None, places: int) -> str:
    if estimate is None:
        return "-"
    text = number(estimate.mean, places)
    if math.isfinite(estimate.low):
        text += f" ({number(estimate.low, places)} to {number(estimate.high, places)})"
    return text


def _by_parameters(summary: Summary) -> list[ArmSummary]:
    """Arms as the picture has them from left to right; those without a run last."""
    return sorted(summary.arms.values(), key=lambda arm: math.inf if arm.parameters is None else arm.parameters)


def _arms(summary: Summary) -> list[Block]:
    metrics = summary.metrics()
    arms = _by_parameters(summary)
    front = {arm.key for arm in summary.front()}
    places = [_places_of_estimates([a.estimates[m.name] for a in arms if m.name in a.estimates]) for m in metrics]
    heads = [f">{m.title or m.name}{f', {m.unit}' if m.unit else ''}" for m in metrics]
    rows: list[list[Inline]] = []
    for arm in arms:
        title = f"{arm.title} (exploratory)" if arm.exploratory else arm.title
        levels = [_level(arm.estimates.get(metric.name), p) for metric, p in zip(metrics, places, strict=True)]
        rows.append(
            [
                Strong(title) if arm.key in front else title,
                "-" if arm.parameters is None else count(arm.parameters),
                *(["diverged", *levels[1:]] if arm.diverged() else levels),
                _rates_text(arm),
                str(len(arm.finals)) if arm.complete() else f"{len(arm.finals)} of {arm.due}",
            ]
        )
    columns = ["arm", ">parameters", *heads, "rates", ">runs"]
    legend = f"Means over {summary.over} and 95% intervals. Bold: on the front. Parameters: trained, without the head."
    blocks: list[Block] = [Heading("Arms"), Table(columns, rows), Paragraph(legend, small=True)]
    remarks = _remarks(summary, arms)
    return [*blocks, Points(remarks)] if remarks else blocks


def _rates_text(arm: ArmSummary) -> str:
    if arm.failure:
        return "all diverged"
    if arm.chosen is None or arm.chosen.rates is None:
        return "search not ended"
    return ", ".join(f"{group} {rate(value)}" for group, value in arm.chosen.rates.items()) or "the recipe's"


def _remarks(summary: Summary, arms: list[ArmSummary]) -> list[Inline]:
    remarks: list[Inline] = []
    for arm in arms:
        if arm.failure:
            remarks.append([Strong(arm.title), f": {arm.failure}."])
        elif arm.diverged():
            remarks.append([Strong(arm.title), f": {_divergence(summary, arm)}"])
        elif arm.finals and summary.study.metric.name not in arm.estimates:
            remarks.append([Strong(arm.title), f": its runs have no {summary.study.metric.name}."])
    absent = [arm.title for arm in arms if not arm.finals and not arm.failure]
    if absent:
        remarks.append([Strong("Not run yet"), f" (0 of {arms[0].due} final runs): {'; '.join(absent)}."])
    single = [arm.title for arm in arms if any(estimate.n == 1 for estimate in arm.estimates.values())]
    if single:
        remarks.append(f"One {summary.over.removesuffix('s')} only, so no interval: {enumeration(single)}.")
    name = summary.study.metric.name
    levels = [(arm.title, arm.estimates[name]) for arm in arms if name in arm.estimates]
    equal = [title for title, level in levels if level.n > 1 and not math.isfinite(level.low)]
    if equal:
        remarks.append(f"The same value on all {summary.over}, so no interval: {enumeration(equal)}.")
    return remarks


def _divergence(summary: Summary, arm: ArmSummary) -> str:
    metric = summary.study.metric
    bad = arm.diverged()
    where = enumeration([f"set {number_of_set}, seed {seed}" for number_of_set, seed in bad])
    reason = next((arm.finals[key].message for key in bad if arm.finals[key].message), "")
    text = f"{len(bad)} of {len(arm.finals)} final runs diverged ({where}{f': {reason}' if reason else ''}), so it has"
    text += " no mean."
    rest = [
        r.metrics[metric.name] * metric.scale
        for key, r in arm.finals.items()
        if key not in bad and metric.name in r.metrics
    ]
    if rest:
        values = enumeration([number(value, decimals([abs(value) / 50])) for value in rest])
        text += f" The other runs have {values}."
    return text


def _rates(summary: Summary) -> list[Block]:
    search = summary.study.search
    shown = searches(summary)
    if search is None or not shown:
        return []
    caption: Inline = (
        f"Mean of {search.metric.name} over {len(search.sets)} tuning set{'s' if len(search.sets) > 1 else ''}. Blue:"
        " the chosen rate. Arrows: far worse than the range shown. Red crosses: diverged."
    )
    alt = "the search metric of each arm against the learning rate; the chosen rates are in the table of arms"
    blocks: list[Block] = [Heading("Learning rates tried")]
    blocks.append(Picture("rates", alt, partial(rates_figure, summary), caption))
    edges: list[Inline] = []
    for arm in summary.arms.values():
        for group in arm.chosen.edge if arm.chosen is not None else []:
            tried = sorted(t.rates[group] for t in (arm.chosen.tried if arm.chosen else []) if t.group == group)
            best = (arm.chosen.rates or {}).get(group) if arm.chosen else None
            side = "highest" if best == tried[-1] else "lowest"
            edges.append(
                [Strong(arm.title), f": the best rate of {group} is the {side} one tried; a better one may lie beyond."]
            )
    if edges:
        blocks.append(Points(edges))
    elif all(arm.chosen is not None and arm.chosen.rates is not None for arm in summary.arms.values()):
        blocks.append(Paragraph("Every chosen rate lies inside the rates tried."))
    return blocks


def _curves(summary: Summary) -> list[Block]:
    names = curve_names(summary)
    if not names:
        return []
    blocks: list[Block] = [Heading("Learning curves")]
    for index, name in enumerate(names[:_MOST_CURVES]):
        caption = (
            f"{name} of each final run (thin), their mean (blue), and the other arms' means (grey)."
            if not index
            else name
        )
        file = "curves-" + "".join(letter if letter.isalnum() else "-" for letter in name)
        draw = partial(curves_figure, summary, name)
        blocks.append(Picture(file, f"{name} during training, one panel an arm", draw, caption))
    if len(names) > _MOST_CURVES:
        blocks.append(Paragraph(f"Recorded too: {enumeration(names[_MOST_CURVES:])}.", small=True))
    return blocks


def _exploratory(summary: Summary) -> list[Block]:
    study = summary.study
    shown = [contrast for contrast in summary.exploratory if contrast.comparison is not None]
    if not shown:
        return []
    metrics: list[Metric] = summary.metrics()
    estimates = [{study.metric.name: _estimate_of(c), **c.also} for c in shown]
    places = [_places_of_estimates([e[m.name] for e in estimates if m.name in e]) for m in metrics]
    heads = [f">{m.title or m.name} ({m.better} is better)" for m in metrics]
    cells = [[_difference(e.get(m.name), p) for m, p in zip(metrics, places, strict=True)] for e in estimates]
    text = (
        "Not named beforehand, so nothing here is tested. Among many differences some are large by chance: read an"
        " interval without 0 as a hint for the next study."
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


def _costs(summary: Summary) -> list[Block]:
    study = summary.study
    blocks: list[Block] = [Heading("Costs, versions, and how to run it again")]
    stages = {"search": "search", "final": "final", "noise": "noise floor"}
    rows: list[list[Inline]] = []
    for stage, words in stages.items():
        of_stage = [record for record in summary.records if record.stage == stage]
        if of_stage:
            rows.append([words, *_cost(of_stage)])
    if len(rows) > 1:
        rows.append([Strong("all"), *_cost(summary.records)])
    if rows:
        blocks.append(Table(["runs", ">number", ">diverged", ">time"], rows))
    costs: list[list[Inline]] = [
        [
            arm.title,
            "-" if arm.chosen is None else str(arm.chosen.runs),
            str(len(arm.finals)),
            duration(arm.seconds) if math.isfinite(arm.seconds) else "-",
            f"{arm.memory:,.0f} MiB" if math.isfinite(arm.memory) else "-",
        ]
        for arm in _by_parameters(summary)
        if any(record.arm == arm.key for record in summary.records)
    ]
    if rows:
        blocks.append(Table(["arm", ">search runs", ">final runs", ">time of a final run", ">peak memory"], costs))
    environment = _environment(summary.records)
    if environment:
        blocks.append(Paragraph("; ".join(environment) + ".", small=True))
    places = "".join(f" --path {shlex.quote(key)}=DIR" for key in study.paths)
    blocks.append(Code(f"lit-adapters study run {shlex.quote(study.path.name)}{places}"))
    file: Inline = [
        "Study file ",
        InlineCode(study.path.name),
        ", SHA-256 begins with ",
        InlineCode(study.digest()),
        ".",
    ]
    blocks.append(Paragraph(file, small=True))
    return blocks


def _cost(records: list[Record]) -> list[Inline]:
    seconds = sum(record.seconds.get("total", 0.0) for record in records)
    diverged = sum(record.status == "diverged" for record in records)
    return [str(len(records)), str(diverged), duration(seconds)]


def _environment(records: list[Record]) -> list[str]:
    """What runs ran on: one value, or the first and the last of several."""
    values: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.environment.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    texts = []
    for name, known in values.items():
        ordered = sorted({True: "yes", False: "no"}[v] if isinstance(v, bool) else str(v) for v in known)
        shown = ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
        texts.append(f"{name.replace('_', ' ')} {shown}")
    return texts
