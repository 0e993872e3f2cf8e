"""Everything that a report says in numbers, computed once from the records of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from lit_adapters.errors import AdapterError
from lit_adapters.study.curves import at_equal
from lit_adapters.study.planning import AllDivergedError, Chosen, Plan
from lit_adapters.study.protocol import changes, family_of
from lit_adapters.study.records import Record, Results
from lit_adapters.study.settings import AtEqual, Metric, Study
from lit_adapters.study.statistics import Comparison, compare, holm, interval

SIGNIFICANCE = 0.05  # p values below it count
_AGREE = 5e-4  # between a metric and the mean of its items: logged values are rounded
_RESAMPLES = 2000  # of the bootstrap in the table of contrasts

Finals: TypeAlias = Mapping[tuple[int, int], Record]


@dataclass(frozen=True)
class Estimate:
    """A mean in the metric's unit and its 95% interval; the interval is NaN where n = 1.

    Attributes:
        mean: Of the values or of their paired differences.
        low: The interval's lower end.
        high: The interval's upper end.
        n: Training sets (or seeds, in a study of one training set).
    """

    mean: float
    low: float
    high: float
    n: int

    def half_width(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class ArmSummary:
    """An arm and its final runs.

    Attributes:
        key: Its name in the file.
        title: Its name in the report.
        exploratory: Whether it came after the results of others were known.
        finals: Its finished final runs by training set and seed.
        due: How many final runs the study has.
        parameters: Trained parameters without the head; None if no run has finished.
        estimates: Means by name of the metric. An arm with a diverged run has none.
        chosen: What the search has found; None if it failed.
        failure: Why it failed, if it did.
        seconds: Median time of a final run, in seconds; NaN without one.
        memory: Largest memory of a final run, in MiB; NaN without one.
    """

    key: str
    title: str
    exploratory: bool
    finals: Finals
    due: int
    parameters: int | None
    estimates: dict[str, Estimate]
    chosen: Chosen | None
    failure: str
    seconds: float
    memory: float

    def diverged(self) -> list[tuple[int, int]]:
        """Training set and seed of the final runs that diverged."""
        return [key for key, record in self.finals.items() if record.status == "diverged"]

    def complete(self) -> bool:
        """Whether all final runs have finished."""
        return len(self.finals) == self.due


@dataclass(frozen=True)
class EqualContrast:
    """Two arms compared at the best level of a value that both trainings reached.

    Attributes:
        level: The mean of that level; its interval is over training sets.
        differences: Of the other values at that level, first minus second, by name.
        failure: Why there are none; empty otherwise.
    """

    level: Estimate | None
    differences: dict[str, Estimate]
    failure: str = ""


@dataclass(frozen=True)
class Contrast:
    """Two arms compared on the runs that both have.

    Attributes:
        first: The first arm.
        second: The second arm; differences are first minus second.
        comparison: The numbers, in the metric's unit; None if no run is common or one has diverged.
        also: Differences in the other metrics, by name.
        equal: The same where both trainings were equally good; None if the study does not ask for it.
    """

    first: ArmSummary
    second: ArmSummary
    comparison: Comparison | None
    also: dict[str, Estimate] = field(default_factory=dict)
    equal: EqualContrast | None = None

    def equivalent(self) -> bool:
        """Whether the difference is smaller than the margin, after Holm where the contrast was named beforehand."""
        c = self.comparison
        p = None if c is None else c.p_equivalent if c.p_equivalent_holm is None else c.p_equivalent_holm
        return p is not None and p < SIGNIFICANCE

    def verdict(self) -> str:
        """What the numbers say: "found", "equivalent", "unclear", "unseen", "pending" or "diverged".

        A difference is found if its p value after Holm is below 5%, and unclear if only its own p value is. Without a
        test the verdict is "pending".
        """
        if self.first.diverged() or self.second.diverged():
            return "diverged"
        c = self.comparison
        if c is None or math.isnan(c.p):
            return "pending"
        if (c.p if c.p_holm is None else c.p_holm) < SIGNIFICANCE:
            return "found"
        if self.equivalent():
            return "equivalent"
        return "unclear" if c.p < SIGNIFICANCE else "unseen"


@dataclass(frozen=True)
class MeasuredNoise:
    """How much the results of runs differ if only rounding differs.

    Attributes:
        title: The arm.
        rms: Root mean square of the differences of single runs, in the metric's unit.
        largest: The largest difference without its sign.
        n: Pairs of runs.
        diverged: Pairs in which a run diverged; they are left out of the other numbers.
    """

    title: str
    rms: float
    largest: float
    n: int
    diverged: int


@dataclass(frozen=True)
class Summary:
    """The numbers of a report.

    Attributes:
        study: The study.
        records: All finished runs of the study as it is now.
        unused: Finished runs of earlier versions of its file.
        changes: What has changed in the file since final runs were started, as sentences.
        arms: By key, in the order of the file.
        contrasts: Those that were named before the first run.
        exploratory: Other comparisons, for intervals only.
        noise_floor: None without finished pairs of runs.
        over: What n counts: "training sets", or "seeds" in a study of one training set.
        with_items: Names of the metrics whose intervals take test items as drawn by chance too.
        family: How many contrasts the correction for several counts.
    """

    study: Study
    records: list[Record]
    unused: list[Record]
    changes: list[str]
    arms: dict[str, ArmSummary]
    contrasts: list[Contrast]
    exploratory: list[Contrast]
    noise_floor: MeasuredNoise | None
    over: str
    with_items: frozenset[str]
    family: int

    @property
    def items(self) -> bool:
        """Whether intervals of the metric take test items as drawn by chance too."""
        return self.study.metric.name in self.with_items

    def metrics(self) -> list[Metric]:
        """The metric of the contrasts, and the others."""
        return [self.study.metric, *self.study.also]

    def without_items(self) -> list[Metric]:
        """Metrics that some arm has measured, and whose intervals leave out the chance of test items."""
        measured = {name for arm in self.arms.values() for name in arm.estimates}
        return [m for m in self.metrics() if m.name in measured and m.name not in self.with_items]

    def by_parameters(self) -> list[ArmSummary]:
        """Arms as the picture has them from left to right; those without a run last."""
        return sorted(self.arms.values(), key=lambda arm: math.inf if arm.parameters is None else arm.parameters)

    def finished(self) -> int:
        """How many final runs have finished."""
        return sum(len(arm.finals) for arm in self.arms.values())

    def due(self) -> int:
        """How many final runs the study has."""
        return sum(arm.due for arm in self.arms.values())

    def front(self) -> list[ArmSummary]:
        """Measured arms that no arm with as few or fewer trained parameters beats, by increasing parameters."""
        sign = self.study.metric.sign()
        name = self.study.metric.name
        measured = [arm for arm in self.arms.values() if name in arm.estimates and arm.parameters is not None]
        measured.sort(key=lambda arm: (arm.parameters, -sign * arm.estimates[name].mean))
        front: list[ArmSummary] = []
        for arm in measured:
            if not front or sign * arm.estimates[name].mean > sign * front[-1].estimates[name].mean:
                front.append(arm)
        return front


def summarise(study: Study, results: Results, resamples: int = _RESAMPLES) -> Summary:
    """Compute the numbers of a report; the study need not have ended.

    Args:
        study: The study.
        results: Its runs.
        resamples: Of the bootstrap of the contrasts that were named; 0 leaves it out.

    Raises:
        AdapterError: A recipe cannot be read, or runs that are compared have different numbers of test items.
    """
    plan = Plan(study)
    arms = {key: _arm(plan, results, key) for key in study.arms}
    named = [(arms[first], arms[second]) for first, second in study.contrasts]
    contrasts = [
        contrast_of(study, results, *pair, resamples) for pair in named if not any(arm.exploratory for arm in pair)
    ]
    tested = [contrast.comparison for contrast in contrasts if contrast.comparison is not None]
    family = family_of(study, results.records)
    corrected = iter(holm(tested, family=family))
    contrasts = [c if c.comparison is None else replace(c, comparison=next(corrected)) for c in contrasts]
    # An arm that was added after others were known cannot confirm anything.
    later = [pair for pair in named if any(arm.exploratory for arm in pair)]
    reference, *others = arms.values()
    known = {frozenset((first.key, second.key)) for first, second in named}
    later += [(arm, reference) for arm in others if frozenset((arm.key, reference.key)) not in known]
    exploratory = [contrast_of(study, results, *pair) for pair in later]
    noise_floor = _noise_floor(plan, results, arms)
    over = "training sets" if _over_sets(study) else "seeds"
    with_items = frozenset(
        metric.name
        for metric in (study.metric, *study.also)
        if all(_items(study, results, metric, a.finals, _done(a.finals)) is not None for a in arms.values())
    )
    used = plan.used(results)
    records = [record for record in results.records if record.id in used]
    unused = [record for record in results.records if record.id not in used]
    changed = changes(study, results.records)
    return Summary(study, records, unused, changed, arms, contrasts, exploratory, noise_floor, over, with_items, family)


def _done(finals: Finals) -> list[tuple[int, int]]:
    return [key for key, record in finals.items() if record.status == "done"]


def _over_sets(study: Study) -> bool:
    return len(study.repeat.sets) > 1 or len(study.repeat.seeds) == 1


def _arm(plan: Plan, results: Results, key: str) -> ArmSummary:
    study, settings = plan.study, plan.study.arms[key]
    chosen, failure = None, ""
    try:
        chosen = plan.chosen(results, key)
    except AllDivergedError as error:  # every rate diverged; the report still shows the other arms
        failure = str(error)
    finals = {} if chosen is None or chosen.rates is None else plan.finished(results, key, chosen.rates)
    done = [record for record in finals.values() if record.status == "done"]
    any_run = done or [record for record in results.records if record.arm == key]
    estimates = {}
    if finals and len(done) == len(finals):
        for metric in (study.metric, *study.also):
            values = _values(study, metric, finals, list(finals))
            if np.isfinite(values).all():
                estimates[metric.name] = _estimate(values, _items(study, results, metric, finals, list(finals)))
    return ArmSummary(
        key=key,
        title=settings.title or key,
        exploratory=settings.exploratory,
        finals=finals,
        due=len(study.repeat.sets) * len(study.repeat.seeds),
        parameters=next((r.parameters["without_head"] for r in any_run if "without_head" in r.parameters), None),
        estimates=estimates,
        chosen=chosen,
        failure=failure,
        seconds=float(np.median([record.seconds.get("total", math.nan) for record in done])) if done else math.nan,
        memory=max((record.peak_memory_mib for record in done), default=math.nan),
    )


def _units(study: Study, keys: list[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Runs by what n counts: a training set has all its seeds."""
    units: dict[int, list[tuple[int, int]]] = {}
    for key in sorted(keys):
        units.setdefault(key[0] if _over_sets(study) else key[1], []).append(key)
    return units


