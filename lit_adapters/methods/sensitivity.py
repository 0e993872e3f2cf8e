"""AdaLoRA's way to give up directions, for layers of our own: by sensitivity, along a cubic schedule.

The sensitivity of a parameter p is the running mean of |p grad p| times the running mean of that value's deviation from
it. The score of a direction is the sum over the parameters that belong to it; of a row or column of a matrix, the mean
counts. After every `interval` steps the directions of the lowest scores are given up, over all layers together: their
singular values become 0. The optimiser moves these again, so that a direction may come back until the ranks are final.

peft's allocator does the same for peft's AdaLoRA (`peft_allocation.py`), and a test compares the two bit for bit. This
one needs no extra, takes a schedule in shares of the training, and works on sharded parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.allocation import Allocator, whole

_BETA_SENSITIVITY = 0.85
_BETA_UNCERTAINTY = 0.85


class ScoredLayer(Protocol):
    """A layer whose directions have scores.

    Attributes:
        kept: The directions that were kept last.
    """

    kept: list[bool] | None

    def drop_directions(self, kept: list[bool]) -> None:
        """Set the singular values of the other directions to 0."""

    def direction_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """The parameters that a score adds up: the singular values (r,), first and with None, and matrices.

        A matrix comes with its dimension of size r; the mean over the other one counts.
        """


@dataclass(frozen=True)
class RankSchedule:
    """How many directions are left after each optimiser step.

    Args:
        start: The share of the steps before the first direction is given up.
        end: The share of the steps from which the number is final.
        interval: Optimiser steps between two prunings.
    """

    start: float
    end: float
    interval: int

    def steps(self, total: int) -> tuple[int, int]:
        """The last step at which all directions are left, and the first at which their number is final.

        The latter is in the training, if that has two steps: one must go before, for the scores.
        """
        first = round(self.start * total)
        end = max(min(max(round(self.end * total), first + 1), total), 2)
        return min(first, end - 1), end

    def budget(self, step: int, total: int, initial: int, target: int) -> int | None:
        """The number of directions to keep after a step; None if the step gives up none.

        Args:
            step: Optimiser steps that are done.
            total: Those of the whole training.
            initial: The number of directions at the start.
            target: The number at the end.
        """
        first, end = self.steps(total)
        if step >= end:
            return target
        if step <= first or step % self.interval:
            return None
        left = 1 - (step - first) / (end - first)
        return int((initial - target) * left**3 + target)


class SensitivityAllocator(Allocator):
    """Gives up directions of the lowest sensitivity.

    Args:
        layers: The layers by name.
        target_rank: Directions that are left in a layer on average; None to keep all.
        schedule: When they are given up.
    """

    def __init__(self, layers: Mapping[str, ScoredLayer], target_rank: int | None, schedule: RankSchedule) -> None:
        self._layers = layers
        self._schedule = schedule
        self._sizes = {name: _values(layer).shape[0] for name, layer in layers.items()}
        self._initial = sum(self._sizes.values())
        self._target = self._initial if target_rank is None else target_rank * len(layers)
        self._total = 0
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._pattern: dict[str, list[bool]] = {}
        self._prunes = target_rank is not None
        self.finished = not self._prunes

    def start(self, total_steps: float) -> None:
        if not self._prunes:
            return
        if not math.isfinite(total_steps) or total_steps < 0:
            raise AdapterError(
                "target_rank is reached as a function of training progress, and this training has no end that is "
                "known; set max_steps, or max_epochs where the data have a length"
            )
        self._total = int(total_steps)
        for layer in self._layers.values():
            layer.kept = None  # of an earlier training

    def update(self, step: int) -> None:
        if not self._prunes:
            return
        if self.finished:
            self._mask()
            return
        _, end = self._schedule.steps(self._total)
        if step < end:
            self._look(step)
        budget = self._schedule.budget(step, self._total, self._initial, self._target)
        if budget is None:
            return
        self._choose(budget)
        self._mask()
        if step >= end:
            self.finished = True
            self._sensitivity, self._uncertainty = {}, {}

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """Take the gradients of a step into the running means."""
        for name, layer in self._layers.items():
            for key, (parameter, _) in layer.direction_parameters().items():
                if parameter.grad is None:
                    raise AdapterError(
                        f"'{name}.{key}' received no gradient at step {step}, so that its importance is not known; "
                        "exclude its module"
                    )
                full = f"{name}.{key}"
                now = (whole(parameter) * whole(parameter.grad)).abs()
                mean = self._sensitivity.get(full, torch.zeros_like(now))
                mean = _BETA_SENSITIVITY * mean + (1 - _BETA_SENSITIVITY) * now
                deviation = self._uncertainty.get(full, torch.zeros_like(now))
                deviation = _BETA_UNCERTAINTY * deviation + (1 - _BETA_UNCERTAINTY) * (now - mean).abs()
                self._sensitivity[full], self._uncertainty[full] = mean, deviation

    def _choose(self, budget: int) -> None:
        """Keep the directions of the highest scores."""
        scores = torch.cat([self._scores(name, layer) for name, layer in self._layers.items()])
        best = scores.argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[best] = True
        parts: Sequence[Tensor] = kept.split(list(self._sizes.values()))
        self._keep({name: part.tolist() for name, part in zip(self._layers, parts, strict=True)})

    def _scores(self, name: str, layer: ScoredLayer) -> Tensor:
        """The score of each direction of a layer, (r,)."""
        terms = []
        for key, (_, dimension) in layer.direction_parameters().items():
            entries = self._sensitivity[f"{name}.{key}"] * self._uncertainty[f"{name}.{key}"]
            terms.append(entries if dimension is None else entries.mean(dim=1 - dimension))
        values, *matrices = terms
        return (values + torch.stack(matrices, dim=1).sum(dim=1)).cpu()

    def _keep(self, pattern: dict[str, list[bool]]) -> None:
        self._pattern = pattern
        for name, kept in pattern.items():
            self._layers[name].kept = kept

    def _mask(self) -> None:
        for name, kept in self._pattern.items():
            self._layers[name].drop_directions(kept)

    def state_dict(self) -> dict[str, Any]:
        """Running means of the sensitivity and of its deviation by parameter, and the directions that are kept."""
        return {
            "sensitivity": {name: tensor.cpu() for name, tensor in self._sensitivity.items()},
            "uncertainty": {name: tensor.cpu() for name, tensor in self._uncertainty.items()},
            "pattern": dict(self._pattern),
            "finished": self.finished,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = {
            f"{name}.{key}": parameter
            for name, layer in self._layers.items()
            for key, (parameter, _) in layer.direction_parameters().items()
        }
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        found = [{name: tensor.shape for name, tensor in state[key].items()} for key in ("sensitivity", "uncertainty")]
        sizes = {name: len(kept) for name, kept in state["pattern"].items()}
        if found not in ([{}, {}], [shapes, shapes]) or sizes not in ({}, self._sizes):
            raise AdapterError(
                "the checkpoint's allocation of ranks belongs to other layers; resume with the run's own"
            )
        devices = {name: parameter.device for name, parameter in parameters.items()}
        self._sensitivity = {name: tensor.to(devices[name]) for name, tensor in state["sensitivity"].items()}
        self._uncertainty = {name: tensor.to(devices[name]) for name, tensor in state["uncertainty"].items()}
        self._keep({name: list(kept) for name, kept in state["pattern"].items()})
        self.finished = state["finished"] or not self._prunes


def _values(layer: ScoredLayer) -> nn.Parameter:
    """The singular values (r,)."""
    return next(iter(layer.direction_parameters().values()))[0]
