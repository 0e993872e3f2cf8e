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
    """c_0 + c_1 x + ... by Horner's rule."""
    if len(c) == 1:
        return c[0].expand_as(x)
    value = torch.addcmul(c[-2], x, c[-1])
    for column in reversed(c[:-2]):
        value = torch.addcmul(column, value, x)  # one operation in place of two
    return value


def slope(c: list[Tensor], x: Tensor) -> Tensor:
    """The derivative of `polynomial`."""
    return polynomial([i * column for i, column in enumerate(c)][1:], x)


def sign(z: Tensor) -> Tensor:
    """Sign with sign(0) = +1."""
    return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)


def value(x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str) -> Tensor:
    """R(x), or R(x) - R_base(x)."""
    a, b = (columns(c) for c in coefficients)
    zero = torch.zeros_like(b[0])
    if form == "abs-of-sum":
        q = 1 + polynomial([zero, *b], x).abs()
    else:
        q = 1 + polynomial([zero, *(c.abs() for c in b)], x.abs())
    y = polynomial(a, x) / q
    return y if base is None else y - value(x, base, None, form)


def parts(x: Tensor, coefficients: Coefficients, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """1/Q, R, dR/dx and, for abs-of-sum, the sign S of the sum under the bars."""
    a, b = (columns(c) for c in coefficients)
    zero = torch.zeros_like(b[0])
    s = None
    if form == "abs-of-sum":
        b = [zero, *b]
        inner = polynomial(b, x)
        s = sign(inner)
        q, q_slope = 1 + s * inner, s * slope(b, x)
    else:
        b = [zero, *(c.abs() for c in b)]
        magnitude = x.abs()
        q, q_slope = 1 + polynomial(b, magnitude), sign(x) * slope(b, magnitude)
    reciprocal = 1 / q
    y = polynomial(a, x) * reciprocal
    return reciprocal, y, (slope(a, x) - q_slope * y) * reciprocal, s


def moments(weight: Tensor, x: Tensor, count: int) -> list[Tensor]:
    """Row sums (rows, G) of weight, weight x, weight x^2, ..."""
    sums = [weight.sum(-1)]
    for power in range(1, count):
        weight = weight * x if power == 1 else weight.mul_(x)  # in place of what was made here
        sums.append(weight.sum(-1))
    return sums


def gradients(
    grad: Tensor, x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str, need_coefficients: bool
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of x, and row sums (rows, G) of those of a_0..a_m, b_1..b_n.

    dR/dx = (P' - Q' R) / Q            dR/da_i = x^i / Q
    dR/db_j = -x^j S R / Q             abs-of-sum, S = sign(b_1 x + ... + b_n x^n)
    dR/db_j = -sign(b_j) |x|^j R / Q   sum-of-abs; sign(b_j) is left to the caller
    """
    reciprocal, y, dx, s = parts(x, coefficients, form)
    sums: list[Tensor] = []
    if need_coefficients:
        weight = grad * reciprocal
        lever, power = (s * x, x) if s is not None else (x.abs(), x.abs())
        sums = moments(weight, x, coefficients[0].shape[1])
        sums += moments(-weight * y * lever, power, coefficients[1].shape[1])
    if base is not None:
        dx = dx - parts(x, base, form)[2]
    return grad * dx, sums
