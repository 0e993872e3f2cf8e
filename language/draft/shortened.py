"""A pretrained model without some of its decoder layers, which shares the weights of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.model.merge import SHARED


def shortened(model: Any, keep_layers: Sequence[int]) -> Any:
    """A copy of `model` that has only some of its decoder layers; embeddings, final norm and head stay.

    Its parameters are the very objects of `model` and take no memory. They are marked, so that `lit_adapters.merge`
    does not write into them; `unshared_copy` gives a model its own. Modules, buffers and configuration are copies.
    Layers are numbered anew, because each keeps its keys and values in the cache under its number.

    Args:
        model: A causal language model of transformers.
        keep_layers: Indices of the layers that stay, ascending.

    Raises:
        AdapterError: The indices are empty, not ascending, repeated or out of range, or the model has not exactly one
            list of decoder layers.
    """
    total = int(model.config.num_hidden_layers)
    keep = check_layers(keep_layers, total)
    for parameter in model.parameters():
        setattr(parameter, SHARED, "the whole model")
    short = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    parent, name = _layers(short, total)
    layers = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(layers[i] for i in keep))
    for number, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    short.config.num_hidden_layers = len(keep)
    kinds = getattr(short.config, "layer_types", None)
    if kinds is not None:
        short.config.layer_types = [kinds[i] for i in keep]
    return short


def check_layers(keep_layers: Sequence[int], total: int) -> list[int]:
    """The indices as a list.

    Raises:
        AdapterError: There are none, they do not ascend, or one is not in 0 .. total - 1.
    """
    keep = list(keep_layers)
    for index in keep:
        if not isinstance(index, int) or isinstance(index, bool):
            raise AdapterError(f"keep_layers holds {shown(index)}: it takes the numbers of layers, 0 to {total - 1}")
    if not keep:
        raise AdapterError(f"keep_layers is empty; name at least one of the model's layers, 0 to {total - 1}")
    for index in keep:
        if not 0 <= index < total:
            raise AdapterError(f"keep_layers names layer {index}; the model has the layers 0 to {total - 1}")
    if sorted(set(keep)) != keep:
        raise AdapterError(f"keep_layers {keep} must ascend, each layer once; give {sorted(set(keep))}")
    return keep


def unshare_trained(short: nn.Module) -> None:
    """Give a shortened model its own copies of the shared parameters that train."""
    own: dict[int, nn.Parameter] = {}
    for module in short.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and hasattr(parameter, SHARED):
                module._parameters[name] = own.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))


def unshared_copy(short: Any) -> Any:
    """A copy of a shortened model that shares no weights."""
    copied = copy.deepcopy(short)
    for parameter in copied.parameters():
        vars(parameter).pop(SHARED, None)  # the marks of packed weights are copied along
    return copied


def _layers(model: nn.Module, total: int) -> tuple[nn.Module, str]:
    """The module and attribute that hold the list of decoder layers."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(found) != 1:
        raise AdapterError(
            f"{type(model).__name__} has {len(found)} lists of {total} layers, where keep_layers needs one; leave "
            "keep_layers out and name a smaller model with a target"
        )
    return found[0]
