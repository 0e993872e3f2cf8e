"""How an annealed coefficient beta falls from 1 to 0 while training: pure functions of the training progress in [0, 1].

With t = clip((progress - start) / (end - start), 0, 1), the share of the annealing that is done:

    Linear       1 - t                       Polynomial   (1 - t)^power
    Cosine       (1 + cos(pi t)) / 2         Step         1 - floor(t steps) / steps
    Exponential  (e^(-rate t) - e^(-rate)) / (1 - e^(-rate))

All are exactly 1 until `start` and exactly 0 from `end` on. `Hold` never moves; `Adaptive` also looks at the
loss or at another logged value.
No published source says which shape or which fractions AFA-LoRA (arXiv 2512.22455) uses; a re-implementation anneals
over the first 30% of the steps, which is the default here.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lit_adapters.class_paths import build
from lit_adapters.errors import AdapterError, shown
from lit_adapters.values import check_choice, check_number, check_whole

_STEEPEST = 1000.0  # power of a polynomial


class Schedule(ABC):
    """Base of the schedules; each subclass is a frozen dataclass. A plain class for the sake of jsonargparse."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """beta at training progress in [0, 1]."""

    def to_config(self) -> dict[str, Any]:
        """The `{class_path, init_args}` form."""
        kind = type(self)
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dataclasses.asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Ramp(Schedule):
    """A fall from 1 to 0 between two fractions of the training; subclasses give its shape.

    Args:
        start: Progress at which beta leaves 1.
        end: Progress from which beta is 0; below 1 it leaves linear steps at the end.

    Raises:
        AdapterError: Not 0 <= start < end <= 1.
    """

    start: float = 0.0
    end: float = 0.3

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            check_number(f"{type(self).__name__}: {name}", getattr(self, name))
        if not 0.0 <= self.start < self.end <= 1.0:
            raise AdapterError(
                f"{type(self).__name__}: start {self.start} and end {self.end} must be 0 <= start < end <= 1"
            )

    def __call__(self, progress: float) -> float:
        if progress <= self.start:
            return 1.0
        return 0.0 if progress >= self.end else self.shape((progress - self.start) / (self.end - self.start))

    @abstractmethod
    def shape(self, t: float) -> float:
        """beta at share t in (0, 1) of the annealing."""


@dataclass(frozen=True)
class Linear(Ramp):
    """beta = 1 - t."""

    def shape(self, t: float) -> float:
        return 1.0 - t


@dataclass(frozen=True)
class Cosine(Ramp):
    """beta = (1 + cos(pi t)) / 2."""

    def shape(self, t: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * t))


@dataclass(frozen=True)
class Exponential(Ramp):
    """beta = (e^(-rate t) - e^(-rate)) / (1 - e^(-rate)).

    Args:
        rate: Larger is steeper at the beginning.
    """

    rate: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Exponential: rate", self.rate)
        if not 0.01 <= self.rate <= 100:
            raise AdapterError(f"Exponential: rate {self.rate} must lie in [0.01, 100]; Linear is the limit at 0")

    def shape(self, t: float) -> float:
        floor = math.exp(-self.rate)
        return (math.exp(-self.rate * t) - floor) / (1.0 - floor)


@dataclass(frozen=True)
class Polynomial(Ramp):
    """beta = (1 - t)^power.

    Args:
        power: 1 is linear; larger is steeper at the beginning.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Polynomial: power", self.power, high=_STEEPEST)
        if not self.power > 0:
            raise AdapterError(f"Polynomial: power {self.power} must be positive")

    def shape(self, t: float) -> float:
        return (1.0 - t) ** self.power


@dataclass(frozen=True)
class Step(Ramp):
    """beta = 1 - floor(t steps) / steps: equal stairs.

    Args:
        steps: Number of stairs; 1 holds beta at 1 until `end`.
    """

    steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("Step: steps", self.steps)

    def shape(self, t: float) -> float:
        return 1.0 - math.floor(t * self.steps + 1e-9) / self.steps  # t is a rounded quotient


