"""The gain of an output without its bias, h = y + change (y - bias), in place of `gain (y - bias) + bias`.

Written as a change it is exact where nothing changes, and in bfloat16 keeps a gain close to 1. y is kept for backward.
One pass of rescaled.cpp each way, or half a dozen PyTorch operations. Not for the transforms of torch.func (why:
low_rank.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_adapters.ops import _rescaled_native as native


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, change: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, change, bias)
        if native.serves(y, change, bias) and (h := native.forward(y, change, bias)) is not None:
            return h
        h = torch.addcmul(y, y, change.to(y.dtype))
        return h if bias is None else h.sub_((bias * change).to(y.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, change, bias = ctx.saved_tensors
        (g,) = gradients
        needs_y, needs_change, _ = ctx.needs_input_grad
        served = native.serves(y, change, bias, g)
        if served and (found := native.backward(g, y, change, bias, needs_change)) is not None:
            return *found, None
        d_y = torch.addcmul(g, g, change.to(g.dtype)) if needs_y else None
        d_change = None
        if needs_change:
            rows = g.reshape(-1, g.shape[-1])
            d_change = (rows * y.reshape(rows.shape)).sum(0, dtype=change.dtype)
            if bias is not None:
                d_change = d_change - bias * rows.sum(0, dtype=change.dtype)
        return d_y, d_change, None


def scale_without_bias(y: Tensor, gain_minus_one: Tensor, bias: Tensor | None) -> Tensor:
    """h = y + gain_minus_one (y - bias); (..., out) -> (..., out), in the dtype of y.

    Args:
        y: (..., out), its bias included.
        gain_minus_one: (out,), in float32 or wider; sums over rows are taken in its dtype.
        bias: (out,) or None; receives no gradient.
    """
    h: Tensor = _Rescaled.apply(y, gain_minus_one, bias)
    return h
