"""The settings of a study: what its YAML file holds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lit_adapters.errors import AdapterError

SEARCH = "search"


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
    better: Literal["higher", "lower"]
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


def digest_of(value: Any) -> str:
    """A short digest of plain values, the same for equal ones."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
