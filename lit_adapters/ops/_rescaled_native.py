"""The gain of an output, and its gradient, by rescaled.cpp.

Runs on the CPU in float32 or bfloat16 without autograd; rescaled.py uses PyTorch operations elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adapters.ops._native import DTYPES, function, in_memory, library, pointers, threads, usable

NAME = "rescaled"
_CHUNK = 64  # rows whose products are added in float32, one after the other


def can_run(y: Tensor, gain_minus_one: Tensor, bias: Tensor | None, gradient: Tensor | None = None) -> bool:
    """Whether the kernel can compute: eager, on the CPU, not differentiated, contiguous, and in a dtype it has."""
    if not usable(NAME) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    plain = in_memory(y, gain_minus_one, bias, gradient) and y.is_contiguous()
    return plain and y.dtype in DTYPES and gain_minus_one.dtype == torch.float32


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def forward(y: Tensor, gain_minus_one: Tensor, bias: Tensor | None) -> Tensor | None:
    """y + gain_minus_one (y - bias), (..., out) in the dtype of y; None if the kernel cannot be built."""
    if (functions := library(NAME, "gain of DoRA")) is None:
        return None
    h, columns = torch.empty_like(y), y.shape[-1]
    gain_minus_one, bias = gain_minus_one.contiguous(), _float(bias)
    kernel = function(functions, f"forward_{DTYPES[y.dtype]}", pointers=4, sizes=2)
    kernel(*pointers(y, h, gain_minus_one, bias), y.numel() // max(1, columns), columns, threads(y.numel()))
    return h


def backward(
    gradient: Tensor, y: Tensor, gain_minus_one: Tensor, bias: Tensor | None, needs_gain: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The gradients of y (..., out) and, if `needs_gain`, of the gain (out,); None if the kernel cannot be built."""
    if (functions := library(NAME, "gain of DoRA")) is None:
        return None
    gradient, gain_minus_one, bias = gradient.contiguous(), gain_minus_one.contiguous(), _float(bias)
    d_y, columns = torch.empty_like(gradient), y.shape[-1]
    rows = y.numel() // max(1, columns)
    total = torch.zeros(-(-rows // _CHUNK), columns, dtype=torch.float32, device="cpu") if needs_gain else None
    kernel = function(functions, f"backward_{DTYPES[y.dtype]}", pointers=6, sizes=3)
    kernel(*pointers(gradient, y, d_y, total, gain_minus_one, bias), rows, columns, _CHUNK, threads(y.numel()))
    return d_y, None if total is None else total.sum(0)
