"""A frozen linear layer with a low-rank update: y = x W^T + bias + s c B^T, with a code c = x A^T or a function of it.

The update is added into the output of the wide product, in place; so is its part of the gradient of x: no second
tensor of either size is made. Kept for backward: x in the dtype of the products, W as given, A, B and codes (N, r).
Thin products are written so that r counts the rows of their result, where BLAS libraries are several times faster.

Without a function between A and B one Function does it all. With one, two Functions share x: `_Down` hands it on beside
the code, so that its backward gets the gradient of the wide product and adds to it, and autograd has what lies between.
Both do the same products in the same order. They take `ctx` in forward: a `setup_context` costs more a call than
many of these products, and only serves the transforms of torch.func, under which layers take the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapters.ops._autocast import without_autocast


def _down(x: Tensor, a: Tensor) -> Tensor:
    """The code (N, r)."""
    return (a.to(x.dtype) @ x.t()).t()


def _up(x: Tensor, weight: Tensor, bias: Tensor | None, code: Tensor, b: Tensor, scale: float) -> Tensor:
    """The output (N, out)."""
    return F.linear(x, weight, bias).addmm_(code, _scaled(b, scale, x.dtype).t())


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (scale * b).to(dtype)


def _up_backward(
    g: Tensor, weight: Tensor, code: Tensor, b: Tensor, scale: float, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, without what comes through the code; of the code; and of B; None where one `needs` none."""
    d_x = g @ weight if needs[0] else None
    d_code = (_scaled(b, scale, g.dtype).t() @ g.t()).t() if needs[1] else None
    d_b = scale * (code.t() @ g).t().to(b.dtype) if needs[2] else None
    return d_x, d_code, d_b


def _down_backward(
    d_code: Tensor, d_x: Tensor | None, x: Tensor, a: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, `d_x` included, and of A; `d_x` is written to, unless a second derivative needs it."""
    d_a = (d_code.t() @ x).to(a.dtype) if needs[1] else None
    if not needs[0]:
        return None, d_a
    a = a.to(x.dtype)
    if d_x is None:
        return d_code @ a, d_a
    return torch.addmm(d_x, d_code, a) if torch.is_grad_enabled() else d_x.addmm_(d_code, a), d_a


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        code, ctx.scale = _down(x, a), scale
        ctx.save_for_backward(x, weight, a, b, code)
        return _up(x, weight, bias, code, b, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        with without_autocast(g):
            x, weight, a, b, code = ctx.saved_tensors
            if torch.is_grad_enabled():  # a second derivative must see where the code comes from
                code = _down(x, a)
            needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
            needs = needs_x, needs_x or needs_a, needs_b
            d_x, d_code, d_b = _up_backward(g, weight, code, b, ctx.scale, needs)
            d_a = None
            if d_code is not None:
                d_x, d_a = _down_backward(d_code, d_x, x, a, (needs_x, needs_a))
        return d_x, None, None, d_a, d_b, None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a)
        return _down(x, a), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_code, d_x = gradients
        if d_code is None:
            return d_x, None
        with without_autocast(d_code):
            x, a = ctx.saved_tensors
            return _down_backward(d_code, d_x, x, a, ctx.needs_input_grad)  # `_Up` made d_x for this Function alone


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, code: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(weight, code, b)
        return _up(x, weight, bias, code, b, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        needs_x, _, _, needs_code, needs_b, _ = ctx.needs_input_grad
        with without_autocast(g):
            weight, code, b = ctx.saved_tensors
            d_x, d_code, d_b = _up_backward(g, weight, code, b, ctx.scale, (needs_x, needs_code, needs_b))
        return d_x, None, None, d_code, d_b, None


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    between: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """y = x W^T + bias + s phi(x A^T) B^T; (..., in) -> (..., out), in the dtype of x, which W and bias have too.

    Args:
        x: (..., in).
        weight: W (out, in); receives no gradient.
        bias: (out,) or None; receives no gradient.
        a: A (r, in), any floating dtype.
        b: B (out, r), any floating dtype.
        between: phi, of codes (N, r), N the rows of x; the identity if None. Autograd differentiates it.
        scale: s.
    """
    rows = x.reshape(-1, x.shape[-1])
    if between is None:
        with without_autocast(x):
            y: Tensor = _LowRankLinear.apply(rows, weight, bias, a, b, scale)
        return y.view(*x.shape[:-1], y.shape[-1])
    with without_autocast(x):
        code, shared = _Down.apply(rows, a)
    code = between(code).to(x.dtype).t().contiguous().t()  # in the same order, or sums would round otherwise
    with without_autocast(x):
        # An input without gradient does not get one for having been handed on.
        y = _Up.apply(shared if rows.requires_grad else rows, weight, bias, code, b, scale)
    return y.view(*x.shape[:-1], y.shape[-1])
