"""What the adapters of a run say at a step: scalars by tag, and the figures that are worth their time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.files.checkpoint_schema import is_count, is_named, is_number
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.model.sharding import gathered, is_sharded
from lit_adapters.training.attached import adapter_layers
from lit_adapters.training.boards import Board
from lit_adapters.training.observer import InputObserver
from lit_adapters.training.processes import is_first_process, raise_together
from lit_adapters.training.subspace_tracker import SubspaceTracker
from lit_adapters.training.tensorboard import add_figures

_MAX_DRAWING_SHARE = 0.02  # of the time of a training, apart from its last figures
# How long drawing is assumed to take before anything was drawn.
_INITIAL_DRAW_SECONDS = 1.0
_INITIAL_DRAW_SECONDS_PER_ACTIVATION = 0.4


Statistic = Literal["functions", "weights", "subspace"]


def checked_statistics(statistics: Sequence[str]) -> tuple[str, ...]:
    """The statistics that a callback was asked for.

    Raises:
        AdapterError: One of them is unknown.
    """
    unknown = sorted(set(statistics) - set(get_args(Statistic)))
    if unknown:
        raise AdapterError(f"unknown statistics {unknown}; choose among 'functions', 'weights' and 'subspace'")
    return tuple(statistics)


class Recorder:
    """Collects the statistics of adapters at a step, and draws them.

    The first process computes; of a sharded model all have to, as each gathers what the others hold.

    Args:
        model: Holds the adapters.
        statistics: "functions" (NoRA's activations), "weights" (updates of weights), "subspace" (ranks and spectra of
            both, also where only these are asked for).
        state: What `state_dict` returned, in a run that is resumed.

    Attributes:
        charted: The layers whose "functions" or "weights" are recorded, by name.
        subspace: Whether "subspace" is recorded.
        observer: Looks at the inputs of the `charted` layers.
        step: The optimiser step that was recorded last; -1 before the first record.
    """

    def __init__(self, model: nn.Module, statistics: Sequence[str], state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        layers = adapter_layers(model)
        self.subspace = "subspace" in statistics
        self.charted = {name: adapter for name, adapter in layers.items() if _kind(adapter) in statistics}
        self._layers = layers if self.subspace else self.charted
        self._functions = [adapter for adapter in layers.values() if adapter.learned_functions() is not None]
        self._tracker = SubspaceTracker(layers, state.get("coefficients")) if self.subspace else None
        self.observer = InputObserver(self.charted)
        self.observer.scalars = dict(state.get("observed", {}))
        self.observer.step = state.get("observed_step", -1)
        self._sharded = is_sharded(model)
        self.step = state.get("step", -1)
        self._drawn_step = -1
        self._drawn_at = time.monotonic()
        self._drawing_seconds = _INITIAL_DRAW_SECONDS + _INITIAL_DRAW_SECONDS_PER_ACTIVATION * len(self._functions)

    def state_dict(self) -> dict[str, Any]:
        """What the next record of a resumed run needs."""
        return {
            "step": self.step,
            "coefficients": {} if self._tracker is None else self._tracker.coefficients,
            "observed": self.observer.scalars,
            "observed_step": self.observer.step,
        }

    def record(self, step: int, beta: float | None) -> dict[str, float]:
        """Collect the statistics of a step, once; every process calls this.

        Args:
            step: Optimiser steps that are done.
            beta: The largest coefficient of annealed adapters, if there are any.

        Returns:
            The scalars by tag; empty if the step has been recorded, and in processes that do not compute.

        Raises:
            AdapterError: What an adapter learned is too large to be computed with, or not finite.
        """
        if step == self.step:
            return {}
        self.step = step
        observed = self.observer.means(step)
        scalars: dict[str, float] = {}
        failure = None
        if is_first_process() or self._sharded:
            try:
                scalars = self._collect(observed, beta)
            except torch.linalg.LinAlgError as error:
                failure = (
                    f"the adapters have grown beyond all bounds at step {step} ({error}). Lower the learning rate or "
                    "clip gradients; checkpoints were written before this step"
                )
        raise_together(failure)
        return scalars

    def _collect(self, observed: Mapping[str, dict[str, float]], beta: float | None) -> dict[str, float]:
        scalars: dict[str, float] = {}
        collected: dict[str, list[float]] = {}
        for name, adapter in self._layers.items():
            for statistic, value in self._of_layer(name, adapter, observed).items():
                scalars[f"adapter/{adapter.method}/{name}/{statistic}"] = value
                collected.setdefault(statistic, []).append(value)
        if self._tracker is not None:
            with gathered(*self._functions):
                space = self._tracker.functions()
            scalars |= {f"adapter/subspace/{statistic}": value for statistic, value in space.items()}
        if beta is not None:
            scalars["adapter/beta"] = beta
        for statistic, values in collected.items():
            scalars[f"adapter/summary/{statistic}"] = sum(values) / len(values)
        return scalars

    def _of_layer(
        self, name: str, adapter: AdapterModule, observed: Mapping[str, dict[str, float]]
    ) -> dict[str, float]:
        with gathered(adapter):
            values = adapter.statistics() if name in self.charted else {}
            values |= observed.get(name, {})
            values |= self._tracker.layer(name) if self._tracker else {}
        return values

    def draw(self, boards: Sequence[Board], step: int, last: bool = False) -> None:
        """Add histograms and figures to boards; every process calls this.

        Figures that are not the last ones are left out if drawing would take more than a fiftieth of the time since the
        figures before, or if the model is sharded.

        Args:
            boards: Where to; none in processes that do not write.
            step: Optimiser steps that are done.
            last: Whether the training is over.
        """
        takes_part = is_first_process() or self._sharded
        if step == self._drawn_step or not (takes_part and self._layers):
            return
        start = time.monotonic()
        # Clocks differ, and all processes of a sharded model have to draw together.
        too_soon = self._sharded or start - self._drawn_at < self._drawing_seconds / _MAX_DRAWING_SHARE
        if too_soon and not last:
            return
        add_figures(boards, self._layers, self.observer, self.subspace, step)
        self._drawn_step = step
        self._drawn_at = time.monotonic()
        self._drawing_seconds = self._drawn_at - start


def _kind(adapter: AdapterModule) -> str:
    return "weights" if adapter.learned_functions() is None else "functions"


def is_recorded(value: Any) -> bool:
    """Whether a value of a checkpoint has the form of `Recorder.state_dict`."""
    if value is None or value == {}:
        return True
    return (
        is_named(value)
        and all(_is_step(value.get(name)) for name in ("step", "observed_step"))
        and is_named(value.get("coefficients"))
        and is_named(value.get("observed"), lambda inner: is_named(inner, is_number))
    )


def _is_step(value: Any) -> bool:
    return value == -1 or is_count(value)  # -1 stands for none