def _values(study: Study, metric: Metric, finals: Finals, keys: list[tuple[int, int]]) -> np.ndarray:
    """The scaled metric of each training set, as the mean over its seeds."""
    rows = [
        np.mean([finals[key].metrics.get(metric.name, math.nan) for key in runs])
        for runs in _units(study, keys).values()
    ]
    return np.array(rows) * metric.scale


def _items(
    study: Study, results: Results, metric: Metric, finals: Finals, keys: list[tuple[int, int]]
) -> np.ndarray | None:
    """The scaled values (S, I) of each test item, as the mean over seeds.

    None if a run has none, or if the metric is not their mean: a mean over tokens, say, weighs items.
    """
    name = metric.items
    if name is None or any(name not in results.items(finals[key]) for key in keys):
        return None
    values = {key: np.asarray(results.items(finals[key])[name], dtype=np.float64) for key in keys}
    lengths = {key: len(row) for key, row in values.items()}
    if len(set(lengths.values())) > 1:
        few, many = min(keys, key=lengths.__getitem__), max(keys, key=lengths.__getitem__)
        raise AdapterError(
            f"{name!r} has {lengths[few]} test items in {finals[few].id} and {lengths[many]} in {finals[many].id}; "
            "delete results.json, items.npz and the folders of the runs with other test data, and run the study again"
        )
    means = [row.mean() for row in values.values()]
    if not np.allclose(means, [finals[key].metrics.get(metric.name, math.nan) for key in keys], rtol=_AGREE, atol=0):
        return None
    rows = [np.mean([values[key] for key in runs], axis=0) for runs in _units(study, keys).values()]
    return np.array(rows) * metric.scale


