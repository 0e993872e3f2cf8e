"""The path of `rational` for GPUs: Triton kernels, one pass over memory in each direction.

Runs for CUDA tensors if triton is installed; rational.py lists the other paths. Tested under Triton's interpreter only:
its speed has not been measured on a GPU.

A program takes a tile of one group (rows, part of a row) in the dtype of memory and computes in float32; a tile with a
number whose powers might overflow is computed in float64. Sums for the coefficients take two stages without atomics:
each program writes its own sums, which are then added in float64 in a fixed order, so that results do not vary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapters.ops import _rational_math as math
from lit_adapters.ops._rational_math import Coefficients

_TILE = 1024  # elements of a program

_LARGE = tl.constexpr(math.LARGE)


@triton.jit
def _polynomial(c, x, DEGREE: tl.constexpr, ABS: tl.constexpr):  # type: ignore[no-untyped-def]
    """c_0 + ... + c_DEGREE x^DEGREE and its derivative, both by Horner's rule; with |c_i| for c_i if ABS."""
    value, slope = tl.zeros_like(x), tl.zeros_like(x)
    for i in tl.static_range(DEGREE + 1):
        coefficient = tl.load(c + DEGREE - i).to(x.dtype)
        if ABS:
            coefficient = tl.abs(coefficient)
        slope = slope * x + value
        value = value * x + coefficient
    return value, slope


