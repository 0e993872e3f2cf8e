"""What is active around an operation: autocast, and the transforms of torch.func."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products of `tensor` now; None without autocast.

    PyTorch knows no autocast for the meta device and raises if it is asked.
    """
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `tensor`; costs nothing where autocast is off already."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)


def transformed() -> bool:
    """Whether a transform (grad, vmap, jvp ...) or forward mode is active and needs the plain formula.

    False under torch.compile, which traces the custom operators itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
