"""A frozen linear layer with a low-rank update in one pass: y = x W^T + bias + s (x A^T) B^T.

The update is added into the output of the wide product, in place, forward and backward: no second tensor of that size
is made. Kept for backward: x in the dtype of the products, the code x A^T (N, r), A and B; W itself is no copy. Thin
products are written so that r counts the rows of their result, where BLAS libraries are several times faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        code = (a @ x.t()).t()
        return F.linear(x, weight, bias).addmm_(code, b.t()), code

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        x, weight, _, a, b = inputs
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(x, weight, a, b, outputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            x, weight, a, b, code = ctx.saved_tensors
            gradient = gradients[0]
            if torch.is_grad_enabled():  # for second derivatives: the code is a function of x and A
                code = x @ a.t()
            d_code = b.t() @ gradient.t()  # (r, N)
            d_a = d_code @ x if ctx.needs_input_grad[3] else None
            d_b = (code.t() @ gradient).t() if ctx.needs_input_grad[4] else None
            d_x = (gradient @ weight).addmm_(d_code.t(), a) if ctx.needs_input_grad[0] else None
        return d_x, None, None, d_a, d_b


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y = x W^T + bias + s (x A^T) B^T; (..., in) -> (..., out), in the dtype of x, which W and bias have too.

    Args:
        x: (..., in).
        weight: W (out, in); receives no gradient.
        bias: (out,) or None; receives no gradient.
        a: A (r, in), any floating dtype.
        b: B (out, r), any floating dtype.
        scaling: s.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _LowRankLinear.apply(rows, weight, bias, a.to(x.dtype), (scaling * b).to(x.dtype))[0]
    return y.view(*x.shape[:-1], y.shape[-1])
