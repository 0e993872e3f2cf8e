"""The settings of a study, read from its YAML file and checked before the first run."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError, shown
from lit_adapters.study.document import check_shape, leaves, read_yaml

SEARCH = "search"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,79}")
_MOST_RUNS = 100_000


@dataclass(frozen=True)
class Metric:
    """A value that runs are compared by.

    Attributes:
        name: As the program logs it, such as `test/acc1`.
        better: Whether higher or lower values are better.
        scale: Reports show the value times this; 100 makes percent of a share.
        unit: Of the scaled value, for the report.
        title: What the report calls the metric; its name by default.
        items: Name of the per-item values whose mean is the metric, where the program returns them from `test_step`.
    """

    name: str
    better: Literal["higher", "lower"] = "higher"
    scale: float = 1.0
    unit: str = ""
    title: str = ""
    items: str | None = None

    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.better == "higher" else -1


@dataclass(frozen=True)
class Arm:
    """A method with its settings, or a control, that a study compares.

    Attributes:
        title: What the report calls it; its key by default.
        set: Overrides of the recipe, by dotted key.
        rates: The learning rate of each group of parameters: a number, or "search". Names are groups of `lr_scale`
            ("head", "base", a method's name); the first one's rate is that of the optimiser and the schedule. A name
            with a dot is an override key, such as `optimizer.init_args.lr`, for programs without `lr_scale`.
        recipe: A recipe of its own, in place of the study's.
        exploratory: Whether the arm came after the results of others were known; the report marks it.
    """

    title: str = ""
    set: dict = field(default_factory=dict)
    rates: dict[str, float | Literal["search"]] = field(default_factory=dict)
    recipe: str | list[str] | None = None
    exploratory: bool = False

    def searched(self) -> list[str]:
        """The groups whose rate is searched, in their order."""
        return [name for name, rate in self.rates.items() if rate == SEARCH]


@dataclass(frozen=True)
class Search:
    """How rates are found: on validation data, with training sets that no final run uses.

    Attributes:
        metric: What `validate` logs.
        grid: The first rates of every searched group, rising, by factors of about 3.
        extensions: How often the grid grows by one rate, while the best one is at its edge.
        sets: Numbers of training sets; a rate is judged by the mean of the metric over them.
        set: Overrides in search runs.
    """

    metric: Metric
    grid: list[float]
    extensions: int = 2
    sets: list[int] = field(default_factory=lambda: [0])
    set: dict = field(default_factory=dict)

    @staticmethod
    def next_rate(rates: list[float], up: bool) -> float:
        """The rate that continues rising `rates` at an end in their own steps: after 1, 3, 10 comes 30, or 0.3."""
        near, middle, far = (rates[-1], rates[-2], rates[-3:][0]) if up else (rates[0], rates[1], rates[:3][-1])
        return float(f"{middle * near / far if len(rates) > 2 else near * near / middle:.3g}")


@dataclass(frozen=True)
class Repeat:
    """The final runs of an arm: one for each pair of a training set and a seed.

    Attributes:
        sets: Numbers of training sets; contrasts are paired over them.
        set_keys: Override keys that take the number of the set.
        seeds: Runs on each set; contrasts compare their mean.
        seed_keys: Override keys that take the set's number times 1000 plus the seed.
    """

    sets: list[int]
    set_keys: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    seed_keys: list[str] = field(default_factory=lambda: ["seed_everything"])


@dataclass(frozen=True)
class AtEqual:
    """Values compared where two trainings were equally good, see `lit_adapters.study.curves`.

    Attributes:
        by: The value that is made equal, as validation logs it.
        read: The values that are read there, as validation logs them.
    """

    by: Metric
    read: list[Metric]


@dataclass(frozen=True)
class NoiseFloor:
    """Repeats the runs of an arm with a change that affects rounding only, to show how much equal runs differ.

    Attributes:
        arm: The arm.
        set: Overrides.
        threads: Threads of these runs; those of all runs by default.
    """

    arm: str
    set: dict = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True)
class Running:
    """How runs are carried out.

    Attributes:
        workers: Runs at a time.
        threads: Threads of each run.
        executor: "local" for processes of this machine, "ray" or "slurm" for a cluster.
        options: What the executor takes for each run: Ray's resources of a task, or submitit's parameters of a job.
    """

    workers: int = 1
    threads: int = 1
    executor: Literal["local", "ray", "slurm"] = "local"
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study: arms that are compared under equal conditions.

    Attributes:
        question: The head of the report.
        program: A module, run as `python -m PROGRAM`, or a .py file, relative to the study's file; its command line is
            a LightningCLI's.
        recipe: The recipe that arms change, relative to the study's file; later files win.
        metric: The metric of the contrasts.
        arms: By key.
        search: How rates are found; needed if an arm searches one.
        repeat: The final runs.
        also: Further metrics of the report.
        contrasts: Pairs of arms that are compared, first minus second; named before the first run.
        at_equal: Contrasts are also read where both trainings were equally good; exploratory.
        margin: Differences below it do not matter: the margin of the equivalence test, in the metric's unit.
        set: Overrides of the recipe in all runs, by dotted key.
        paths: Overrides that say where data are, relative to the working directory, as on the program's own command
            line. A run stays the same run if they change.
        final: Overrides in final runs.
        noise_floor: Runs that differ by rounding only.
        run: How runs are carried out.
        notes: Limits that the report shall state.
        path: The file.
    """

    question: str
    program: str
    recipe: str | list[str]
    metric: Metric
    arms: dict[str, Arm]
    repeat: Repeat
    search: Search | None = None
    also: list[Metric] = field(default_factory=list)
    contrasts: list[tuple[str, str]] = field(default_factory=list)
    at_equal: AtEqual | None = None
    margin: float | None = None
    set: dict = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    final: dict = field(default_factory=dict)
    noise_floor: NoiseFloor | None = None
    run: Running = field(default_factory=Running)
    notes: list[str] = field(default_factory=list)
    path: Path = Path("study.yaml")

    @property
    def name(self) -> str:
        """The name of the file, without suffix."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """Where results go by default: beside the file."""
        return self.path.with_suffix("")

    def called(self) -> str:
        """The program as runs call it: a module's name, or the whole path of a .py file.

        Raises:
            AdapterError: There is no such file or module.
        """
        if self.program.endswith(".py"):
            file = (self.path.parent / self.program).resolve()
            if not file.is_file():
                raise AdapterError(f"{self.path}: program {file} does not exist; give it relative to the study's file")
            return str(file)
        try:
            found = find_spec(self.program) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise AdapterError(
                f"{self.path}: program {self.program!r} is not a module that can be imported here; give a module, "
                "or the path of a .py file relative to the study's file"
            )
        return self.program

    def digest(self) -> str:
        """The beginning of the file's SHA-256."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]


# The classes of sections, wherever they stand.
_SECTIONS: dict[str, type] = {
    "metric": Metric,
    "also": Metric,
    "at_equal": AtEqual,
    "by": Metric,
    "read": Metric,
    "arms": Arm,
    "search": Search,
    "repeat": Repeat,
    "noise_floor": NoiseFloor,
    "run": Running,
}


def read_study(path: str | Path) -> Study:
    """Read the file of a study.

    Raises:
        AdapterError: The file is missing, is not YAML or has a key twice, names something unknown, or settings
            contradict each other.
    """
    path = Path(path)
    document = read_yaml(path, "does not exist; give the YAML file of a study")
    if not isinstance(document, dict):
        raise AdapterError(f"{path} holds {shown(document)}; a study has question, program, recipe, metric, arms, ...")
    check_shape(document, Study, _SECTIONS, path)
    document["arms"] = {key: arm or {} for key, arm in document.get("arms", {}).items()}
    study = _parse(document, path)
    _check(study)
    return study


def _parse(document: Mapping[str, Any], path: Path) -> Study:
    """Let jsonargparse check names and types."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study", skip={"path"})
    try:
        parsed = parser.instantiate(parser.parse_object({"study": {**document}}))
    except (ArgumentError, ValueError, TypeError) as error:
        raise AdapterError(f"{path}: {one_line(error)}") from error
    study: Study = parsed.study
    titled = {key: _with(arm, title=arm.title or key) for key, arm in study.arms.items()}
    return _with(study, arms=titled, path=path)


def _with(instance: Any, **changes: Any) -> Any:
    values = {f.name: getattr(instance, f.name) for f in fields(instance)}
    return type(instance)(**{**values, **changes})


def _check(study: Study) -> None:
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


def digest_of(value: Any) -> str:
    """A short digest of plain values, the same for equal ones."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
