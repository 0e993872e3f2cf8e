"""The answers of a study as sentences that follow from its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_adapters.study.report.blocks import Inline, Strong
from lit_adapters.study.report.digits import decimals, enumeration, number, probability
from lit_adapters.study.report.summary import ArmSummary, Contrast, Summary
from lit_adapters.study.settings import Metric
from lit_adapters.study.statistics import Comparison

_MOST = 5  # sentences of an answer
_ORDER = ("found", "equivalent", "unclear", "unseen", "diverged", "pending")


def places_of(contrasts: Sequence[Contrast]) -> int:
    """Decimals of differences: enough that no interval without 0 seems to hold it."""
    comparisons = [c.comparison for c in contrasts if c.comparison is not None]
    places = decimals((c.high - c.low) / 2 for c in comparisons)
    ends = [end for c in comparisons if c.low * c.high > 0 for end in (c.low, c.high)]
    for more in range(3):
        if all(round(end, places + more) != 0 for end in ends):
            return places + more
    return places


def with_unit(text: str, metric: Metric) -> str:
    """A number and its unit; "1 point" without the plural's s."""
    unit = metric.unit.removesuffix("s") if text == "1" else metric.unit
    return f"{text} {unit}".rstrip()


def items_note(summary: Summary) -> str:
    """Which metrics have intervals that leave out the chance of test items, with a space before; or nothing."""
    without = [metric.title or metric.name for metric in summary.without_items()]
    if not without:
        return ""
    others = ", those of other metrics for new ones" if summary.with_items else ""
    return f" The intervals of {enumeration(without)} hold for these very test items{others}."


def answer(summary: Summary) -> list[Inline]:
    """At most five sentences: one a contrast; contrasts of one verdict share a sentence where there are more."""
    if not summary.finished():
        return [[Strong("No final run has finished yet"), f" (0 of {summary.due()})."]]
    if not summary.contrasts:
        return [
            [Strong("No contrast was named beforehand"), ", so nothing is tested: everything below is exploratory."],
            *_best(summary),
        ]
    by_verdict: dict[str, list[Contrast]] = {verdict: [] for verdict in _ORDER}
    for contrast in summary.contrasts:
        by_verdict[contrast.verdict()].append(contrast)
    shared: set[str] = set()
    # What was found keeps sentences of its own for longest.
    several = [verdict for verdict in reversed(_ORDER) if len(by_verdict[verdict]) > 1]
    while sum(1 if verdict in shared else len(cs) for verdict, cs in by_verdict.items()) > _MOST and several:
        shared.add(several.pop(0))
    if all(by_verdict.values()):  # six verdicts, and each has a sentence already
        by_verdict["pending"] = by_verdict.pop("diverged") + by_verdict["pending"]
        shared.add("pending")
    sentences: list[Inline] = []
    for verdict, contrasts in by_verdict.items():
        if verdict in shared:
            sentences.append(_shared(summary, verdict, contrasts))
        else:
            sentences += [_single(summary, verdict, contrast) for contrast in contrasts]
    return sentences


def _best(summary: Summary) -> list[Inline]:
    metric = summary.study.metric
    measured = [arm for arm in summary.arms.values() if metric.name in arm.estimates]
    if not measured:
        return []
    best = max(measured, key=lambda arm: metric.sign() * arm.estimates[metric.name].mean)
    estimate = best.estimates[metric.name]
    level = with_unit(number(estimate.mean, decimals([estimate.half_width()])), metric)
    side = "highest" if metric.better == "higher" else "lowest"
    return [f"{best.title} has the {side} mean, {level} (n = {estimate.n} {_counted(summary, estimate.n)})."]


def _counted(summary: Summary, n: int) -> str:
    return summary.over.removesuffix("s") if n == 1 else summary.over


def _n(summary: Summary, comparison: Comparison) -> str:
    study = summary.study
    due = len(study.repeat.sets) if summary.over == "training sets" else len(study.repeat.seeds)
    so_far = f" of {due}" if comparison.n < due else ""
    return f"n = {comparison.n}{so_far} {_counted(summary, due)}"


def _details(summary: Summary, c: Comparison, places: int) -> str:
    return f"95% interval {number(c.low, places)} to {number(c.high, places)}, {_n(summary, c)}"


def _p_after_holm(c: Comparison) -> str:
    return f"p {probability(c.p if c.p_holm is None else c.p_holm)} after Holm"


def side(contrast: Contrast, metric: Metric, places: int) -> str:
    """The difference in words: "NoRA is 1.3 points above BitFit"; says which side is better where lower is."""
    assert contrast.comparison is not None
    difference = contrast.comparison.difference
    where = "above" if difference > 0 else "below"
    size = with_unit(number(abs(difference), places), metric)
    words = f"{contrast.first.title} is {size} {where} {contrast.second.title}"
    if metric.better == "lower":
        words += ", which is better" if difference < 0 else ", which is worse"
    return words


