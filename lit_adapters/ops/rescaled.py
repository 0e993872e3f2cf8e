"""The gain of an output without its bias: h = y + (gain - 1) (y - bias), which equals gain (y - bias) + bias.

Written as a change of y, it is exact where the gain is 1, and keeps a gain close to 1 in bfloat16. y is saved for
backward. Each direction is one pass of rescaled.cpp (_rescaled_native.py), or half a dozen PyTorch operations. It does
not work under the transforms of torch.func; low_rank.py says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_adapters.ops import _rescaled_native as native


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gain_minus_one: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, gain_minus_one, bias)
        if native.can_run(y, gain_minus_one, bias) and (h := native.forward(y, gain_minus_one, bias)) is not None:
            return h
        h = torch.addcmul(y, y, gain_minus_one.to(y.dtype))
        return h if bias is None else h.sub_((bias * gain_minus_one).to(y.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, gain_minus_one, bias = ctx.saved_tensors
        (g,) = gradients
        needs_y, needs_gain, _ = ctx.needs_input_grad
        if native.can_run(y, gain_minus_one, bias, g):
            computed = native.backward(g, y, gain_minus_one, bias, needs_gain)
            if computed is not None:
                return *computed, None
        d_y = torch.addcmul(g, g, gain_minus_one.to(g.dtype)) if needs_y else None
        d_gain = None
        if needs_gain:
            rows = g.reshape(-1, g.shape[-1])
            d_gain = (rows * y.reshape(rows.shape)).sum(0, dtype=gain_minus_one.dtype)
            if bias is not None:
                d_gain = d_gain - bias * rows.sum(0, dtype=gain_minus_one.dtype)
        return d_y, d_gain, None


def scale_without_bias(y: Tensor, gain_minus_one: Tensor, bias: Tensor | None) -> Tensor:
    """h = y + gain_minus_one (y - bias).

    Args:
        y: The output of a linear layer (..., out), bias included, in any floating dtype.
        gain_minus_one: The gain of each output less 1 (out,), float32 or wider. Sums over rows are taken in its dtype.
        bias: The bias (out,) or None; receives no gradient.

    Returns:
        h (..., out) in the dtype of y.
    """
    h: Tensor = _Rescaled.apply(y, gain_minus_one, bias)
    return h
