"""Parameter groups for the optimiser: what trains, at which rate, and what may decay."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lit_adapters.activations import LEARNED_ACTIVATIONS
from lit_adapters.errors import AdapterError
from lit_adapters.methods.patterns import fullmatch
from lit_adapters.methods.targets import head_modules
from lit_adapters.model.record import adapters, attached
from lit_adapters.optimizers.pairs import low_rank_pairs

HEAD = "head"  # the group of the prediction head, and of BASE too where both have one rate
BASE = "base"  # the group of everything else that trains and is not an adapter


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    lr_scale: Mapping[str, float] | None = None,
    pairs: bool = False,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups, as an optimiser takes them: one group for each method, and the rest.

    Everything that is not an adapter is one group, "head", unless `lr_scale` gives its parts different rates.
    Parameters for which decay makes no sense (`AdapterModule.undecayed_parameters`) are in groups of their own, without
    it. A rational function with a coefficient of zero, say, is not a simpler one.

    Args:
        model: A module whose tree may hold adapters.
        lr: The common learning rate. Each group holds its own, which wins over an `lr` of the optimiser.
        weight_decay: The decay of everything that may decay. Each group holds its own, which wins over a `weight_decay`
            of the optimiser: give it here.
        lr_scale: The factor on `lr` by group: a method's name ("nora", "lora"); "head" for the prediction head, which
            timm's `get_classifier` or transformers' `get_output_embeddings` names; "base" for everything else that
            trains and is not an adapter. In a model that names no head, all of `train` counts as the head, unless that
            is the whole model. Any other key is a regular expression for whole names of parameters, which are those
            that `train` of `attach` uses. An expression wins over a group, and a later expression over an earlier one.
        pairs: Put each A and B of LoRA and its kin together, into groups "<method>/pairs" with `pairs=True`, as the
            optimisers of this package need them; see `PairOptimizer`.

    Raises:
        AdapterError: Nothing trains; a key of `lr_scale` is neither a group that trains nor an expression that matches
            a trained parameter; the learning rate is not a finite number above 0; a scale or the decay is negative or
            not finite; or `lr_scale` tears a pair apart.
    """
    return [group for group, _ in scaled_groups(model, lr, weight_decay, lr_scale, pairs)]


def scaled_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    lr_scale: Mapping[str, float] | None = None,
    pairs: bool = False,
) -> list[tuple[dict[str, Any], float]]:
    """The groups of `parameter_groups`, each with its factor on `lr`.

    Raises:
        AdapterError: The settings are wrong; see `parameter_groups`.
    """
    scale = dict(lr_scale or {})
    if isinstance(lr, (int, float)) and not 0 < lr < math.inf:
        raise AdapterError(f"lr {lr!r} must be a finite number above 0; change the optimizer's init_args")
    for name, value in {"weight_decay": weight_decay, **{f"lr_scale of {k!r}": v for k, v in scale.items()}}.items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise AdapterError(f"{name} {value!r} must be a finite number of at least 0")
    exempt = undecayed(model)
    labels = _labels(model, scale)
    together = _pair_groups(model, labels, lr, weight_decay, scale, exempt) if pairs else []
    in_pairs = {id(p) for group, _ in together for p in group["params"]}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in in_pairs:
            groups.setdefault((labels[id(parameter)], id(parameter) not in exempt), []).append(parameter)
    return together + [
        (
            {
                "params": parameters,
                # Lightning wants names to differ; where all of a group's parameters are alike, it keeps its own.
                "name": name if decays or (name, True) not in groups else f"{name}/no_decay",
                "lr": lr * scale.get(name, 1.0),
                "weight_decay": weight_decay if decays else 0.0,
            },
            scale.get(name, 1.0),
        )
        for (name, decays), parameters in groups.items()
    ]


def undecayed(model: nn.Module) -> set[int]:
    """The identities of the parameters for which weight decay makes no sense.

    Args:
        model: A module whose tree may hold adapters and merged activations.
    """
    functions = (m for m in model.modules() if isinstance(m, LEARNED_ACTIVATIONS))
    found = {id(p) for m in functions for p in m.parameters()}
    for _, adapter in adapters(model):
        found |= {id(p) for p in adapter.undecayed_parameters()}
    return found