@triton.jit
def _value_and_slope(x, a, b, M: tl.constexpr, N: tl.constexpr, ABS_OF_SUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """1/Q, R, dR/dx, and two factors of the gradients of b: dR/db_j = -by_b1 power^(j-1) R / Q."""
    one = tl.full(x.shape, 1, x.dtype)
    p, p_slope = _polynomial(a, x, M, False)
    if ABS_OF_SUM:
        v, v_slope = _polynomial(b, x, N - 1, False)
        inner, inner_slope = x * v, v + x * v_slope
        s = tl.where(inner >= 0, one, -one)
        q, q_slope, by_b1, power = 1 + s * inner, s * inner_slope, s * x, x
    else:
        power = tl.abs(x)
        v, v_slope = _polynomial(b, power, N - 1, True)
        s = tl.where(x >= 0, one, -one)
        q, q_slope, by_b1 = 1 + power * v, s * (v + power * v_slope), power
    # Divided, because a multiplication might be fused with the subtraction of the base, and R - R would not be 0.
    y = p / q
    return 1 / q, y, (p_slope - q_slope * y) / q, by_b1, power


@triton.jit
def _tile(outer, G, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The group, the offsets and the mask of the elements of (outer, G, K) that this program computes."""
    group = tl.program_id(1)
    tiles = tl.cdiv(K, COLUMNS)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = (rows[:, None] * G + group) * K + columns[None, :]
    return group, offsets, (rows < outer)[:, None] & (columns < K)[None, :]


@triton.jit
def _value(x, a, b, a0, b0, M: tl.constexpr, N: tl.constexpr, ABS_OF_SUM: tl.constexpr, BASE: tl.constexpr):  # type: ignore[no-untyped-def]
    _, y, _, _, _ = _value_and_slope(x, a, b, M, N, ABS_OF_SUM)
    if BASE:
        _, y0, _, _, _ = _value_and_slope(x, a0, b0, M, N, ABS_OF_SUM)
        y -= y0
    return y


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    y_pointer,
    a,
    b,
    a0,
    b0,
    outer,
    G,
    K,
    M: tl.constexpr,
    N: tl.constexpr,
    ABS_OF_SUM: tl.constexpr,
    BASE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, offsets, mask = _tile(outer, G, K, ROWS, COLUMNS)
    a, b, a0, b0 = a + group * (M + 1), b + group * N, a0 + group * (M + 1), b0 + group * N
    x = tl.load(x_pointer + offsets, mask=mask, other=0)
    if WIDE or tl.sum((tl.abs(x) > _LARGE).to(tl.int32)) > 0:
        y = _value(x.to(tl.float64), a, b, a0, b0, M, N, ABS_OF_SUM, BASE).to(x.dtype)
    else:
        y = _value(x.to(tl.float32), a, b, a0, b0, M, N, ABS_OF_SUM, BASE).to(x.dtype)
    tl.store(y_pointer + offsets, y, mask=mask)


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    g,
    x,
    a,
    b,
    a0,
    b0,
    sums,
    M: tl.constexpr,
    N: tl.constexpr,
    ABS_OF_SUM: tl.constexpr,
    BASE: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
):
    """The gradient of x; writes the gradients of the coefficients, summed over the tile, to `sums`.

    Masked elements have g = 0.
    """
    reciprocal, y, slope, by_b1, power = _value_and_slope(x, a, b, M, N, ABS_OF_SUM)
    if COEFFICIENTS:
        weight = g * reciprocal
        term = weight
        for i in tl.static_range(M + 1):
            tl.store(sums + i, tl.sum(term).to(tl.float64))
            term = term * x
        term = -weight * y * by_b1
        for j in tl.static_range(N):
            tl.store(sums + M + 1 + j, tl.sum(term).to(tl.float64))
            term = term * power
    if BASE:
        _, _, slope0, _, _ = _value_and_slope(x, a0, b0, M, N, ABS_OF_SUM)
        slope -= slope0
    return g * slope


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    g_pointer,
    x_pointer,
    d_pointer,
    sums,
    a,
    b,
    a0,
    b0,
    outer,
    G,
    K,
    M: tl.constexpr,
    N: tl.constexpr,
    ABS_OF_SUM: tl.constexpr,
    BASE: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, offsets, mask = _tile(outer, G, K, ROWS, COLUMNS)
    a, b, a0, b0 = a + group * (M + 1), b + group * N, a0 + group * (M + 1), b0 + group * N
    sums += (tl.program_id(0) * G + group) * (M + 1 + N)
    x = tl.load(x_pointer + offsets, mask=mask, other=0)
    g = tl.load(g_pointer + offsets, mask=mask, other=0)
    if WIDE or tl.sum((tl.abs(x) > _LARGE).to(tl.int32)) > 0:
        d = _gradients(g.to(tl.float64), x.to(tl.float64), a, b, a0, b0, sums, M, N, ABS_OF_SUM, BASE, COEFFICIENTS).to(
            x.dtype
        )
    else:
        d = _gradients(g.to(tl.float32), x.to(tl.float32), a, b, a0, b0, sums, M, N, ABS_OF_SUM, BASE, COEFFICIENTS).to(
            x.dtype
        )
    tl.store(d_pointer + offsets, d, mask=mask)


def _launch(x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str) -> tuple[int, tuple, dict]:
    """The number of programs along the first axis, the arguments after the tensors of x's size, and the options."""
    outer, groups, length = x.shape
    columns = min(_TILE, triton.next_power_of_2(length))
    rows = _TILE // columns
    (a, b), (a0, b0) = coefficients, base or coefficients
    tensors = [t.contiguous() for t in (a, b, a0, b0)]
    options = {"M": a.shape[1] - 1, "N": b.shape[1], "ABS_OF_SUM": form == "abs-of-sum", "BASE": base is not None}
    options |= {"WIDE": x.dtype == torch.float64, "ROWS": rows, "COLUMNS": columns}
    return triton.cdiv(outer, rows) * triton.cdiv(length, columns), (*tensors, outer, groups, length), options


def forward(x: Tensor, y: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str) -> None:
    """Write R(x), or R(x) - R_base(x) if a base is given, to `y`; both are (outer, G, K) and contiguous."""
    programs, arguments, options = _launch(x, coefficients, base, form)
    if x.numel():
        with _on_device(x):
            _forward_kernel[(programs, x.shape[1])](x, y, *arguments, **options)


def backward(
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor,
    coefficients: Coefficients,
    base: Coefficients | None,
    form: str,
    need_coefficients: bool,
) -> Tensor:
    """Write the gradient of x to `grad_x`.

    Returns:
        The gradients of the coefficients (G, m+1+n) in float64.
    """
    programs, arguments, options = _launch(x, coefficients, base, form)
    width = coefficients[0].shape[1] + coefficients[1].shape[1]
    sums = torch.zeros(programs, x.shape[1], width, dtype=torch.float64, device=x.device)
    if x.numel():
        with _on_device(x):
            _backward_kernel[(programs, x.shape[1])](
                grad, x, grad_x, sums, *arguments, COEFFICIENTS=need_coefficients, **options
            )
    return sums.sum(0)


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may be another than that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
