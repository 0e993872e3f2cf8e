"""Parameter groups for the optimiser: what trains, at which rate, and what may decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lit_adapters.activations import LEARNED_ACTIVATIONS
from lit_adapters.errors import AdapterError
from lit_adapters.model.attach import adapters

HEAD = "head"  # the group of everything that trains and is not an adapter: the modules of `train`


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, lr_scale: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters in groups, as an optimiser takes them: one group for each method, and the head.

    Parameters for which decay makes no sense (`AdapterModule.undecayed_parameters`) are in groups of their own, without
    it. A rational function with a coefficient of zero, say, is not a simpler one.

    Args:
        model: A module whose tree may hold adapters.
        lr: The common learning rate.
        weight_decay: The decay of everything that may decay.
        lr_scale: The factor on `lr` by group: a method's name ("nora", "lora"), or "head" for everything that is not an
            adapter.

    Raises:
        AdapterError: Nothing trains, `lr_scale` names a group that does not exist, the learning rate is not a finite
            number above 0, or a scale or the decay not one of at least 0.
    """
    scale = dict(lr_scale or {})
    if isinstance(lr, (int, float)) and not 0 < lr < math.inf:
        raise AdapterError(f"lr {lr!r} must be a finite number above 0; change the optimizer's init_args")
    for name, value in {"weight_decay": weight_decay, **{f"lr_scale of {k!r}": v for k, v in scale.items()}}.items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise AdapterError(f"{name} {value!r} must be a finite number of at least 0")
    functions = (m for m in model.modules() if isinstance(m, LEARNED_ACTIVATIONS))
    undecayed = {id(p) for m in functions for p in m.parameters()}
    kind: dict[int, str] = {}
    for _, adapter in adapters(model):
        kind |= {id(p): adapter.method for p in adapter.adapter_parameters().values()}
        undecayed |= {id(p) for p in adapter.undecayed_parameters()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (kind.get(id(parameter), HEAD), id(parameter) not in undecayed)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise AdapterError("nothing trains: give `adapters`, or name modules in `train`")
    present = {name for name, _ in groups}
    unknown = sorted(scale.keys() - present)
    if unknown:
        raise AdapterError(f"lr_scale names {unknown[0]!r}; the trainable groups are {', '.join(sorted(present))}")
    return [
        {
            "params": parameters,
            # Lightning wants names to differ; where all of a method's parameters are alike, it keeps its own.
            "name": name if decays or (name, True) not in groups else f"{name}/no_decay",
            "lr": lr * scale.get(name, 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (name, decays), parameters in groups.items()
    ]
