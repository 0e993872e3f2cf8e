"""Autocast on the device of a tensor, or none: on the meta device PyTorch has none to ask about."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast has products of `tensor` computed in at present; None without autocast."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `tensor`; where there is none, one that costs nothing."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)
