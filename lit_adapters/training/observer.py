"""Looks at the inputs of adapters while they train, in the batches whose step is going to be recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_adapters.methods.base import AdapterModule
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.training.processes import gather_objects


class InputObserver:
    """Histograms of the inputs of adapted activations, added up over a run, and what adapters say of their inputs.

    Each forward pass contributes a regular sample of a few thousand values, so that a batch costs next to nothing. A
    pass without gradients, of a step that also generates or asks a reference, is none of the training and not seen. A
    model that was compiled as a whole may ignore hooks: then nothing is seen.

    Attributes:
        counts: by layer, (D + 2,): below the layer's grid, in each of its parts, above it; of this process's inputs.
        scalars: by layer, what `AdapterModule.observe` returned in the batch observed last.
        step: which that batch led to, in optimiser steps.
    """

    def __init__(self, layers: Mapping[str, AdapterModule]) -> None:
        self._layers = dict(layers)
        self._handles: list[Any] = []
        self.counts: dict[str, Tensor] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        self.step = -1

    def start(self) -> None:
        """Watch the batch that comes."""
        self.stop()
        self.scalars = {}
        for name, adapter in self._layers.items():
            hook = self._hook(name)
            self._handles.append(adapter.register_forward_pre_hook(hook, with_kwargs=True))

    def end_batch(self, step: int) -> None:
        """Watch no longer; what was seen belongs to `step`."""
        if self._handles:
            self.step = step
        self.stop()

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Any:
        def observe(adapter: AdapterModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    see(adapter, args[0] if args else next(iter(kwargs.values())))

        def see(adapter: AdapterModule, x: Tensor) -> None:
            self.scalars[name] = adapter.observe(x)
            if isinstance(adapter, NoRAActivation):
                counted = adapter.input_histogram(x)
                before = self.counts.get(name)
                self.counts[name] = counted if before is None else before + counted

        return observe

    def means(self, step: int) -> dict[str, dict[str, float]]:
        """`scalars` of a step, each the mean over the processes that saw the layer; all processes call this."""
        collected: dict[str, dict[str, list[float]]] = {}
        for scalars in gather_objects(self.scalars if self.step == step else {}):
            for name, values in scalars.items():
                for key, value in values.items():
                    collected.setdefault(name, {}).setdefault(key, []).append(value)
        return {n: {k: sum(v) / len(v) for k, v in values.items()} for n, values in collected.items()}

    def density(self, name: str) -> Tensor | None:
        """Shares of the inputs seen so far, on the parts of the layer's grid (D,); None if nothing was seen there."""
        inside = self.counts[name][1:-1].double() if name in self.counts else torch.zeros(1)
        return inside / inside.sum() if inside.any() else None
