"""Check the settings of a study before the first run."""

from __future__ import annotations

import math
import re

from lit_adapters.errors import AdapterError, shown
from lit_adapters.study.document import leaves
from lit_adapters.study.settings import SEARCH, Arm, Search, Study

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,79}")
_MOST_RUNS = 100_000


def check_study(study: Study) -> None:
    """Check that the settings of a study make sense together.

    Raises:
        AdapterError: They contradict each other, or a value is out of range.
    """
    where = str(study.path)
    if not study.arms:
        raise AdapterError(f"{where}: arms is empty; name what is compared")
    if not study.question.strip():
        raise AdapterError(f"{where}: question is empty; say what the study asks, it heads the report")
    if study.recipe == []:
        raise AdapterError(f"{where}: recipe is an empty list; name the recipe that arms change")
    _check_metrics(study)
    for key, arm in study.arms.items():
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            raise AdapterError(f"{where}: arm {shown(key)} must be a name of at most 80 letters, digits and - _ . +")
        for group, rate in arm.rates.items():
            if rate != SEARCH and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
                raise AdapterError(
                    f"{where}: arm {key!r}: the rate of {group!r} is {shown(rate)}; give a number above 0"
                )
        if arm.searched() and study.search is None:
            raise AdapterError(f"{where}: arm {key!r} searches a rate and there is no section search")
    if study.search is not None:
        _check_search(study, study.search)
    for name, values in (("sets", study.repeat.sets), ("seeds", study.repeat.seeds)):
        if not values or len(set(values)) < len(values) or min(values) < 0:
            raise AdapterError(f"{where}: repeat.{name} is {shown(values)}; give different numbers of at least 0")
    if len(study.arms) * len(study.repeat.sets) * len(study.repeat.seeds) > _MOST_RUNS:
        raise AdapterError(f"{where}: these are more than {_MOST_RUNS} runs")
    if not study.repeat.set_keys and len(study.repeat.sets) > 1:
        raise AdapterError(f"{where}: repeat.set_keys is empty, so that all sets would be equal; name override keys")
    if not study.repeat.seed_keys and len(study.repeat.seeds) > 1:
        raise AdapterError(f"{where}: repeat.seed_keys is empty, so that all seeds would be equal; name override keys")
    for pair in study.contrasts:
        if len(set(pair)) < 2:
            raise AdapterError(f"{where}: the contrast {shown(list(pair))} compares an arm with itself")
        for key in pair:
            _check_arm(study, key, "a contrast")
    if len(set(map(frozenset, study.contrasts))) < len(study.contrasts):
        raise AdapterError(f"{where}: two contrasts compare the same arms")
    if study.margin is not None and not 0 < study.margin < math.inf:
        raise AdapterError(f"{where}: margin {study.margin} must be a number above 0, in the metric's unit")
    if study.noise_floor is not None:
        _check_arm(study, study.noise_floor.arm, "noise_floor")
        if not study.noise_floor.set and study.noise_floor.threads is None:
            raise AdapterError(f"{where}: noise_floor changes nothing; give set or threads")
        if study.noise_floor.threads is not None and study.noise_floor.threads < 1:
            raise AdapterError(f"{where}: noise_floor.threads {study.noise_floor.threads} must be at least 1")
    if study.run.workers < 1 or study.run.threads < 1:
        raise AdapterError(f"{where}: run.workers and run.threads must be at least 1")
    _check_overrides(study)


def _check_metrics(study: Study) -> None:
    where = str(study.path)
    metrics = [study.metric, *study.also]
    searched = [study.search.metric] if study.search is not None else []
    equal = [study.at_equal.by, *study.at_equal.read] if study.at_equal is not None else []
    for metric in [*metrics, *searched, *equal]:
        if not metric.name:
            raise AdapterError(f"{where}: a metric has no name; give it as the program logs it")
        if not 0 < metric.scale < math.inf:
            raise AdapterError(f"{where}: the scale of {metric.name!r} is {metric.scale:g}; give a number above 0")
    for section, named in (("metric and also name", metrics), ("at_equal names", equal)):
        names = [metric.name for metric in named]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise AdapterError(f"{where}: {section} {twice!r} twice; leave one out")
    if study.at_equal is not None and not study.at_equal.read:
        raise AdapterError(f"{where}: at_equal.read is empty; name what is compared at equal {study.at_equal.by.name}")


