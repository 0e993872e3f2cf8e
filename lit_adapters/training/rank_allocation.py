"""Allocates the ranks of adapters with the optimiser steps of a training, in whatever loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_adapters.errors import AdapterError
from lit_adapters.files.checkpoint_schema import is_named
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.allocation import Allocation, add_orthogonality_gradient
from lit_adapters.model.record import adapters


class RankAllocation:
    """Gives the layers of AdaLoRA and its kin their ranks, and keeps their factors orthogonal.

    Examples:
        >>> allocation = RankAllocation(model)
        >>> allocation.start(0, total_steps)
        >>> for step, batch in enumerate(loader, start=1):
        ...     loss(model, batch).backward()
        ...     allocation.add_orthogonality()
        ...     optimizer.step()
        ...     allocation.update(step)
        ...     optimizer.zero_grad()

    Args:
        model: Holds the adapters.

    Raises:
        AdapterError: The settings of a method leave nothing to allocate, or it cannot be trained here.
    """

    def __init__(self, model: nn.Module) -> None:
        groups: dict[Allocation, dict[str, AdapterModule]] = {}
        for name, adapter in adapters(model):
            if adapter.allocation is not None:
                groups.setdefault(adapter.allocation, {})[name] = adapter
        self._groups = list(groups.items())
        self._allocators = [allocation.allocator(layers) for allocation, layers in self._groups]
        self._step, self._total = 0, 0.0

    def __bool__(self) -> bool:
        """Whether there is anything to allocate."""
        return bool(self._allocators)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the layers whose ranks are allocated."""
        return [p for _, layers in self._groups for a in layers.values() for p in a.adapter_parameters().values()]

    def optimizer(self, optimizers: list[Optimizer]) -> Optimizer:
        """The optimiser that trains these layers.

        Raises:
            AdapterError: None or several do.
        """
        own = {id(p) for p in self.parameters()}
        found = [o for o in optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]
        if len(found) != 1:
            raise AdapterError(
                f"ranks are allocated after the steps of one optimiser, and {len(found)} hold parameters of these "
                "adapters: give all of them to one"
            )
        return found[0]

    def start(self, step: int, total_steps: float, state: list[dict[str, Any]] | None = None) -> None:
        """Begin, or go on.

        Args:
            step: Optimiser steps that are done.
            total_steps: Optimiser steps of the whole training; infinite or negative if it has no known end.
            state: What `state_dict` returned, in a run that is resumed.

        Raises:
            AdapterError: The schedule does not fit into the training, or the state belongs to another run.
        """
        if not self:
            return
        for allocator in self._allocators:
            allocator.start(total_steps)
        if step > 0 and (state is None or len(state) != len(self._allocators)):
            raise AdapterError(
                f"ranks cannot be allocated from step {step} on: the checkpoint holds nothing of the allocation of the "
                "steps before. It was written by an earlier version or another run; start a new run"
            )
        for allocator, own in zip(self._allocators, state or (), strict=False):
            allocator.load_state_dict(own)
        self._step, self._total = step, total_steps

    def add_orthogonality(self) -> None:
        """Add the gradients of the penalties; call it before gradients are clipped, and once for an optimiser step."""
        for allocation, layers in self._groups:
            if allocation.orthogonality:
                factors = [factor for adapter in layers.values() for factor in adapter.orthogonal_factors()]
                add_orthogonality_gradient(factors, allocation.orthogonality)

    def begin_gradients(self, scale: float = 1.0) -> None:
        """Give the factors the gradients of the penalties before the first backward pass of an optimiser step.

        It takes the place of `add_orthogonality` in a loop that clips gradients where nothing can be added before.

        Args:
            scale: The factor on the loss, of a gradient scaler.
        """
        for allocation, layers in self._groups:
            if allocation.orthogonality:
                factors = [factor for adapter in layers.values() for factor in adapter.orthogonal_factors()]
                for parameter, _ in factors:
                    parameter.grad = torch.zeros_like(parameter)
                add_orthogonality_gradient(factors, scale * allocation.orthogonality)

    def update(self, step: int) -> None:
        """Look at the gradients of an optimiser step, and give up directions if it is time; before they are zeroed.

        A step without any gradient counts as none.

        Args:
            step: Optimiser steps that are done.

        Raises:
            AdapterError: Some of the layers have no gradient.
        """
        if all(p.grad is None for p in self.parameters()):
            return
        self._step = step
        for allocator in self._allocators:
            allocator.update(step)
        for _, layers in self._groups:
            for adapter in layers.values():
                adapter.clear_caches()

    def unfinished(self) -> str:
        """In words, where the allocation stands if it has not ended; empty if it has."""
        if all(allocator.finished for allocator in self._allocators):
            return ""
        return f"at step {self._step} of {self._total:g}"

    def state_dict(self) -> list[dict[str, Any]]:
        """What a resumed run needs: for each method, tensors and plain values."""
        return [allocator.state_dict() for allocator in self._allocators]


def is_allocation(value: Any) -> bool:
    """Whether a value of a checkpoint has the form of `RankAllocation.state_dict`."""

    def is_kept(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(kept, bool) for kept in value)

    def fits(own: Any) -> bool:
        return (
            is_named(own)
            and isinstance(own.get("finished"), bool)
            and is_named(own.get("pattern"), is_kept)
            and all(is_named(own.get(k), lambda t: isinstance(t, Tensor)) for k in ("sensitivity", "uncertainty"))
        )

    return isinstance(value, list) and all(map(fits, value))
