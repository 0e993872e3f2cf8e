"""The switches for biases in a configuration of transformers, such as LLaMA's `attention_bias` and `mlp_bias`.

Names and effects differ from one architecture to the next. So each boolean of the configuration with "bias" in its name
is tried: the model is built with it on the meta device, which takes no memory, and the new biases are those it creates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lit_adapters.errors import AdapterError


@dataclass
class _Plan:
    """What one model of transformers needs before its added biases can be saved.

    Attributes:
        switches: Attributes to set to True, each as the path to it from the configuration.
        biases: Names of all biases that the switches create, with their shapes.
        uncovered: Added biases that no switch creates.
    """

    switches: list[tuple[str, ...]] = field(default_factory=list)
    biases: dict[str, torch.Size] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)


def check_switches(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise if a bias of one of `layers` would be lost in `save_pretrained` and `from_pretrained`.

    Models that are not of transformers have no configuration: how they are saved and built again is up to their owner.

    Args:
        model: Any module; models of transformers in it are found.
        layers: Names of layers that have a bias or will get one by merging.

    Raises:
        AdapterError: The configuration has no switch for the bias of a layer.
    """
    for part, plan in _plans(model, layers):
        if plan.uncovered:
            suffixes = sorted({name.rpartition(".")[2] for name in plan.uncovered})
            raise AdapterError(
                f"the configuration of {type(part).__name__} has no switch for a bias of {plan.uncovered[0]!r}, "
                f"{len(plan.uncovered)} layers in all: once merged, the model could not be saved and loaded again. "
                f"Leave them out with exclude={suffixes}, keep the adapters, or merge with unload=False"
            )


def add_biases(model: nn.Module, layers: Sequence[str]) -> None:
    """Turn on the switches for the biases of `layers`; other layers that a switch gives a bias get zeros.

    Args:
        model: Any module; models of transformers in it are found, and their configurations changed in place.
        layers: Names of layers; those without a bias are passed over.
    """
    present = [name for name in layers if getattr(model.get_submodule(name), "bias", None) is not None]
    for part, plan in _plans(model, present):
        for *path, switch in plan.switches:
            setattr(_at(part.config, path), switch, True)
        for name, shape in plan.biases.items():
            layer: Any = part.get_submodule(name.rpartition(".")[0])
            if getattr(layer, "bias", None) is None:
                weight = layer.weight
                dtype = getattr(weight, "quant_state", weight).dtype
                zeros = torch.zeros(shape, dtype=dtype, device=weight.device)
                layer.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def _plans(model: nn.Module, layers: Sequence[str]) -> Iterator[tuple[Any, _Plan]]:
    """The models of transformers in `model` that do not have all biases of `layers` in their configuration."""
    done: list[str] = []
    for prefix, part in model.named_modules():
        if not (hasattr(part, "config") and hasattr(part, "save_pretrained")):
            continue
        dotted = f"{prefix}." if prefix else ""
        if any(dotted.startswith(outer) for outer in done):
            continue
        done.append(dotted)
        own = [name.removeprefix(dotted) for name in layers if name.startswith(dotted)]
        if own:
            yield part, _plan(part, own)


def _plan(part: Any, layers: Sequence[str]) -> _Plan:
    plan = _Plan()
    built = _built(type(part), part.config)
    missing = {f"{name}.bias" for name in layers} - built.keys()
    for path in _candidates(part.config):
        if not missing:
            break
        config = copy.deepcopy(part.config)
        setattr(_at(config, path[:-1]), path[-1], True)
        other = _built(type(part), config)
        created = {name: shape for name, shape in other.items() if name not in built}
        only_biases = all(name.endswith(".bias") for name in created) and built.items() <= other.items()
        if only_biases and created.keys() & missing:
            plan.switches.append(path)
            plan.biases |= created
            missing -= created.keys()
    plan.uncovered = [name for name in layers if f"{name}.bias" in missing]
    return plan


def _built(kind: Any, config: Any) -> dict[str, torch.Size]:
    """The shapes of the parameters that a configuration creates; empty if the class does not build from it alone."""
    try:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
    except Exception:  # whatever a value that was never tried may raise
        return {}
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}


def _candidates(config: Any) -> Iterator[tuple[str, ...]]:
    """Paths to the boolean attributes that may create biases and are off, also in the configurations inside."""
    for name, value in vars(config).items():
        if value is False and "bias" in name:
            yield (name,)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from ((name, *path) for path in _candidates(value))


def _at(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config
