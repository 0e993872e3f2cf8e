"""Moves annealed adapters with the optimiser steps of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.files.checkpoint_schema import is_named, is_number
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.model.record import adapters
from lit_adapters.model.unfinished import leave_the_end_to_others
from lit_adapters.schedules import Adaptive, Schedule

_LINEAR_SHARE = 0.05  # of the training, at its end, if an early stop is put off


class Watched(NamedTuple):
    """What an adaptive schedule looks at.

    Attributes:
        monitor: Name of a logged value; None for the loss.
        mode: "min" or "max", where the schedule says so.
    """

    monitor: str | None = None
    mode: Literal["min", "max"] | None = None


LOSS = Watched()


class Annealer:
    """Keeps every scheduled adapter at the progress of the training, and watches values for adaptive schedules.

    Progress is the share of the optimiser steps that are done, so gradient accumulation, batch limits and several
    epochs need nothing special. The betas are buffers of the adapters, in float32. An adaptive schedule goes on from
    its own last beta, so they are kept here too, in Python's precision: then a resumed run equals the
    uninterrupted one.

    Args:
        model: Holds the adapters.
        state: What `state_dict` returned, in a run that is resumed.

    Attributes:
        layers: The scheduled adapters and their schedules.
        watched: What `observe` must be given for each batch; empty without an adaptive schedule.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Any] | None = None) -> None:
        self.layers: list[tuple[AdapterModule, Schedule]] = [
            (adapter, adapter.schedule) for _, adapter in adapters(model) if adapter.schedule is not None
        ]
        leave_the_end_to_others(adapter for _, adapter in adapters(model))  # the owner of this object tells it
        adaptive = [schedule for _, schedule in self.layers if isinstance(schedule, Adaptive)]
        self.watched = {_watched(schedule) for schedule in adaptive}
        self._windows = {schedule.window for schedule in adaptive}
        self._betas: list[float] = []
        self._total = 0
        self._step = 0
        self._averages: dict[Watched, _Averages] = {LOSS: _Averages()}
        if state is not None:
            self._load(state)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain values."""
        loss = self._averages[LOSS].state_dict()
        state = {"betas": list(self._betas), "loss": loss["sum"], "batches": loss["count"], "means": loss["means"]}
        others = [{**w._asdict(), **a.state_dict()} for w, a in self._averages.items() if w != LOSS]
        return state | ({"monitors": others} if others else {})

    def _load(self, state: Mapping[str, Any]) -> None:
        self._betas = list(state["betas"])
        # Older checkpoints have no numbers of batches.
        self._averages[LOSS].load(state["loss"], state.get("batches", 1 if state["loss"] else 0), state["means"])
        for other in state.get("monitors", []):
            averages = self._averages[Watched(other["monitor"], other["mode"])] = _Averages()
            averages.load(other["sum"], other.get("count", 1 if other["sum"] else 0), other["means"])

    def start(self, step: int, total_steps: float) -> None:
        """Set beta of every adapter to its value at `step`.

        Args:
            step: Optimiser steps that are done.
            total_steps: Optimiser steps of the whole training.

        Raises:
            AdapterError: There is a schedule, and `total_steps` is infinite or negative (unknown).
        """
        if not self.layers:
            return
        if not math.isfinite(total_steps) or total_steps < 0:
            raise AdapterError(
                f"{self.layers[0][1]} is a function of training progress, and this training has no end that is known; "
                "set max_steps, or max_epochs where the data have a length"
            )
        self._step, self._total = step, int(total_steps)
        if len(self._betas) != len(self.layers):
            self._betas = [adapter.beta.item() for adapter, _ in self.layers]  # type: ignore[operator]
        self._move(0.0)

    def linear_from(self) -> int:
        """The first step at which a run may stop early.

        All schedules that end at 0 have reached it by then, and a twentieth of all steps has followed.
        """
        schedules = [schedule for _, schedule in self.layers if schedule(1.0) == 0.0]
        if not schedules:
            return 0
        steps = range(self._total + 1)
        ends = (s for s in steps if all(schedule(s / self._total) == 0.0 for schedule in schedules))
        return min(self._total, next(ends, self._total) + math.ceil(_LINEAR_SHARE * self._total))

    @property
    def beta(self) -> float | None:
        """The largest coefficient of all layers; None where nothing is annealed."""
        return max(self._betas, default=None)

    def observe(self, watched: Watched, value: float) -> None:
        """Take the value of one batch; of those of the same optimiser step the mean counts.

        Args:
            watched: One of `self.watched`.
            value: Falls as training improves (a reward with its sign changed).
        """
        self._averages.setdefault(watched, _Averages()).add(value)

    def advance(self, step: int) -> None:
        """Move the adapters if optimiser steps were done since the last call.

        Args:
            step: Optimiser steps that are done.
        """
        elapsed = step - self._step
        if not self.layers or elapsed <= 0:
            return
        self._step = step
        for watched in self.watched:
            self._averages.setdefault(watched, _Averages()).update(self._windows)
        self._move(elapsed / self._total)

    def _move(self, elapsed: float) -> None:
        progress = min(1.0, self._step / self._total) if self._total else 1.0
        for i, (adapter, schedule) in enumerate(self.layers):
            if isinstance(schedule, Adaptive):
                averages = self._averages.get(_watched(schedule))
                worse = averages is not None and averages.rising(schedule.window)
                self._betas[i] = schedule.advance(self._betas[i], progress, elapsed, worse)
            else:
                self._betas[i] = min(self._betas[i], schedule(progress))  # what is linear by now stays so
            adapter.set_beta(self._betas[i])  # type: ignore[operator]

    def nonlinear(self) -> list[str]:
        """Names of the layers whose beta is above 0."""
        layers = zip(self.layers, self._betas, strict=True) if self._betas else ()
        return [adapter.qualified_name for (adapter, _), beta in layers if beta > 0]


class _Averages:
    """The sum of a value over the batches since the last step, and its running means over steps.

    A step's value is the mean over its batches: the last step of an epoch may have fewer. Steps without a value change
    nothing.

    Attributes:
        sum: Of the values since the last step.
        count: How many they are.
        means: For each window, in steps: the running mean over a fifth of the window, and over the window.
    """

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0
        self.means: dict[int, tuple[float, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        means = {str(window): list(means) for window, means in self.means.items()}
        return {"sum": self.sum, "count": self.count, "means": means}

    def load(self, value: float, count: int, means: Mapping[str, Any]) -> None:
        self.sum, self.count = value, count
        self.means = {int(window): (fast, slow) for window, (fast, slow) in means.items()}

    def add(self, value: float) -> None:
        self.sum, self.count = self.sum + value, self.count + 1

    def update(self, windows: set[int]) -> None:
        """Take the mean into the running means at the end of an optimiser step, and begin a new sum."""
        if not self.count:
            return
        value = self.sum / self.count
        for window in windows:
            fast, slow = self.means.get(window, (value, value))
            fast += (value - fast) * min(1.0, 5 / window)
            slow += (value - slow) / window
            self.means[window] = fast, slow
        self.sum, self.count = 0.0, 0

    def rising(self, window: int) -> bool:
        fast, slow = self.means.get(window, (0.0, 0.0))
        return fast > slow


def _watched(schedule: Adaptive) -> Watched:
    return Watched(schedule.monitor, schedule.mode)


def is_annealing(value: Any) -> bool:
    """Whether a value of a checkpoint has the form of `Annealer.state_dict`."""
    if value is None or value == {}:  # of a run that was saved before it began
        return True
    if not is_named(value) or not is_number(value.get("loss")) or not _is_means(value.get("means")):
        return False
    if not is_number(value.get("batches", 1)):
        return False
    betas, monitors = value.get("betas"), value.get("monitors", [])
    return (
        isinstance(betas, list)
        and all(is_number(beta) and 0 <= beta <= 1 for beta in betas)
        and isinstance(monitors, list)
        and all(is_named(m) and _is_sum(m) and _is_means(m.get("means")) for m in monitors)
    )


def _is_sum(value: Any) -> bool:
    return is_number(value.get("sum")) and is_number(value.get("count", 1))


def _is_means(value: Any) -> bool:
    def is_pair(pair: Any) -> bool:
        return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_number, pair))

    return is_named(value, is_pair) and all(window.isdecimal() and len(window) < 10 for window in value)
