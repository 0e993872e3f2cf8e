"""A frozen linear layer with a low-rank update: y = x W^T + bias + s z B^T, where z = x A^T or a function of x A^T.

The update is added in place to the output of the wide product, and its part of the gradient of x likewise, so that no
second tensor of either size is made. Saved for backward are x in the dtype of the products, W, A, B and z (N, r). The
thin products are written so that r counts the rows of the result, for which BLAS libraries are several times faster.

Without an activation, one autograd Function computes everything. With one, two Functions share x: `_Down` returns x
beside z, so that its backward gets the gradient of the wide product and adds to it, and autograd differentiates the
activation. Both ways do the same products in the same order. The Functions take `ctx` in forward: a `setup_context`
would cost more per call than many of these products. Only the transforms of torch.func need one, and layers use the
plain formula under them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapters.ops._context import without_autocast


def _down(x: Tensor, a: Tensor) -> Tensor:
    """z = x A^T (N, r)."""
    return (a.to(x.dtype) @ x.t()).t()


def _up(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, b: Tensor, scale: float) -> Tensor:
    """The output (N, out)."""
    return F.linear(x, weight, bias).addmm_(z, _scaled(b, scale, x.dtype).t())


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (scale * b).to(dtype)


def _up_backward(
    g: Tensor, weight: Tensor, z: Tensor, b: Tensor, scale: float, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x without the part that comes through z, of z, and of B; None for those not in `needs`."""
    d_x = g @ weight if needs[0] else None
    d_z = (_scaled(b, scale, g.dtype).t() @ g.t()).t() if needs[1] else None
    d_b = scale * (z.t() @ g).t().to(b.dtype) if needs[2] else None
    return d_x, d_z, d_b


def _down_backward(
    d_z: Tensor, d_x: Tensor | None, x: Tensor, a: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of A. The first adds to `d_x`, in place unless a second derivative needs `d_x`."""
    d_a = (d_z.t() @ x).to(a.dtype) if needs[1] else None
    if not needs[0]:
        return None, d_a
    a = a.to(x.dtype)
    if d_x is None:
        return d_z @ a, d_a
    return torch.addmm(d_x, d_z, a) if torch.is_grad_enabled() else d_x.addmm_(d_z, a), d_a


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        z, ctx.scale = _down(x, a), scale
        ctx.save_for_backward(x, weight, a, b, z)
        return _up(x, weight, bias, z, b, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        with without_autocast(g):
            x, weight, a, b, z = ctx.saved_tensors
            if torch.is_grad_enabled():  # a second derivative must see that z depends on x and A
                z = _down(x, a)
            needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
            needs = needs_x, needs_x or needs_a, needs_b
            d_x, d_z, d_b = _up_backward(g, weight, z, b, ctx.scale, needs)
            d_a = None
            if d_z is not None:
                d_x, d_a = _down_backward(d_z, d_x, x, a, (needs_x, needs_a))
        return d_x, None, None, d_a, d_b, None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a)
        return _down(x, a), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_z, d_x = gradients
        if d_z is None:
            return d_x, None
        with without_autocast(d_z):
            x, a = ctx.saved_tensors
            # It may overwrite d_x, which `_Up` made for this Function alone.
            return _down_backward(d_z, d_x, x, a, ctx.needs_input_grad)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(weight, z, b)
        return _up(x, weight, bias, z, b, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        needs_x, _, _, needs_z, needs_b, _ = ctx.needs_input_grad
        with without_autocast(g):
            weight, z, b = ctx.saved_tensors
            d_x, d_z, d_b = _up_backward(g, weight, z, b, ctx.scale, (needs_x, needs_z, needs_b))
        return d_x, None, None, d_z, d_b, None


def low_rank_linear_of_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float = 1.0
) -> Tensor:
    """`low_rank_linear` for a few rows, where a call costs more than a product; no gradients and no activation.

    All tensors must have the dtype of x, and autocast must be off.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias).addmm_(F.linear(rows, a), b.t(), alpha=scale)
    return y.view(*x.shape[:-1], y.shape[-1])


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    activation: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """y = x W^T + bias + s phi(x A^T) B^T.

    Args:
        x: The input (..., in), in any floating dtype.
        weight: W (out, in), in the dtype of x; receives no gradient.
        bias: (out,) in the dtype of x, or None; receives no gradient.
        a: A (r, in), in any floating dtype.
        b: B (out, r), in any floating dtype.
        activation: phi, a function of z = x A^T (N, r), where N is the number of rows of x. Autograd differentiates
            it. None is the identity.
        scale: The factor s.

    Returns:
        y (..., out) in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    if activation is None:
        with without_autocast(x):
            y: Tensor = _LowRankLinear.apply(rows, weight, bias, a, b, scale)
        return y.view(*x.shape[:-1], y.shape[-1])
    with without_autocast(x):
        z, shared = _Down.apply(rows, a)
    z = activation(z).to(x.dtype).t().contiguous().t()  # in the memory order of x A^T, or sums would round differently
    with without_autocast(x):
        # An input that needs no gradient must not get one because `_Down` returned it.
        y = _Up.apply(shared if rows.requires_grad else rows, weight, bias, z, b, scale)
    return y.view(*x.shape[:-1], y.shape[-1])
