"""The arithmetic of a rational function on one block, in plain PyTorch operations: values, slopes and gradients.

Used by _rational_blocks.py; rational.cpp and _rational_triton.py repeat the same formulas for the other paths of
rational.py. Tensors are (rows, G, K), coefficients (G, degree), all of one floating dtype. Nothing here uses autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

Coefficients = tuple[Tensor, Tensor]
Columns = list[Tensor]

# Powers up to MAX_DEGREE are far from overflow: in float32 for |x| <= LARGE, in float64 for every float32 number.
LARGE = 1e4
MAX_DEGREE = 7
_STAGGER = 272  # elements between the starts of buffers; page-aligned buffers would share the same cache lines


class Workspace:
    """Memory for the temporaries of a block, reused by the next: fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._taken = 0

    def begin(self) -> None:
        """Start a block: all buffers may be overwritten."""
        self._taken = 0

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of the shape of x (rows, G, K). No block may have more rows than the first."""
        buffers = self._buffers.setdefault(dtype or x.dtype, [])
        if self._taken == len(buffers):
            offset = _STAGGER * len(buffers)
            flat = torch.empty(offset + x.numel(), dtype=dtype or x.dtype, device=x.device)
            buffers.append(flat[offset:].view(x.shape))
        self._taken += 1
        return buffers[self._taken - 1][: x.shape[0]]


def columns(coefficients: Tensor) -> Columns:
    """The k columns (G, 1) of coefficients (G, k), each of which broadcasts over a block."""
    return list(coefficients.unsqueeze(-1).unbind(1))


def polynomial(c: Columns, x: Tensor, out: Tensor) -> Tensor:
    """Write c_0 + c_1 x + ... to `out`, by Horner's rule."""
    if len(c) == 1:
        return out.copy_(c[0].expand_as(x))
    torch.addcmul(c[-2], x, c[-1], out=out)
    for column in reversed(c[:-2]):
        torch.addcmul(column, out, x, out=out)  # one operation instead of two
    return out


def slope(c: Columns, x: Tensor, out: Tensor) -> Tensor:
    """Write the derivative of `polynomial` to `out`."""
    return polynomial([i * column for i, column in enumerate(c)][1:], x, out)


def sign(z: Tensor) -> Tensor:
    """The sign of z, with sign(0) = +1."""
    return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)


def value(x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str, workspace: Workspace) -> Tensor:
    """R(x), or R(x) - R_base(x) if a base is given, (rows, G, K)."""
    a, b = (columns(c) for c in coefficients)
    zero, q = torch.zeros_like(b[0]), workspace.like(x)
    if form == "abs-of-sum":
        polynomial([zero, *b], x, q).abs_().add_(1)
    else:
        polynomial([zero, *(c.abs() for c in b)], torch.abs(x, out=workspace.like(x)), q).add_(1)
    y = polynomial(a, x, workspace.like(x)).div_(q)
    return y if base is None else y.sub_(value(x, base, None, form, workspace))


def value_and_slope(
    x: Tensor, coefficients: Coefficients, form: str, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """1/Q, R, dR/dx and, for abs-of-sum, S = sign(b_1 x + ... + b_n x^n); (rows, G, K) each."""
    a, b = (columns(c) for c in coefficients)
    zero, q = torch.zeros_like(b[0]), workspace.like(x)
    signs = workspace.like(x).fill_(1)
    if form == "abs-of-sum":
        b, magnitude = [zero, *b], x
        polynomial(b, x, q)
        signs.copysign_(q)  # q is 0 + ..., which is never -0
        q.abs_()
    else:
        b, magnitude = [zero, *(c.abs() for c in b)], torch.abs(x, out=workspace.like(x))
        signs.copysign_(torch.add(x, 0.0, out=q))  # -0 + 0 is +0
        polynomial(b, magnitude, q)
    reciprocal = q.add_(1).reciprocal_()
    y = polynomial(a, x, workspace.like(x)).mul_(reciprocal)
    q_slope = slope(b, magnitude, workspace.like(x)).mul_(signs)
    dx = slope(a, x, workspace.like(x)).addcmul_(q_slope, y, value=-1).mul_(reciprocal)
    return reciprocal, y, dx, signs if form == "abs-of-sum" else None


def moments(weight: Tensor, x: Tensor, count: int) -> list[Tensor]:
    """Sums (G, K) over the rows of weight, weight x, weight x^2, ... (`count` of them); overwrites `weight`."""
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
    workspace: Workspace,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of x, and sums (G, K) over the rows of the gradients of a_0..a_m, b_1..b_n.

    dR/dx = (P' - Q' R) / Q            dR/da_i = x^i / Q
    dR/db_j = -x^j S R / Q             abs-of-sum, S = sign(b_1 x + ... + b_n x^n)
    dR/db_j = -sign(b_j) |x|^j R / Q   sum-of-abs; the caller multiplies by sign(b_j)
    """
    reciprocal, y, dx, signs = value_and_slope(x, coefficients, form, workspace)
    sums: list[Tensor] = []
    if need_coefficients:
        power = x if signs is not None else torch.abs(x, out=workspace.like(x))
        weight = reciprocal.mul_(grad)
        by_b1 = y.mul_(weight).neg_().mul_(power)  # the gradient of b_1, up to S
        sums = moments(by_b1 if signs is None else by_b1.mul_(signs), power, coefficients[1].shape[1])
        sums = moments(weight, x, coefficients[0].shape[1]) + sums
    if base is not None:
        dx.sub_(value_and_slope(x, base, form, workspace)[2])
    return dx.mul_(grad), sums
