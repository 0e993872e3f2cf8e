"""Checks during the first steps of training that every adapter takes part: silence is the usual failure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lit_adapters.attach import adapters
from lit_adapters.errors import AdapterError


class Probe:
    """Watches the first batch for adapters that do not run, and the first steps for parameters without gradient.

    Args:
        model: the module being trained.
        allow_unused: regular expressions for whole parameter names that may go without gradient (mixtures of experts,
            layer drop).
    """

    def __init__(self, model: nn.Module, allow_unused: Sequence[str] = ()) -> None:
        self.model = model
        self.allow_unused = allow_unused
        self.ran: set[str] = set()
        self.learning_steps = 0
        self.handles: list[Any] = []
        for name, adapter in adapters(model):
            self.handles.append(adapter.register_forward_pre_hook(lambda *_, name=name: self.ran.add(name)))

    def after_forward(self) -> None:
        """Raise if an adapter was bypassed by the batch that has just passed; then stop watching."""
        if not self.handles:
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        idle = [name for name, _ in adapters(self.model) if name not in self.ran]
        if idle and not any(re.fullmatch(p, n) for p in self.allow_unused for n in idle):
            raise AdapterError(
                f"{len(idle)} adapters did not run: {', '.join(idle[:6])}. The model bypasses these layers; "
                "exclude them, or turn off the fusion that reads their weights"
            )

    def before_step(self, learning_rates: Sequence[float]) -> None:
        """Raise if a trainable parameter has no gradient; or, once a step was taken, a gradient of exactly zero.

        Before the first step a zero is right: LoRA's A and NoRA's A wait for their B to move.
        """
        if self.learning_steps > 1:
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or any(re.fullmatch(p, name) for p in self.allow_unused):
                continue
            grad: Tensor | None = parameter.grad
            if grad is None:
                raise AdapterError(
                    f"{name!r} trains but received no gradient: it takes no part in the loss. Exclude its module, "
                    "or name it in allow_unused"
                )
            if self.learning_steps == 1 and not grad.any():
                raise AdapterError(
                    f"{name!r} has a gradient of exactly zero after the first step: it does not learn. Exclude its "
                    "module, or name it in allow_unused"
                )
        if all(rate > 0 for rate in learning_rates):
            self.learning_steps += 1