@dataclass(frozen=True)
class Hold(Schedule):
    """beta stays where it is. Above 0 the adapter never becomes linear and can never be merged; 0 is plain LoRA.

    Args:
        value: The value of beta, in [0, 1].
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_number("Hold: value", self.value)
        if not 0.0 <= self.value <= 1.0:
            raise AdapterError(f"Hold: value {self.value} must lie in [0, 1]")

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Adaptive(Schedule):
    """beta falls only while training improves, and is 0 from `end` on in any case.

    Training improves while the smoothed loss, or the smoothed value of `monitor`, does not get worse. A step that
    improves takes off its share of `duration`. As a deadline, beta never lies above the ramp of that slope which
    reaches 0 at `end`. Called with the progress alone, as where no loss is known, the schedule is that last ramp.

    Args:
        start: Progress before which beta is 1.
        duration: Share of the training that annealing takes if training always improves.
        end: Progress from which beta is 0.
        window: Optimiser steps over which values are smoothed; training gets worse when the average over a fifth of
            the window is worse than the average over the whole window.
        monitor: Name of a value that `training_step` logs, such as "train/reward"; by default the loss that
            `training_step` returns, or what the module names as its `default_monitor` (GRPO: "train/reward").
        mode: "min" or "max": whether low or high values of `monitor` are good. By default "min" for a name with
            "loss", "max" for one with "reward" or "accuracy".

    Raises:
        AdapterError: Not 0 <= start < start + duration <= end <= 1; window below 5; a mode without a monitor; or a
            monitor whose name does not tell the mode.
    """

    start: float = 0.0
    duration: float = 0.3
    end: float = 0.8
    window: int = 50
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None

    def __post_init__(self) -> None:
        for name in ("start", "duration", "end"):
            check_number(f"Adaptive: {name}", getattr(self, name))
        if not (
            self.start >= 0.0 and self.duration > 0.0 and self.start + self.duration <= self.end + 1e-9 <= 1.0 + 1e-9
        ):
            raise AdapterError(
                f"Adaptive: start {self.start}, duration {self.duration} and end {self.end} must be "
                "0 <= start < start + duration <= end <= 1"
            )
        check_whole("Adaptive: window", self.window, low=5)
        if self.mode is not None:
            check_choice("Adaptive: mode", self.mode, ("min", "max"))
        if not isinstance(self.monitor, (str, type(None))):
            raise AdapterError(f"Adaptive: monitor {shown(self.monitor)} must be the name of a logged value")
        if self.monitor is not None:
            monitor_mode(self.monitor, self.mode)
        elif self.mode is not None:
            raise AdapterError(
                f"Adaptive: mode {shown(self.mode)} belongs to a monitor; set one, or leave the mode out"
            )

    def __call__(self, progress: float) -> float:
        return min(1.0, max(0.0, (self.end - progress) / self.duration))

    def advance(self, beta: float, progress: float, elapsed: float, worse: bool) -> float:
        """beta after `elapsed` more of the training, now at `progress`, given whether training is getting worse."""
        if not worse and progress > self.start:
            beta -= min(elapsed, progress - self.start) / self.duration
        return max(0.0, min(beta, self(progress)))

    def to_config(self) -> dict[str, Any]:
        """As `Schedule`; without `monitor` and `mode` where they are not set, as files of version 0.1 lack them."""
        config = super().to_config()
        config["init_args"] = {name: value for name, value in config["init_args"].items() if value is not None}
        return config


def monitor_mode(monitor: str, mode: Literal["min", "max"] | None = None) -> Literal["min", "max"]:
    """Whether low ("min") or high ("max") values of a logged value are good.

    Args:
        monitor: The name under which it is logged.
        mode: What the user says; by default the name tells it.

    Raises:
        AdapterError: There is no `mode`, and the name holds none of "loss", "reward" and "accuracy".
    """
    if mode is not None:
        return mode
    if "loss" in monitor:
        return "min"
    if "reward" in monitor or "accuracy" in monitor:
        return "max"
    raise AdapterError(
        f"Adaptive: the name of monitor {shown(monitor)} does not tell whether low or high values are good; "
        "set mode to 'min' or 'max'"
    )


def to_schedule(schedule: Any) -> Schedule:
    """A schedule from an object or its `{class_path, init_args}` form.

    Raises:
        AdapterError: Something else was given, the class path names no schedule, or the class refuses the arguments.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Mapping) and "class_path" in schedule:
        return build(schedule, Schedule, __name__, "schedule")  # type: ignore[type-abstract]
    raise AdapterError(f"{shown(schedule)} is no schedule; give one such as lit_adapters.schedules.Linear(end=0.3)")
