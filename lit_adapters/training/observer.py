"""Observe the inputs of adapters while they train, in the batches whose step will be recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.training.processes import gather_objects


class InputObserver:
    """Histograms of the inputs of adapters, added up over a run, and the scalars that adapters compute from them.

    `AdapterModule.observe` and `input_histogram` decide what is observed of a layer. Each forward pass contributes a
    sample of a few thousand values, which costs next to nothing. Passes without gradients are not observed: a training
    step makes them to generate text or to ask a reference model. In a model that was compiled as a whole, hooks may not
    run; then nothing is observed.

    Attributes:
        counts: The histogram (D + 2,) of the inputs that this process has seen, by layer: below the layer's grid, in
            each of its D parts, above it.
        scalars: What `AdapterModule.observe` returned in the last observed batch, by layer.
        step: The optimiser step that the last observed batch led to.
    """

    def __init__(self, layers: Mapping[str, AdapterModule]) -> None:
        self._layers = dict(layers)
        self._handles: list[Any] = []
        self.counts: dict[str, Tensor] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        self.step = -1

    def start(self) -> None:
        """Observe the next batch."""
        self.stop()
        self.scalars = {}
        for name, adapter in self._layers.items():
            hook = self._hook(name)
            self._handles.append(adapter.register_forward_pre_hook(hook, with_kwargs=True))

    def end_batch(self, step: int) -> None:
        """Stop observing; what was seen belongs to optimiser step `step`."""
        if self._handles:
            self.step = step
        self.stop()

    def stop(self) -> None:
        """Stop observing."""
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
            counted = adapter.input_histogram(x)
            if counted is not None:
                before = self.counts.get(name)
                self.counts[name] = counted if before is None else before + counted

        return observe

    def means(self, step: int) -> dict[str, dict[str, float]]:
        """`scalars` of a step, each averaged over the processes that saw the layer; every process must call this."""
        collected: dict[str, dict[str, list[float]]] = {}
        for scalars in gather_objects(self.scalars if self.step == step else {}):
            for name, values in scalars.items():
                for key, value in values.items():
                    collected.setdefault(name, {}).setdefault(key, []).append(value)
        return {n: {k: sum(v) / len(v) for k, v in values.items()} for n, values in collected.items()}

    def density(self, name: str) -> Tensor | None:
        """The share (D,) of the inputs seen so far in each part of the layer's grid; None if nothing was seen there."""
        inside = self.counts[name][1:-1].double() if name in self.counts else torch.zeros(1)
        return inside / inside.sum() if inside.any() else None