def _pair(contrast: Contrast) -> str:
    return f"{contrast.first.title} and {contrast.second.title}"


def _single(summary: Summary, verdict: str, contrast: Contrast) -> Inline:
    study, c = summary.study, contrast.comparison
    places = places_of(summary.contrasts)
    if verdict == "diverged":
        return [Strong(f"{_pair(contrast)} cannot be compared"), f": {_divergence(contrast)}."]
    if c is None or verdict == "pending":
        return _pending(summary, contrast, places)
    details = _details(summary, c, places)
    difference = with_unit(number(c.difference, places, sign=True), study.metric)
    margin = "" if c.margin is None else with_unit(f"{c.margin:g}", study.metric)
    within = contrast.equivalent()
    if verdict == "found":
        small = f" It is nevertheless smaller than the margin of {margin}." if within else ""
        return [Strong(side(contrast, study.metric, places)), f" ({details}, {_p_after_holm(c)}).{small}"]
    if verdict == "equivalent":
        p = probability(1.0 if c.p_equivalent_holm is None else c.p_equivalent_holm)
        words = f"{_pair(contrast)} are equivalent within {margin}"
        return [Strong(words), f" (difference {difference}, {details}, p {p} of the equivalence test after Holm)."]
    if verdict == "unclear":
        words = f"Unclear whether {contrast.first.title} and {contrast.second.title} differ"
        return [Strong(words), f" ({difference}, {details}): p {probability(c.p)} alone, but {_p_after_holm(c)}."]
    if c.low == c.high:
        return [Strong(f"{_pair(contrast)} gave equal results"), f" in all runs ({_n(summary, c)})."]
    seen = with_unit(number(c.detectable, places), study.metric)
    return [
        Strong(f"No difference was seen between {_pair(contrast)}"),
        f" ({difference}, {details}, {_p_after_holm(c)}); one of {seen} would have been seen"
        " by one test with 80% power.",
    ]


def _divergence(contrast: Contrast) -> str:
    parts = [
        f"{len(arm.diverged())} of {len(arm.finals)} final runs of {arm.title} diverged"
        for arm in (contrast.first, contrast.second)
        if arm.diverged()
    ]
    return enumeration(parts)


def _pending(summary: Summary, contrast: Contrast, places: int) -> Inline:
    c = contrast.comparison
    if c is None:
        parts = [_progress(arm) for arm in (contrast.first, contrast.second)]
        return [Strong(f"{_pair(contrast)} cannot be compared yet"), f": {enumeration(parts)}."]
    words = side(contrast, summary.study.metric, places)
    if c.n > 1:
        return [Strong(words), f" with {_n(summary, c)}, by exactly as much on each: without spread there is no test."]
    return [
        Strong(f"{words} on one {summary.over.removesuffix('s')}"),
        ": with n = 1 there is no interval and no test.",
    ]


def _progress(arm: ArmSummary) -> str:
    return f"{arm.title} has {len(arm.finals)} of {arm.due} final runs"


def _shared(summary: Summary, verdict: str, contrasts: list[Contrast]) -> Inline:
    study = summary.study
    places = places_of(summary.contrasts)
    comparisons = [c.comparison for c in contrasts if c.comparison is not None]
    if verdict == "found":
        words = "; ".join(side(contrast, study.metric, places) for contrast in contrasts)
        return [Strong(words), " (each with p < 0.05 after Holm)."]
    if verdict == "equivalent":
        margin = with_unit(f"{study.margin or 0:g}", study.metric)
        return [Strong(f"Equivalent within {margin}:"), " ", _semicolons(contrasts), "."]
    if verdict == "unseen":
        sizes_seen = [c.detectable for c in comparisons if math.isfinite(c.detectable)] or [math.nan]
        smallest, largest = number(min(sizes_seen), places), number(max(sizes_seen), places)
        sizes = with_unit(smallest if smallest == largest else f"{smallest} to {largest}", study.metric)
        words = f"; one of {sizes} would have been seen by one test with 80% power."
        return [Strong("No difference was seen between"), " ", _semicolons(contrasts), words]
    if verdict == "unclear":
        words = ", with p below 0.05 alone but not after Holm."
        return [Strong("Unclear whether there is a difference between"), " ", _semicolons(contrasts), words]
    if verdict == "diverged":
        return [Strong("Not comparable, as final runs diverged:"), " ", _semicolons(contrasts), "."]
    return [Strong("Not tested:"), " ", _semicolons(contrasts), "."]


def _semicolons(contrasts: list[Contrast]) -> str:
    return "; ".join(_pair(contrast) for contrast in contrasts)
