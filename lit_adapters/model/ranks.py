"""The ranks that a training has allocated to the layers of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.peft_allocation import AdaLoRAAllocation


def kept_directions(model: nn.Module) -> dict[str, list[bool]]:
    """The directions that are kept, by layer; without the layers of methods that have not given up any.

    Args:
        model: With its adapters.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdapterModule) and m.allocation is not None}
    found = {name: adapter.kept_directions() for name, adapter in layers.items()}
    kept: dict[str, list[bool]] = {}
    for name, adapter in layers.items():
        alike = [own for other, own in found.items() if layers[other].allocation is adapter.allocation]
        known = [own for own in alike if own is not None]
        if all(all(own) for own in known):
            continue
        # Where others of the method have directions, a layer without any has lost them all.
        own = found[name]
        kept[name] = [False] * len(known[0]) if own is None else own
    return kept


def with_ranks(methods: Sequence[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """The forms of methods with the ranks that the training has allocated, as peft writes them: in `rank_pattern`.

    Args:
        methods: Their `{class_path, init_args}` forms, as given to `attach`.
        model: The model with their adapters.
    """
    patterns: dict[int, dict[str, list[bool]]] = {}
    configs: dict[int, Mapping[str, Any]] = {}
    modules = dict(model.named_modules())
    for name, kept in kept_directions(model).items():
        allocation = modules[name].allocation
        if isinstance(allocation, AdaLoRAAllocation):
            configs[id(allocation)] = allocation.config
            patterns.setdefault(id(allocation), {})[f"{name}.lora_E"] = kept
    written = []
    for method in methods:
        config = method.get("init_args", {}).get("config")
        found = next((key for key, own in configs.items() if config is not None and own == config), None)
        if found is not None:
            arguments = method["init_args"] | {"config": {**config, "rank_pattern": patterns[found]}}
            method = {**method, "init_args": arguments}
        written.append(method)
    return written


def warn_unallocated(model: nn.Module, what: str) -> None:
    """Warn that `what` holds layers whose ranks should have been allocated, and were not.

    Args:
        model: The model with adapters.
        what: What is written, such as a directory; the warning begins with it.
    """
    kept = kept_directions(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdapterModule) and m.allocation is not None}
    left = [n for n, m in layers.items() if n not in kept and (own := m.kept_directions()) is not None and all(own)]
    if left:
        warnings.warn(
            f"{what} holds {len(left)} layers that keep all their ranks ({left[0]!r} first), as no training has "
            "allocated them: train with AdapterCallback, or use lit_adapters.training.rank_allocation in your loop",
            stacklevel=3,
        )
