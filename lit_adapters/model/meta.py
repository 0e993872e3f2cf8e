"""Weights that are not there: on the meta device, because nobody loaded them or because accelerate offloads them.

A model that is on the meta device as a whole may be adapted, to count parameters or to be loaded later. A model of
which some weights come and go is refused, as an adapter reads the weight of its layer at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule

_FIX = (
    "load the model without offloading (a device_map in which no part is on 'disk', nor on 'cpu' beside a GPU), and "
    "quantise it to NF4 if it does not fit"
)


def offloads(module: nn.Module) -> bool:
    """Whether a hook of accelerate keeps the weights of `module` elsewhere, and puts them in place for its forward."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) is True for part in (hook, *getattr(hook, "hooks", ())))


def refuse_offloaded(model: nn.Module) -> None:
    """Raise if weights of `model` are kept elsewhere between its forwards.

    Raises:
        AdapterError: A module is offloaded.
    """
    found = [name or type(model).__name__ for name, module in model.named_modules() if offloads(module)]
    if found:
        raise AdapterError(
            f"accelerate offloads {len(found)} modules of {type(model).__name__}, {found[0]!r} first: their weights "
            f"are there during a forward only, and adapters cannot train on them; {_FIX}"
        )


def refuse_partly_loaded(model: nn.Module, adapter: AdapterModule) -> None:
    """Raise if an adapter would stand on the meta device, although weights of the model are loaded.

    Args:
        model: Without adapters.
        adapter: Not yet in the model.

    Raises:
        AdapterError: Some weights are loaded, and those around this adapter are not.
    """
    if any(t.is_meta for t in adapter.adapter_tensors().values()) and not all(p.is_meta for p in model.parameters()):
        raise AdapterError(
            f"the weights of {adapter.qualified_name!r} are on the meta device, and others of {type(model).__name__} "
            f"are not: they are offloaded, or were not loaded. Load all weights before attaching; {_FIX}"
        )


def require_loaded(model: nn.Module, what: str) -> None:
    """Raise if values that adapters need are on the meta device.

    Args:
        model: With adapters.
        what: What needs the values, for the message.

    Raises:
        AdapterError: A tensor of an adapter or of its layer is on the meta device.
    """
    for module in model.modules():
        if isinstance(module, AdapterModule) and any(t.is_meta for t in _tensors(module)):
            raise AdapterError(_missing(module, what))


def expect_values(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A forward pre-hook of a model on the meta device and of its adapters: check that data finds loaded weights.

    Raises:
        AdapterError: The input has values, and an adapter in `module` or its layer has none.
    """
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if given is None or given.is_meta or torch.compiler.is_compiling() or any(map(offloads, module.modules())):
        return
    require_loaded(module, "a forward")
    forget_expectation(module)


def forget_expectation(module: nn.Module) -> None:
    """Remove the hook `expect_values` from one module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is expect_values:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def require_placed(model: nn.Module, what: str) -> None:
    """As `require_loaded`, but only where accelerate offloads a part of the model; a meta model passes."""
    if any(offloads(module) for module in model.modules()):
        require_loaded(model, what)


def refuse_meta(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise if one of `tensors` holds no values.

    Args:
        tensors: Tensors by name.
        what: What needs their values, for the message.

    Raises:
        AdapterError: A tensor is on the meta device.
    """
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise AdapterError(
            f"{what} needs the values of {absent[0]!r}, and these are on the meta device: load the model and its "
            "adapters, and remove offloading hooks (accelerate.hooks.remove_hook_from_submodules), first"
        )


def _tensors(adapter: AdapterModule) -> list[Tensor]:
    return [t for t in (*adapter._parameters.values(), *adapter.adapter_tensors().values()) if t is not None]


def _missing(adapter: AdapterModule, what: str) -> str:
    text = f"{what} needs the values of {adapter.qualified_name!r}, and "
    if offloads(adapter):
        return (
            f"{text}accelerate offloads them between forwards: call "
            "accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    return f"{text}these are on the meta device (offloaded, or never loaded): load the model and its adapters first"
