"""Which runs a study needs next, given the records of finished ones. Nothing here runs anything.

Rates are found one group after the other: all rates of the grid on all tuning sets, then one more rate at a time while
the best mean is at an edge of what was tried, as often as `extensions` allows. Groups that were not searched yet stay
at the middle of the grid. Then the final runs are due, one training set after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_adapters.errors import AdapterError
from lit_adapters.study.document import read_yaml
from lit_adapters.study.protocol import protocol_of
from lit_adapters.study.records import Record, Results, Stage
from lit_adapters.study.settings import SEARCH, Arm, Metric, Search, Study, digest_of

# What the tool itself sets, below everything that a study says: nothing on the terminal, logs in the run's folder.
_QUIET: dict[str, Any] = {
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.num_sanity_val_steps": 0,
}
# Relative difference between a metric and the mean of its items: bfloat16 rounds by half of it.
_MEAN_AGREES = 1e-2


class AllDivergedError(AdapterError):
    """Every rate that the search of an arm tried has diverged."""


@dataclass(frozen=True)
class Run:
    """A run of the study, finished or not.

    Attributes:
        id: Its name; see `Record.id`.
        arm: Key of the arm.
        stage: "search", "final" or "noise"; see `Record.stage`.
        set: Number of the training set.
        seed: Number of the seed.
        rates: Learning rate of each group.
        recipe: The whole recipe, without paths.
        threads: Threads of its process.
        protocol: What the study has named beforehand; empty in the search.
    """

    id: str
    arm: str
    stage: Stage
    set: int
    seed: int
    rates: Mapping[str, float]
    recipe: Mapping[str, Any]
    threads: int
    protocol: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """A learning rate of one group that the search tries.

    Attributes:
        group: Which group's rate is searched.
        rates: The rates of all groups.
        mean: Mean of the search metric over the tuning sets; infinitely bad if a run diverged; None if not run yet.
    """

    group: str
    rates: dict[str, float]
    mean: float | None


@dataclass(frozen=True)
class Chosen:
    """What the search of an arm has found so far.

    Attributes:
        rates: The rate of each group, stated or found; None while the search goes on.
        tried: All rates that were tried, in order.
        edge: Groups whose best rate is at an edge of what was tried, though no extension is left.
        runs: Number of finished search runs.
        due: Search runs that are needed next.
    """

    rates: dict[str, float] | None
    tried: list[Tried]
    edge: list[str]
    runs: int
    due: list[Run]


class Plan:
    """The runs of a study.

    Args:
        study: The study.

    Raises:
        AdapterError: A recipe is missing or is not YAML, two arms are the same, or an arm's rates leave out a group
            that has a rate of its own in the recipe.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._recipes: dict[str, dict[str, Any]] = {}
        equal: dict[str, str] = {}
        for key, arm in study.arms.items():
            content = digest_of([self._run(key, "final", 0, 0, {}).recipe, list(arm.rates.items())])
            if content in equal:
                raise AdapterError(
                    f"{study.path}: the arms {equal[content]!r} and {key!r} have the same recipe and the same rates; "
                    "correct one, or leave it out"
                )
            equal[content] = key
            self._check_groups(key, arm)

    def _check_groups(self, key: str, arm: Arm) -> None:
        """Check that the rates of an arm leave out no group to which its recipe gives a rate of its own.

        A method's name may be left out, as the arm may have another method.

        Raises:
            AdapterError: They do; the group would train at the rate of the first one.
        """
        groups = [name for name in arm.rates if "." not in name]
        scaled = self._base(arm).get("lr_scale")
        for name, scale in scaled.items() if groups and isinstance(scaled, Mapping) else ():
            if name not in groups and (name in ("head", "base") or not name.isidentifier()):
                fix = f"add {name} and its rate"
                if "." in name:  # a key of the recipe, where rates name it
                    fix = "state optimizer.init_args.lr in place of groups, or take the name out of the recipe"
                raise AdapterError(
                    f"{self.study.path}: the rates of the arm {key!r} leave out {name!r}, whose rate is {scale} times "
                    f"lr in its recipe (lr_scale): {fix}"
                )

    def chosen(self, results: Results, key: str) -> Chosen:
        """What the search of an arm has found, and the search runs that are due next.

        Raises:
            AllDivergedError: Every rate of the first grid diverged.
            AdapterError: The search metric was not logged.
        """
        arm, search = self.study.arms[key], self.study.search
        stated = {group: rate for group, rate in arm.rates.items() if rate != SEARCH}
        searched = arm.searched()
        if search is None or not searched:
            return Chosen({g: float(r) for g, r in stated.items()}, [], [], 0, [])
        found: dict[str, float] = {}
        tried: list[Tried] = []
        edge: list[str] = []
        runs = 0
        for group in searched:
            middle = dict.fromkeys(searched, search.grid[len(search.grid) // 2])
            means: dict[float, float | None] = {}
            due: list[Run] = []
            for rate in self._rates_to_try(search, means):
                rates = {name: float({**stated, **middle, **found, group: rate}[name]) for name in arm.rates}
                of_rate = [self._run(key, "search", number, 0, rates) for number in search.sets]
                records = [results[run.id] for run in of_rate if run.id in results]
                due += [run for run in of_rate if run.id not in results]
                runs += len(records)
                means[rate] = self._mean(search, records) if len(records) == len(of_rate) else None
                tried.append(Tried(group, rates, means[rate]))
            if due:
                return Chosen(None, tried, edge, runs, due)
            best = _best(search, means)
            if not math.isfinite(means[best] or 0.0):
                raise AllDivergedError(
                    f"arm {key!r}: every rate from {min(means):g} to {max(means):g} diverged; look at its settings, "
                    "or take the arm out"
                )
            found[group] = best
            if best in (min(means), max(means)):
                edge.append(group)
        return Chosen({g: float({**stated, **found}[g]) for g in arm.rates}, tried, edge, runs, [])

    def due(self, results: Results) -> list[Run]:
        """Runs that are not finished and could start now: searches first, then final runs, set after set.

        One final run is made early, after the first run of the search: it shows a wrong name of the metric before the
        other searches. An arm whose every rate diverged has no runs left; the others go on.
        """
        searches: list[Run] = []
        finals: list[tuple[int, int, int, Run]] = []
        for position, key in enumerate(self.study.arms):
            try:
                chosen = self.chosen(results, key)
            except AllDivergedError:
                continue
            searches += chosen.due
            if chosen.rates is not None:
                for stage in self._final_stages(key):
                    for place, run in enumerate(self.final_runs(key, chosen.rates, stage)):
                        if run.id not in results:
                            finals.append((place, stage == "noise", position, run))
        later = [run for *_, run in sorted(finals, key=lambda entry: entry[:3])]
        stages = {record.stage for record in results.records}
        early = 1 if "search" in stages and "final" not in stages else 0
        return later[:early] + searches + later[early:]

    def expected(self, results: Results) -> int:
        """How many runs are left, without further extensions of the grid and without arms whose every rate diverged."""
        left = 0
        for key, arm in self.study.arms.items():
            try:
                chosen = self.chosen(results, key)
            except AllDivergedError:
                continue
            left += len(chosen.due)
            finals = len(self.study.repeat.sets) * len(self.study.repeat.seeds)
            if chosen.rates is None:
                assert self.study.search is not None
                begun = len({tried.group for tried in chosen.tried})
                left += (len(arm.searched()) - begun) * len(self.study.search.grid) * len(self.study.search.sets)
                left += finals * len(self._final_stages(key))
            else:
                for stage in self._final_stages(key):
                    left += sum(run.id not in results for run in self.final_runs(key, chosen.rates, stage))
        return left

    def final_runs(self, key: str, rates: Mapping[str, float], stage: Stage = "final") -> Iterator[Run]:
        """The final runs of an arm at its rates."""
        for number in self.study.repeat.sets:
            for seed in self.study.repeat.seeds:
                yield self._run(key, stage, number, seed, rates)

    def finished(
        self, results: Results, key: str, rates: Mapping[str, float], stage: Stage = "final"
    ) -> dict[tuple[int, int], Record]:
        """The finished final runs of an arm at its rates, by (set, seed); one diverged if a metric is not finite."""
        if stage not in self._final_stages(key):
            return {}
        runs = self.final_runs(key, rates, stage)
        named = [self.study.metric, *self.study.also]
        return {(r.set, r.seed): _judged(results[r.id], named) for r in runs if r.id in results}

    def used(self, results: Results) -> set[str]:
        """Names of the finished runs that the present study uses; the others belong to earlier versions of its file."""
        used: set[str] = set()
        for key in self.study.arms:
            try:
                chosen = self.chosen(results, key)
            except AllDivergedError:
                used |= {record.id for record in results.records if record.arm == key}
                continue
            sets = self.study.search.sets if self.study.search is not None else []
            used |= {self._run(key, "search", number, 0, t.rates).id for t in chosen.tried for number in sets}
            for stage in self._final_stages(key) if chosen.rates is not None else ():
                used |= {run.id for run in self.final_runs(key, chosen.rates or {}, stage)}
        return used & {record.id for record in results.records}

    def check(self, record: Record, items: Mapping[str, Any]) -> None:
        """Check that a finished run left what the study compares.

        Raises:
            AdapterError: It did not log a metric of the study, or left no values for each test item whose mean is the
                metric.
        """
        if record.status != "done":
            return
        if record.stage == "search":
            assert self.study.search is not None
            _logged(record, self.study.search.metric, "search.metric")
            return
        for place, metric in (("metric", self.study.metric), *(("also", metric) for metric in self.study.also)):
            value = _logged(record, metric, place)
            if metric.items is None:
                continue
            if metric.items not in items:
                raise AdapterError(
                    f"{place}: the run {record.id} left no values {metric.items!r} for each test item, but "
                    f"{', '.join(sorted(items)) or 'none'}; correct `items` or leave it out. `test_step` must return a "
                    "mapping of 1-D tensors, and the test items must not be shuffled"
                )
            mean = float(np.mean(items[metric.items], dtype=np.float64))
            if math.isfinite(value) and not math.isclose(mean, value, rel_tol=_MEAN_AGREES):
                raise AdapterError(
                    f"{place}: the mean of the items {metric.items!r} of the run {record.id} is {mean:g}, but "
                    f"{metric.name} is {value:g}; correct `items` or leave it out"
                )

    def _final_stages(self, key: str) -> list[Stage]:
        floor = self.study.noise_floor
        return ["final", "noise"] if floor is not None and floor.arm == key else ["final"]

    @staticmethod
    def _rates_to_try(search: Search, means: dict[float, float | None]) -> Iterator[float]:
        """The grid, and then one rate after the other beyond the edge at which the best one is."""
        yield from search.grid
        for _ in range(search.extensions):
            if any(mean is None for mean in means.values()):
                return
            rates, best = sorted(means), _best(search, means)
            if best not in (rates[0], rates[-1]):
                return
            yield Search.next_rate(rates, up=best == rates[-1])

    @staticmethod
    def _mean(search: Search, records: list[Record]) -> float:
        worst = -search.metric.sign() * math.inf
        values = [_logged(r, search.metric, "search.metric") if r.status == "done" else worst for r in records]
        return sum(values) / len(values) if all(map(math.isfinite, values)) else worst

    def _base(self, arm: Arm) -> dict[str, Any]:
        """The recipe that an arm changes."""
        given = self.study.recipe if arm.recipe is None else arm.recipe
        names = [given] if isinstance(given, str) else given
        merged: dict[str, Any] = {}
        for name in names:
            path = self.study.path.parent / name
            if name not in self._recipes:
                self._recipes[name] = _read_recipe(path)
            merged = _merged(merged, self._recipes[name])
        return merged

    def _run(self, key: str, stage: Stage, number: int, seed: int, rates: Mapping[str, float]) -> Run:
        study, arm, repeat = self.study, self.study.arms[key], self.study.repeat
        floor = study.noise_floor if stage == "noise" else None
        search_set = study.search.set if study.search is not None and stage == "search" else {}
        overrides = {
            **study.set,
            **arm.set,
            **(search_set if stage == "search" else study.final),
            **(floor.set if floor is not None else {}),
            **dict.fromkeys(repeat.set_keys, number),
            **dict.fromkeys(repeat.seed_keys, 1000 * number + seed),
        }
        base = self._base(arm)
        recipe = _overridden(base, {**_QUIET, **overrides})
        recipe = _overridden(recipe, _rate_overrides(recipe, rates))
        threads = study.run.threads if floor is None or floor.threads is None else floor.threads
        identity = [study.program, recipe, stage, *([threads] if floor is not None else [])]
        name = f"{key}-{stage}-{number}-{seed}-{digest_of(identity)}"
        protocol = {} if stage == "search" else protocol_of(study)
        return Run(name, key, stage, number, seed, dict(rates), recipe, threads, protocol)


def _logged(record: Record, metric: Metric, place: str) -> float:
    """The value of a metric of a run.

    Raises:
        AdapterError: The run did not log it.
    """
    if metric.name not in record.metrics:
        raise AdapterError(
            f"{place}: the run {record.id} did not log {metric.name!r}; it logged "
            f"{', '.join(sorted(record.metrics)) or 'nothing'}. Correct the name in the study"
        )
    return record.metrics[metric.name]


def _judged(record: Record, metrics: Sequence[Metric]) -> Record:
    broken = [m.name for m in metrics if not math.isfinite(record.metrics.get(m.name, 0.0))]
    if record.status == "diverged" or not broken:
        return record
    return replace(record, status="diverged", message=f"{broken[0]} is {record.metrics[broken[0]]}")


def _best(search: Search, means: Mapping[float, float | None]) -> float:
    values = {rate: search.metric.sign() * mean for rate, mean in means.items() if mean is not None}
    return max(values, key=values.__getitem__)


def _rate_overrides(recipe: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    """Rates as overrides: the first group's in the optimiser and the schedule, the others as `lr_scale`."""
    overrides: dict[str, Any] = {name: rate for name, rate in rates.items() if "." in name}
    groups = {name: rate for name, rate in rates.items() if "." not in name}
    if groups:
        common = next(iter(groups.values()))
        overrides["optimizer.init_args.lr"] = common
        if "max_lr" in ((recipe.get("lr_scheduler") or {}).get("init_args") or {}):
            overrides["lr_scheduler.init_args.max_lr"] = common
        overrides["lr_scale"] = {name: rate / common for name, rate in groups.items()}
    return overrides


def _read_recipe(path: Path) -> dict[str, Any]:
    recipe = read_yaml(path, "does not exist; correct `recipe` in the study")
    if not isinstance(recipe, dict):
        raise AdapterError(f"the recipe {path} holds no sections")
    return recipe


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of both; what `second` says wins, and a class of its own replaces the other one with its arguments."""
    merged = dict(first)
    for name, value in second.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same_class = value.get("class_path", old.get("class_path")) == old.get("class_path")
            merged[name] = _merged(old, value) if same_class else value
        else:
            merged[name] = value
    return merged


def _overridden(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with the values of dotted keys replaced."""
    result = _copied(base)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            inner = section.get(parent)
            section[parent] = inner if isinstance(inner, dict) else {}
            section = section[parent]
        section[last] = _copied(value)
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, (list, tuple)) else value
