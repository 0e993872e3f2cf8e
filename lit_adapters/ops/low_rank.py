"""A frozen linear layer with a low-rank update: y = x W^T + bias + c B^T, with a code c = x A^T or a function of it.

The update is added into the output of the wide product, in place; so is its part of the gradient of x: no second
tensor of either size is made. Two Functions share x: `_Down` hands it on beside the code, so that its backward gets the
gradient of the wide product and adds to it, whatever lies between A and B. Kept for backward: x in the dtype of the
products, A, B and codes (N, r); W itself is no copy. Thin products are written so that r counts the rows of their
result, where BLAS libraries are several times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return (a @ x.t()).t(), x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_code, d_x = gradients
        if d_code is None:
            return d_x, None
        with torch.autocast(d_code.device.type, enabled=False):
            x, a = ctx.saved_tensors
            d_a = d_code.t() @ x if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, d_a
            if d_x is None:
                return d_code @ a, d_a
            # `_Up` made it for this Function alone; a second derivative needs it as it is.
            return torch.addmm(d_x, d_code, a) if torch.is_grad_enabled() else d_x.addmm_(d_code, a), d_a


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, code: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, weight, bias).addmm_(code, b.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, _, code, b = inputs
        ctx.save_for_backward(weight, code, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        with torch.autocast(g.device.type, enabled=False):
            weight, code, b = ctx.saved_tensors
            needs_x, _, _, needs_code, needs_b = ctx.needs_input_grad
            d_x = g @ weight if needs_x else None
            d_code = (b.t() @ g.t()).t() if needs_code else None
            d_b = (code.t() @ g).t() if needs_b else None
        return d_x, None, None, d_code, d_b


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    between: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y = x W^T + bias + phi(x A^T) B^T; (..., in) -> (..., out), in the dtype of x, which W and bias have too.

    Args:
        x: (..., in).
        weight: W (out, in); receives no gradient.
        bias: (out,) or None; receives no gradient.
        a: A (r, in), any floating dtype.
        b: B (out, r), the scale included; any floating dtype.
        between: phi, of codes (N, r), N the rows of x; the identity if None. Autograd differentiates it.
    """
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        code, shared = _Down.apply(rows, a.to(x.dtype))
    if between is not None:
        code = between(code).to(x.dtype).t().contiguous().t()  # in the same order, or sums would round otherwise
    with torch.autocast(x.device.type, enabled=False):
        # An input without gradient does not get one for having been handed on.
        y: Tensor = _Up.apply(shared if rows.requires_grad else rows, weight, bias, code, b.to(x.dtype))
    return y.view(*x.shape[:-1], y.shape[-1])
