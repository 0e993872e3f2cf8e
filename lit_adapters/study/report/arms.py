"""The sections of a report on single arms: their results, the rates tried, and learning curves."""

from __future__ import annotations

import math
from functools import partial

from lit_adapters.study.report.blocks import Block, Heading, Inline, Paragraph, Picture, Points, Strong, Table
from lit_adapters.study.report.cells import level_cell, places_of_estimates
from lit_adapters.study.report.digits import count, decimals, enumeration, number, rate
from lit_adapters.study.report.panels import curve_names, curves_figure, rates_figure, searches
from lit_adapters.study.report.sentences import items_note
from lit_adapters.study.report.summary import ArmSummary, Summary

_MOST_CURVES = 3


def arm_blocks(summary: Summary) -> list[Block]:
    """The table of arms, and remarks on those whose results are incomplete."""
    metrics = summary.metrics()
    arms = summary.by_parameters()
    front = {arm.key for arm in summary.front()}
    places = [places_of_estimates([a.estimates[m.name] for a in arms if m.name in a.estimates]) for m in metrics]
    heads = [f">{m.title or m.name}{f', {m.unit}' if m.unit else ''}" for m in metrics]
    rows: list[list[Inline]] = []
    for arm in arms:
        title = f"{arm.title} (exploratory)" if arm.exploratory else arm.title
        levels = [level_cell(arm.estimates.get(metric.name), p) for metric, p in zip(metrics, places, strict=True)]
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
    legend = (
        f"Means over {summary.over} and 95% intervals.{items_note(summary)} Bold: on the front. Parameters: trained,"
    )
    legend += " without the head."
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


def rate_blocks(summary: Summary) -> list[Block]:
    """The learning rates tried, and whether the best ones lie inside them."""
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


def curve_blocks(summary: Summary) -> list[Block]:
    """Learning curves of the final runs."""
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
