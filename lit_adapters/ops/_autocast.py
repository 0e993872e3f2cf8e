"""Autocast on the device of a tensor. PyTorch knows no autocast for the meta device and raises if it is asked."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products of `tensor` now; None without autocast."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `tensor`; costs nothing where autocast is off already."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)