def _pair_groups(
    model: nn.Module,
    labels: Mapping[int, str],
    lr: float,
    weight_decay: float,
    scale: Mapping[str, float],
    exempt: Collection[int],
) -> list[tuple[dict[str, Any], float]]:
    """The groups of the pairs A, B, each with its factor on `lr`. A frozen factor stands beside the one that trains.

    Raises:
        AdapterError: `lr_scale` gives A and B of a layer different rates.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for pair in low_rank_pairs(model):
        names = {labels[id(p)] for p in (pair.a, pair.b) if p.requires_grad}
        if len(names) > 1:
            raise AdapterError(
                f"lr_scale has {sorted(names)} for A and B of {pair.name!r}, which this optimiser moves together: give "
                "one expression for both, or set the ratio of LoRAPlus"
            )
        (name,) = names
        key = name, id(pair.a) not in exempt  # a pair whose start is subtracted does not decay
        if key not in groups:
            groups[key] = {"params": [], "name": f"{name}/pairs", "pairs": True, "scales": []}
            groups[key] |= {"lr": lr * scale.get(name, 1.0), "weight_decay": weight_decay}
            if not key[1]:
                groups[key] |= {"name": f"{name}/pairs/no_decay", "weight_decay": 0.0}
        group = groups[key]
        group["params"] += [pair.a, pair.b]
        group["scales"].append(pair.scale)
        if pair.obstacle:
            group.setdefault("obstacle", pair.obstacle)
    return [(group, scale.get(name, 1.0)) for (name, _), group in groups.items()]


def _labels(model: nn.Module, scale: Mapping[str, float]) -> dict[int, str]:
    """The name of its group for each parameter that trains, by id: a part of the model or an expression of `scale`.

    Parameters of equal rates are in the same groups as without `scale`, so that earlier checkpoints can be resumed.

    Raises:
        AdapterError: Nothing trains, or a key of `scale` is neither a group that trains nor an expression that matches
            a trained parameter.
    """
    parts = _parts(model, tell_head=bool(scale))
    if not parts:
        raise AdapterError("nothing trains: give `adapters`, or name modules in `train`")
    present = set(parts.values())
    apart = scale.get(HEAD, 1.0) != scale.get(BASE, 1.0) if HEAD in present else BASE in scale
    groups = {key: HEAD if part == BASE and not apart else part for key, part in parts.items()}
    labels = dict(groups)
    expressions = [key for key in scale if key not in present]
    names = _names(model, parts) if expressions else {}
    for expression in expressions:
        matched = set() if expression in (HEAD, BASE) else _matching(expression, names)
        if not matched:
            raise _unknown(expression, present, names)
        for key in matched:
            labels[key] = groups[key] if scale[expression] == scale.get(groups[key], 1.0) else expression
    return labels


def _parts(model: nn.Module, tell_head: bool) -> dict[int, str]:
    """The part of the model of each parameter that trains, by id: the adapters of a method, the head or the base.

    Args:
        model: The model.
        tell_head: Whether head and base are told apart; otherwise both are the head.
    """
    methods: dict[int, str] = {}
    for _, adapter in adapters(model):
        methods |= {id(p): adapter.method_of(name) for name, p in adapter.adapter_parameters().items()}
    others = {id(p): p.requires_grad for p in model.parameters() if id(p) not in methods}
    head = set(others)
    if tell_head:
        known = {id(p) for module in head_modules(model) for p in module.parameters()}
        if known or all(others.values()):
            head = known
    training = [id(p) for p in model.parameters() if p.requires_grad]
    return {key: methods.get(key, HEAD if key in head else BASE) for key in training}


def _names(model: nn.Module, parts: Mapping[int, str]) -> dict[str, int]:
    """The ids of the parameters that train, by name in the module that was given to `attach`, else in the model."""
    inside: set[int] = set()
    names: dict[str, int] = {}
    for module in [*(module for _, module in attached(model)), model]:
        found = [(name, id(p)) for name, p in module.named_parameters(remove_duplicate=False)]
        names |= {name: key for name, key in found if key in parts and key not in inside}
        inside |= {key for _, key in found}
    return names


def _matching(expression: str, names: Mapping[str, int]) -> set[int]:
    try:
        return {key for name, key in names.items() if fullmatch(expression, name)}
    except AdapterError as error:
        # The message ends with a hint for `targets` and `train`, where a list may stand instead.
        problem = str(error).rpartition("; ")[0]
        raise AdapterError(f"lr_scale: no group is called {expression!r}, and {problem}; correct the key") from error


def _unknown(key: str, groups: Collection[str], names: Mapping[str, int]) -> AdapterError:
    message = f"lr_scale names {key!r}; the trainable groups are {', '.join(sorted(groups))}"
    if key == HEAD:
        return AdapterError(
            f"{message}: the head is frozen, or the model does not name it by get_classifier or "
            "get_output_embeddings; in the second case give a regular expression for the names of its parameters"
        )
    if key == BASE:
        return AdapterError(f"{message}: nothing trains but adapters and the head")
    return AdapterError(
        f"{message}; as a regular expression it matches no name of a parameter that trains, such as "
        f"{next(iter(names))!r}"
    )
