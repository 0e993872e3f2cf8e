"""Checks in the first steps of a training that every adapter takes part: an adapter that never runs fails silently."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lit_adapters.errors import AdapterError
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.model.record import adapters
from lit_adapters.model.sharding import whole
from lit_adapters.model.watch import leave_gradients_to_others
from lit_adapters.training.attached import adapter_layers, attached_models

_PATIENCE = 100  # steps in a row without any gradient, as where all rewards are equal, before they count


class ParticipationCheck:
    """Watches the first batch for adapters that do not run, and the first steps for parameters that do not learn.

    Args:
        model: The module being trained.
        allow_unused: Regular expressions for whole parameter names that may go without gradient (mixtures of experts,
            layer drop).

    Raises:
        AdapterError: An expression of `allow_unused` is not valid.
    """

    def __init__(self, model: nn.Module, allow_unused: Sequence[str] = ()) -> None:
        try:
            allowed = [re.compile(pattern) for pattern in allow_unused]
        except re.error as error:
            raise AdapterError(f"allow_unused {error.pattern!r} is not a regular expression: {error}") from error
        for attached in attached_models(model).values():
            leave_gradients_to_others(attached)  # raised here, and `allow_unused` is known
        self._required = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not any(pattern.fullmatch(name) for pattern in allowed)
        }
        # An annealed activation may pass no gradient now (a dead ReLU) and some later.
        annealed = {id(p) for _, a in adapters(model) if a.schedule for p in a.adapter_parameters().values()}
        self._without_gradient = {name for name, parameter in self._required.items() if id(parameter) not in annealed}
        self._stepped = False
        self._steps_without_any = 0
        self._ran: set[str] = set()
        self._layers = adapter_layers(model)
        self._handles: list[Any] = [
            adapter.register_forward_pre_hook(lambda *_, name=name: self._ran.add(name))
            for name, adapter in self._layers.items()
        ]
        for name, adapter in self._layers.items():
            if isinstance(adapter, WeightAdapter):
                adapter.on_read = partial(self._ran.add, name)

    @property
    def watching(self) -> bool:
        """Whether the first batch is still to pass."""
        return bool(self._handles)

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for adapter in self._layers.values():
            if isinstance(adapter, WeightAdapter):
                adapter.on_read = None

    def after_forward(self) -> str | None:
        """Stop watching.

        Returns:
            What is wrong, if an adapter did not run in the batch that has just passed; None otherwise.
        """
        self.stop()
        required = {id(p) for p in self._required.values()}
        idle = [
            name
            for name, adapter in self._layers.items()
            if name not in self._ran and any(id(p) in required for p in adapter.adapter_parameters().values())
        ]
        if not idle:
            return None
        return (
            f"{len(idle)} of {len(self._layers)} adapters did not run: {', '.join(idle[:6])}. The model bypasses "
            "these layers: exclude them, turn off the fusion that reads their weights, or name their parameters in "
            "allow_unused"
        )

    def before_step(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> None:
        """Look at the gradients that `optimizer` is about to use.

        Zero gradients are normal at first: A of a low-rank pair gets none until B has moved, and B none behind a head
        that starts at zero. So this raises only if the step before changed parameters, and no further parameter has its
        first gradient now. Steps in which all gradients are zero (all rewards equal, say) are passed over, up to 100 in
        a row.

        Args:
            optimizer: The one that steps.
            optimizers: All of the training; parameters of the others are not looked at.

        Raises:
            AdapterError: A trainable parameter has no gradient, or one of exactly zero that no further step can change.
        """
        if not self._without_gradient:
            return
        others = {id(p) for o in optimizers if o is not optimizer for g in o.param_groups for p in g["params"]}
        watched = {n: p for n, p in self._required.items() if n in self._without_gradient and id(p) not in others}
        for name, parameter in watched.items():
            if parameter.grad is None:
                raise AdapterError(
                    f"{name!r} trains but received no gradient: it takes no part in the loss. Exclude its module, "
                    "or name it in allow_unused"
                )
        if not any(whole(p.grad).any() for p in self._required.values() if p.grad is not None):
            self._steps_without_any += 1
            if self._steps_without_any < _PATIENCE:
                return
        else:
            self._steps_without_any = 0
        # In order, as the processes of a sharded model put each gradient together.
        awake = [name for name, parameter in watched.items() if whole(parameter.grad).any()]  # type: ignore[arg-type]
        self._without_gradient -= set(awake)
        asleep = [name for name in watched if name not in awake]
        if asleep:
            given_up = self._given_up()
            asleep = [name for name in asleep if id(watched[name]) not in given_up]
        if asleep and self._stepped and not awake:
            raise AdapterError(
                f"{asleep[0]!r} still has a gradient of exactly zero after the first steps ({len(asleep)} such "
                "parameters): it does not learn. Give all trainable parameters to the optimiser, exclude the module, "
                "or name it in allow_unused"
            )
        # A step at rate 0 (warm-up), or one that a gradient scaler will skip, moves nothing.
        rates = all(group["lr"] > 0 for group in optimizer.param_groups)
        self._stepped = rates and all(bool(torch.isfinite(whole(watched[name].grad)).all()) for name in awake)  # type: ignore[arg-type]

    def _given_up(self) -> set[int]:
        """The identities of the parameters of layers that a rank allocation has left without any direction."""
        kept = {name: adapter.kept_directions() for name, adapter in self._layers.items()}
        empty = [self._layers[name] for name, directions in kept.items() if directions and not any(directions)]
        return {id(parameter) for adapter in empty for parameter in adapter.adapter_parameters().values()}
