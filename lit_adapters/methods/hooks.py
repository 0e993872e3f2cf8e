"""Hooks and replaced `forward`s of the layer whose place an adapter takes.

Hooks move from the layer to its adapter, so that they see the input and the output of the adapted layer, whatever the
adapter calls inside. A `forward` that was put on one layer stays where it is; `is_plain` and NoRA ask for it.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

_TABLES = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give the hooks of `source` to `target`; their handles go on working.

    A hook that computes a weight (`torch.nn.utils.weight_norm`, pruning) stays, as it writes to its own module.
    """
    if any(isinstance(value, Tensor) for value in vars(source).values()):
        return
    for name in _TABLES:
        table = getattr(source, name)
        table.update(getattr(target, name))
        setattr(target, name, table)
        setattr(source, name, OrderedDict())
    if source._is_full_backward_hook is not None:
        target._is_full_backward_hook, source._is_full_backward_hook = source._is_full_backward_hook, None


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the hooks that `source` has, in place of its own."""
    for name in _TABLES:
        setattr(target, name, OrderedDict(getattr(source, name)))
    target._is_full_backward_hook = source._is_full_backward_hook


def has_own_forward(module: nn.Module) -> bool:
    """Whether this one module computes by a `forward` of its own, and not by that of its class.

    The wrapper of accelerate that moves inputs to the module's device does not count.
    """
    own = vars(module).get("forward")
    if own is not None and hasattr(module, "_hf_hook"):
        own = vars(module).get("_old_forward")
    return own is not None and getattr(own, "__func__", own) is not type(module).forward
