"""The arithmetic of a block in plain PyTorch operations; rational.cpp and _rational_triton.py repeat it.

Tensors are (rows, G, K), coefficients (G, degree), all of one floating dtype. Nothing here knows autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

Coefficients = tuple[Tensor, Tensor]

# Powers of x up to MAX_DEGREE stay far inside float32 below LARGE, and inside float64 for every float32 number.
LARGE = 1e4
MAX_DEGREE = 7


def columns(coefficients: Tensor) -> list[Tensor]:
    """(G, k) -> k tensors (G, 1) that broadcast over a block."""
    return list(coefficients.unsqueeze(-1).unbind(1))


def polynomial(c: list[Tensor], x: Tensor) -> Tensor:
    """c_0 + c_1 x + ... by Horner's rule, in memory of its own."""
    if len(c) == 1:
        return c[0].expand_as(x).clone()
    value = torch.addcmul(c[-2], x, c[-1])
    for column in reversed(c[:-2]):
        torch.addcmul(column, value, x, out=value)  # one operation in place of two, and no new memory
    return value


def slope(c: list[Tensor], x: Tensor) -> Tensor:
    """The derivative of `polynomial`."""
    return polynomial([i * column for i, column in enumerate(c)][1:], x)


def sign(z: Tensor) -> Tensor:
    """Sign with sign(0) = +1, for z that is no negative zero."""
    return torch.ones_like(z).copysign_(z)


def value(x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str) -> Tensor:
    """R(x), or R(x) - R_base(x)."""
    a, b = (columns(c) for c in coefficients)
    zero = torch.zeros_like(b[0])
    if form == "abs-of-sum":
        q = polynomial([zero, *b], x).abs_().add_(1)
    else:
        q = polynomial([zero, *(c.abs() for c in b)], x.abs()).add_(1)
    y = polynomial(a, x).div_(q)
    return y if base is None else y.sub_(value(x, base, None, form))


def parts(x: Tensor, coefficients: Coefficients, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """1/Q, R, dR/dx and, for abs-of-sum, the sign S of the sum under the bars."""
    a, b = (columns(c) for c in coefficients)
    zero = torch.zeros_like(b[0])
    if form == "abs-of-sum":
        b = [zero, *b]
        inner = polynomial(b, x)  # 0 + a product, which is no negative zero
        s = lead = sign(inner)
        magnitude, q = x, inner.abs_()
    else:
        b, magnitude, s = [zero, *(c.abs() for c in b)], x.abs(), None
        lead, q = sign(x + 0.0), polynomial(b, magnitude)  # -0 + 0 is +0
    reciprocal = q.add_(1).reciprocal_()
    y = polynomial(a, x).mul_(reciprocal)
    q_slope = slope(b, magnitude).mul_(lead)
    dx = slope(a, x).addcmul_(q_slope, y, value=-1).mul_(reciprocal)
    return reciprocal, y, dx, s


def moments(weight: Tensor, x: Tensor, count: int) -> list[Tensor]:
    """Sums (G, K) over the rows of weight, weight x, weight x^2, ...; uses `weight` up."""
    sums = [weight.sum(0)]
    for _ in range(1, count):
        sums.append(weight.mul_(x).sum(0))
    return sums


def gradients(
    grad: Tensor, x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str, need_coefficients: bool
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of x, and sums (G, K) over the rows of those of a_0..a_m, b_1..b_n.

    dR/dx = (P' - Q' R) / Q            dR/da_i = x^i / Q
    dR/db_j = -x^j S R / Q             abs-of-sum, S = sign(b_1 x + ... + b_n x^n)
    dR/db_j = -sign(b_j) |x|^j R / Q   sum-of-abs; sign(b_j) is left to the caller
    """
    reciprocal, y, dx, s = parts(x, coefficients, form)
    sums: list[Tensor] = []
    if need_coefficients:
        weight, power = reciprocal.mul_(grad), x if s is not None else x.abs()
        lever = y.mul_(weight).neg_().mul_(power)
        sums = moments(lever if s is None else lever.mul_(s), power, coefficients[1].shape[1])
        sums = moments(weight, x, coefficients[0].shape[1]) + sums
    if base is not None:
        dx.sub_(parts(x, base, form)[2])
    return dx.mul_(grad), sums
