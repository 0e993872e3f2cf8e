"""A pretrained model without some of its decoder layers, which shares the weights of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from language.measured import alike, check_finite, documents
from language.models import context_length
from lit_adapters.errors import AdapterError, shown
from lit_adapters.model.merge import SHARED
from lit_adapters.model.modes import evaluating


def shortened(model: Any, keep_layers: Sequence[int]) -> Any:
    """A copy of `model` that has only some of its decoder layers; embeddings, final norm and head stay.

    Its parameters are the very objects of `model` and take no memory. They are marked, so that `lit_adapters.merge`
    does not write into them; `unshared_copy` gives a model its own. Modules, buffers and configuration are copies.
    Layers are numbered anew, because each keeps its keys and values in the cache under its number.

    Args:
        model: A causal language model of transformers.
        keep_layers: Indices of the layers that stay, ascending.

    Raises:
        AdapterError: The indices are empty, not ascending, repeated or out of range, the model has not exactly one list
            of decoder layers, or its layers depend on their numbers.
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
    kinds = getattr(short.config, "layer_types", None)
    short.config.num_hidden_layers = len(keep)
    if kinds is not None:
        kept = [kinds[i] for i in keep]
        if short.config.layer_types != kept:  # some configurations derive them from the number of layers
            short.config.layer_types = kept
    _check_equal(model, short, keep)
    return short


def _check_equal(model: Any, short: Any, keep: Sequence[int]) -> None:
    """Compare a shortened model with the whole one whose other layers pass on what they get.

    Raises:
        AdapterError: They differ: a layer's function depends on its number, or the model looks its layers up elsewhere.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    parent, name = _layers(model, int(model.config.num_hidden_layers))
    dropped = [layer for i, layer in enumerate(getattr(parent, name)) if i not in keep]

    def pass_on(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [layer.register_forward_hook(pass_on, with_kwargs=True) for layer in dropped]
    (ids,) = documents(model, min(8, context_length(model) or 8))
    try:
        with torch.no_grad(), evaluating(model), evaluating(short):
            expected, found = (m(input_ids=ids, use_cache=False).logits for m in (model, short))
    finally:
        for handle in handles:
            handle.remove()
    check_finite(model, expected)
    if not alike(found, expected):
        raise AdapterError(
            f"{type(model).__name__} with the layers {list(keep)} alone is not the model without the others: its "
            "layers depend on their numbers. Leave keep_layers out and name a smaller model with a target"
        )


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