def _estimate(values: np.ndarray, items: np.ndarray | None) -> Estimate:
    mean, low, high = interval(values, items) if len(values) > 1 else (float(values[0]), math.nan, math.nan)
    return Estimate(mean, low, high, len(values))


def contrast_of(study: Study, results: Results, first: ArmSummary, second: ArmSummary, resamples: int = 0) -> Contrast:
    """The difference of two arms of a summary, before Holm, with a bootstrap of `resamples` if that is not 0."""
    keys = [key for key in first.finals if key in second.finals]
    if not keys or first.diverged() or second.diverged():
        return Contrast(first, second, None)
    found = {metric.name: _comparison(study, results, metric, first, second, keys) for metric in study.also}
    also = {name: Estimate(c.difference, c.low, c.high, c.n) for name, c in found.items() if c is not None}
    equal = None if study.at_equal is None else _equal(study, study.at_equal, first, second, keys)
    main = _comparison(study, results, study.metric, first, second, keys, resamples)
    return Contrast(first, second, main, also, equal)


def _equal(
    study: Study, at: AtEqual, first: ArmSummary, second: ArmSummary, keys: list[tuple[int, int]]
) -> EqualContrast:
    levels: dict[tuple[int, int], float] = {}
    differences: dict[str, Estimate] = {}
    for metric in at.read:
        found: dict[tuple[int, int], float] = {}
        for key in keys:
            one, other = (arm.finals[key].curve for arm in (first, second))
            try:
                level, a, b = at_equal(one, other, at.by.name, metric.name, at.by.better)
            except AdapterError as error:
                return EqualContrast(None, {}, f"set {key[0]}, seed {key[1]}: {error}")
            if levels.setdefault(key, level) != level:  # a point of the curve has one value and lacks the other
                names = f"{at.read[0].name} and {metric.name}"
                return EqualContrast(
                    None, {}, f"set {key[0]}, seed {key[1]}: {names} have no common level; log both in every validation"
                )
            found[key] = (a - b) * metric.scale
        differences[metric.name] = _over_units(study, found)
    return EqualContrast(_over_units(study, {key: level * at.by.scale for key, level in levels.items()}), differences)


