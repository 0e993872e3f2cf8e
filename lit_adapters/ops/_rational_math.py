"""The arithmetic of a block in plain PyTorch operations; rational.cpp and _rational_triton.py repeat it.

Tensors are (rows, G, K), coefficients (G, degree), all of one floating dtype. Nothing here knows autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

Coefficients = tuple[Tensor, Tensor]
Columns = list[Tensor]

# Powers of x up to MAX_DEGREE stay far inside float32 below LARGE, and inside float64 for every float32 number.
LARGE = 1e4
MAX_DEGREE = 7
_STAGGER = 272  # elements; tensors that all begin at the start of a page compete for the same places in the cache


class Workspace:
    """Memory for the temporaries of a block, which the next block uses again: fresh memory costs more than the sums."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._taken = 0

    def begin(self) -> None:
        """Nothing of the block before is needed any more."""
        self._taken = 0

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the size of x, (rows, G, K), with anything in it; the first block has the most rows."""
        buffers = self._buffers.setdefault(dtype or x.dtype, [])
        if self._taken == len(buffers):
            offset = _STAGGER * len(buffers)
            flat = torch.empty(offset + x.numel(), dtype=dtype or x.dtype, device=x.device)
            buffers.append(flat[offset:].view(x.shape))
        self._taken += 1
        return buffers[self._taken - 1][: x.shape[0]]


def columns(coefficients: Tensor) -> Columns:
    """(G, k) -> k tensors (G, 1) that broadcast over a block."""
    return list(coefficients.unsqueeze(-1).unbind(1))


def polynomial(c: Columns, x: Tensor, out: Tensor) -> Tensor:
    """c_0 + c_1 x + ... by Horner's rule, written to `out`."""
    if len(c) == 1:
        return out.copy_(c[0].expand_as(x))
    torch.addcmul(c[-2], x, c[-1], out=out)
    for column in reversed(c[:-2]):
        torch.addcmul(column, out, x, out=out)  # one operation in place of two
    return out


def slope(c: Columns, x: Tensor, out: Tensor) -> Tensor:
    """The derivative of `polynomial`."""
    return polynomial([i * column for i, column in enumerate(c)][1:], x, out)


def sign(z: Tensor) -> Tensor:
    """Sign with sign(0) = +1."""
    return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)


def value(x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str, space: Workspace) -> Tensor:
    """R(x), or R(x) - R_base(x)."""
    a, b = (columns(c) for c in coefficients)
    zero, q = torch.zeros_like(b[0]), space.like(x)
    if form == "abs-of-sum":
        polynomial([zero, *b], x, q).abs_().add_(1)
    else:
        polynomial([zero, *(c.abs() for c in b)], torch.abs(x, out=space.like(x)), q).add_(1)
    y = polynomial(a, x, space.like(x)).div_(q)
    return y if base is None else y.sub_(value(x, base, None, form, space))


def parts(
    x: Tensor, coefficients: Coefficients, form: str, space: Workspace
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """1/Q, R, dR/dx and, for abs-of-sum, the sign S of the sum under the bars."""
    a, b = (columns(c) for c in coefficients)
    zero, q = torch.zeros_like(b[0]), space.like(x)
    lead = space.like(x).fill_(1)
    if form == "abs-of-sum":
        b, magnitude = [zero, *b], x
        polynomial(b, x, q)
        lead.copysign_(q)  # 0 + a product is no negative zero
        q.abs_()
    else:
        b, magnitude = [zero, *(c.abs() for c in b)], torch.abs(x, out=space.like(x))
        lead.copysign_(torch.add(x, 0.0, out=q))  # -0 + 0 is +0
        polynomial(b, magnitude, q)
    reciprocal = q.add_(1).reciprocal_()
    y = polynomial(a, x, space.like(x)).mul_(reciprocal)
    q_slope = slope(b, magnitude, space.like(x)).mul_(lead)
    dx = slope(a, x, space.like(x)).addcmul_(q_slope, y, value=-1).mul_(reciprocal)
    return reciprocal, y, dx, lead if form == "abs-of-sum" else None


def moments(weight: Tensor, x: Tensor, count: int) -> list[Tensor]:
    """Sums (G, K) over the rows of weight, weight x, weight x^2, ...; uses `weight` up."""
    sums = [weight.sum(0)]
    for _ in range(1, count):
        sums.append(weight.mul_(x).sum(0))
    return sums


def gradients(
    grad: Tensor,
    x: Tensor,
    coefficients: Coefficients,
    base: Coefficients | None,
    form: str,
    need_coefficients: bool,
    space: Workspace,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of x, and sums (G, K) over the rows of those of a_0..a_m, b_1..b_n.

    dR/dx = (P' - Q' R) / Q            dR/da_i = x^i / Q
    dR/db_j = -x^j S R / Q             abs-of-sum, S = sign(b_1 x + ... + b_n x^n)
    dR/db_j = -sign(b_j) |x|^j R / Q   sum-of-abs; sign(b_j) is left to the caller
    """
    reciprocal, y, dx, s = parts(x, coefficients, form, space)
    sums: list[Tensor] = []
    if need_coefficients:
        power = x if s is not None else torch.abs(x, out=space.like(x))
        weight = reciprocal.mul_(grad)
        lever = y.mul_(weight).neg_().mul_(power)
        sums = moments(lever if s is None else lever.mul_(s), power, coefficients[1].shape[1])
        sums = moments(weight, x, coefficients[0].shape[1]) + sums
    if base is not None:
        dx.sub_(parts(x, base, form, space)[2])
    return dx.mul_(grad), sums
