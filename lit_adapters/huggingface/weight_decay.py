"""Keeps weight decay off parameters for which it makes no sense, in an optimiser that somebody else has made."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_adapters.optimizers.groups import undecayed


class DecayFilter:
    """Takes weight decay from some parameters for the time of an optimiser step.

    The optimiser's own groups stay as they are between steps, so that its saved state has the form that the Trainer
    makes, and a schedule finds the groups that it was made for.

    Args:
        model: Holds the adapters.
        optimizer: The one that trains them.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._undecayed = undecayed(model)
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] | None = None
        self._parts: list[tuple[dict[str, Any], dict[str, Any]]] = []  # an own group, and the first made of it

    def before_step(self) -> None:
        """Put the parameters that must not decay into groups of their own."""
        own = self._optimizer.param_groups
        split: list[dict[str, Any]] = []
        for group in own:
            without = [p for p in group["params"] if id(p) in self._undecayed]
            if not without or not group.get("weight_decay"):
                split.append(group)
                continue
            decaying = [p for p in group["params"] if id(p) not in self._undecayed]
            parts = [{**group, "params": decaying}] if decaying else []
            parts.append({**group, "params": without, "weight_decay": 0.0})
            self._parts.append((group, parts[0]))
            split += parts
        if len(split) > len(own) or any(a is not b for a, b in zip(split, own, strict=True)):
            self._groups, self._optimizer.param_groups = own, split

    def after_step(self) -> None:
        """Give the optimiser its groups back, with what the step has counted in them."""
        for group, part in self._parts:
            group.update({key: value for key, value in part.items() if key not in ("params", "weight_decay")})
        self._parts = []
        if self._groups is not None:
            self._optimizer.param_groups, self._groups = self._groups, None