def _over_units(study: Study, values: Mapping[tuple[int, int], float]) -> Estimate:
    units = _units(study, list(values)).values()
    return _estimate(np.array([np.mean([values[key] for key in runs]) for runs in units]), None)


def _comparison(
    study: Study,
    results: Results,
    metric: Metric,
    first: ArmSummary,
    second: ArmSummary,
    keys: list[tuple[int, int]],
    resamples: int = 0,
) -> Comparison | None:
    a, b = (_values(study, metric, arm.finals, keys) for arm in (first, second))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    items_a, items_b = (_items(study, results, metric, arm.finals, keys) for arm in (first, second))
    if items_a is None or items_b is None:
        items_a = items_b = None
    margin = study.margin if metric is study.metric else None
    return compare(a, b, items_a, items_b, margin=margin, better=metric.better, resamples=resamples)


def _noise_floor(plan: Plan, results: Results, arms: Mapping[str, ArmSummary]) -> MeasuredNoise | None:
    study = plan.study
    if study.noise_floor is None:
        return None
    arm, metric = arms[study.noise_floor.arm], study.metric
    rates = arm.chosen.rates if arm.chosen is not None else None
    again = {} if rates is None else plan.finished(results, arm.key, rates, "noise")
    pairs = [(record, arm.finals[key]) for key, record in again.items() if key in arm.finals]
    whole = [pair for pair in pairs if all(r.status == "done" and metric.name in r.metrics for r in pair)]
    if not pairs:
        return None
    differences = np.array([a.metrics[metric.name] - b.metrics[metric.name] for a, b in whole]) * metric.scale
    rms = float(np.sqrt(np.mean(differences**2))) if whole else math.nan
    largest = float(np.abs(differences).max()) if whole else math.nan
    return MeasuredNoise(arm.title, rms, largest, len(whole), len(pairs) - len(whole))
