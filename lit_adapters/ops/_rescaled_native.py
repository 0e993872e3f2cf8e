"""The gain of an output, and its gradient, by rescaled.cpp (see _native.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adapters.ops._native import DTYPES, function, in_memory, library, pointers, threads, usable

NAME = "rescaled"
_CHUNK = 64  # rows whose products are added in float32, one after the other


def serves(y: Tensor, change: Tensor, bias: Tensor | None, gradient: Tensor | None = None) -> bool:
    """Whether this path can compute; not on a GPU, while traced or differentiated, or in another dtype or order."""
    if not usable(NAME) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    plain = in_memory(y, change, bias, gradient) and y.is_contiguous()
    return plain and y.dtype in DTYPES and change.dtype == torch.float32


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def forward(y: Tensor, change: Tensor, bias: Tensor | None) -> Tensor | None:
    """y + change (y - bias); None where the kernel cannot be built."""
    if (functions := library(NAME, "gain of DoRA")) is None:
        return None
    h, columns = torch.empty_like(y), y.shape[-1]
    change, bias = change.contiguous(), _float(bias)
    kernel = function(functions, f"forward_{DTYPES[y.dtype]}", pointers=4, sizes=2)
    kernel(*pointers(y, h, change, bias), y.numel() // max(1, columns), columns, threads(y.numel()))
    return h


def backward(
    gradient: Tensor, y: Tensor, change: Tensor, bias: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The gradients of y, and of the change if `sums` are wanted; None where the kernel cannot be built."""
    if (functions := library(NAME, "gain of DoRA")) is None:
        return None
    gradient, change, bias = gradient.contiguous(), change.contiguous(), _float(bias)
    d_y, columns = torch.empty_like(gradient), y.shape[-1]
    rows = y.numel() // max(1, columns)
    total = torch.zeros(-(-rows // _CHUNK), columns, dtype=torch.float32, device="cpu") if sums else None
    kernel = function(functions, f"backward_{DTYPES[y.dtype]}", pointers=6, sizes=3)
    kernel(*pointers(gradient, y, d_y, total, change, bias), rows, columns, _CHUNK, threads(y.numel()))
    return d_y, None if total is None else total.sum(0)