# What the rates of groups decide.
_GROUP_RATE_KEYS = ("optimizer.init_args.lr", "lr_scheduler.init_args.max_lr", "lr_scale")


def _rate_keys(arm: Arm) -> set[str]:
    """The override keys that the rates of an arm decide."""
    dotted = {name for name in arm.rates if "." in name}
    return dotted | (set(_GROUP_RATE_KEYS) if len(dotted) < len(arm.rates) else set())


def _check_overrides(study: Study) -> None:
    """Check that no override is replaced silently, and that rates are stated where the report shows them.

    Raises:
        AdapterError: A section sets what repeat, paths or rates decide.
    """
    numbered = {
        **dict.fromkeys(study.paths, "paths"),
        **dict.fromkeys(study.repeat.seed_keys, "repeat.seed_keys"),
        **dict.fromkeys(study.repeat.set_keys, "repeat.set_keys"),
    }
    rate_keys = {key: _rate_keys(arm) for key, arm in study.arms.items()}
    all_rates = set().union(*rate_keys.values())
    sections: list[tuple[str, dict, set[str], set[str]]] = [("set", study.set, all_rates, set())]
    for key, arm in study.arms.items():
        # A whole optimiser with a rate inside is fine where `rates` replaces that.
        sections.append((f"arms.{key}.set", arm.set, rate_keys[key], all_rates - rate_keys[key]))
    sections.append(("final", study.final, all_rates, all_rates))
    if study.search is not None:
        sections.append(("search.set", study.search.set, all_rates, all_rates))
    if study.noise_floor is not None:
        sections.append(("noise_floor.set", study.noise_floor.set, all_rates, all_rates))
    for name, values, own, inside in sections:
        for key in values:
            lost = next((other for other in values if other.startswith(f"{key}.")), None)
            if lost is not None:
                raise AdapterError(f"{study.path}: {name} has {key!r} and {lost!r} inside it; put both in one")
        found = {*leaves(values), *values}
        for key in sorted(found):
            if key in numbered:
                raise AdapterError(f"{study.path}: {name} sets {key!r}, which {numbered[key]} decides; leave one out")
            is_rate = any(key == k or key.startswith(f"{k}.") for k in (own if key in values else set()) | inside)
            if is_rate:
                raise AdapterError(f"{study.path}: {name} sets the learning rate {key!r}; state it in the arms' rates")


def _check_arm(study: Study, key: str, what: str) -> None:
    if key not in study.arms:
        raise AdapterError(f"{study.path}: {what} names {shown(key)}; the arms are {', '.join(study.arms)}")


def _check_search(study: Study, search: Search) -> None:
    where = str(study.path)
    grid = search.grid
    if len(grid) < 2 or sorted(set(grid)) != grid or not all(0 < rate < math.inf for rate in grid):
        raise AdapterError(f"{where}: search.grid {shown(grid)} must be two or more rising rates above 0")
    if not 0 <= search.extensions <= 10:
        raise AdapterError(f"{where}: search.extensions {search.extensions} must be a whole number from 0 to 10")
    if not search.sets or len(set(search.sets)) < len(search.sets) or min(search.sets) < 0:
        raise AdapterError(f"{where}: search.sets {shown(search.sets)} must be different numbers of at least 0")
    both = sorted(set(search.sets) & set(study.repeat.sets))
    if both and study.repeat.set_keys:
        raise AdapterError(
            f"{where}: the training set {both[0]} is used in the search and in final runs; rates would be chosen on "
            "data that the comparison uses"
        )
    if _is_of_test(search.metric.name):
        raise AdapterError(
            f"{where}: search.metric {search.metric.name!r} is of the test split; give one of validation"
        )

    for key in leaves(search.set):
        value = search.set.get(key)
        if _is_of_test(key) or _is_of_test(str(value)):
            raise AdapterError(
                f"{where}: search.set has {key!r}: {shown(value)}, which names the test split; rates are chosen on "
                "validation data alone"
            )


def _is_of_test(name: str) -> bool:
    return "test" in re.findall(r"[a-z]+", name.lower())
