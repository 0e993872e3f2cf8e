"""A linear layer whose weight is formed for the call: y = x (W0 + s f(B A))^T + bias, f elementwise.

Nothing of the size of the weight outlives the call: backward forms W0 + s f(B A) again for the gradient of x, and
f'(B A) in blocks of rows for the gradients of A and B. Forward takes one product of the layer's size, backward two
(plus the thin ones). The elementwise part takes a dozen PyTorch operations, or one pass of merged.cpp
(_merged_native.py) for the functions it knows. Batched gradients (`is_grads_batched`) are not supported, because
backward writes to its results block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapters.ops import _merged_native as native
from lit_adapters.ops._context import transformed, without_autocast

_BLOCK = 1 << 19  # elements of the weight at a time, so that temporaries stay in the cache


class Update(Protocol):
    """s f and its derivatives, elementwise functions of z (any shape) and of a frequency w (no dimension)."""

    @property
    def learns_frequency(self) -> bool:
        """Whether w is trained."""

    def sinusoid(self, frequency: float) -> native.Sinusoid | None:
        """c1, c2, c3 and phase if s f(z) = c1 z + (c2 + c3 z) sin(w z + phase); None for other functions."""

    def value(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s f(z)."""

    def derivative(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s f'(z)."""

    def by_frequency(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s df/dw(z)."""


def merged_weight(
    matrix: Tensor | None, a: Tensor, b: Tensor, frequency: Tensor, update: Update, dtype: torch.dtype
) -> Tensor:
    """W0 + s f(B A).

    Args:
        matrix: W0 (out, in), in any floating dtype; None for zero.
        a: A (r, in), float32 or wider.
        b: B (out, r), in the dtype of A.
        frequency: The frequency w, a tensor of no dimension in the dtype of A.
        update: s f.
        dtype: The dtype of the result. The sum is computed in the dtype of A and cast once.

    Returns:
        The weight (out, in), in the memory order of W0.
    """
    merged = _empty(matrix, a, b, dtype)
    for rows in _row_blocks(b.shape[0], a.shape[1]):
        _merge(b[rows] @ a, None if matrix is None else matrix[rows], merged[rows], frequency, update)
    return merged


def _merge(z: Tensor, matrix: Tensor | None, merged: Tensor, frequency: Tensor, update: Update) -> None:
    """Write W0 + s f(z) to `merged`, (rows, in)."""
    if native.can_run(z, matrix, merged):
        w = frequency.item()
        sinusoid = update.sinusoid(w)
        if sinusoid is not None and native.merge(z, matrix, merged, sinusoid, w):
            return
    change = update.value(z, frequency)
    merged.copy_(change if matrix is None else matrix + change)


def _differentiate(
    z: Tensor, gradient: Tensor, matrix: Tensor | None, merged: Tensor | None, frequency: Tensor, update: Update
) -> tuple[Tensor, Tensor | float]:
    """The gradients of z (rows, in) and of the frequency, from the `gradient` of the weight (rows, in).

    Also writes W0 + s f(z) to `merged` if it is given.
    """
    if native.can_run(z, matrix, merged, gradient) and gradient.dtype == z.dtype:
        w = frequency.item()
        sinusoid = update.sinusoid(w)
        if sinusoid is not None:
            gradient = gradient.contiguous()
            total = native.backward(z, gradient, matrix, merged, sinusoid, w, update.learns_frequency)
            if total is not None:
                return gradient, total
    if merged is not None:
        _merge(z, matrix, merged, frequency, update)
    by_frequency = (gradient * update.by_frequency(z, frequency)).sum() if update.learns_frequency else 0.0
    return gradient * update.derivative(z, frequency), by_frequency


def _empty(matrix: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if matrix is None:
        return torch.empty((b.shape[0], a.shape[1]), dtype=dtype, device=a.device)
    return torch.empty_like(matrix, dtype=dtype)  # keeps a transposed order


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    # One block under torch.compile, which fuses it; a loop would be unrolled into the graph.
    blocks = 1 if torch.compiler.is_compiling() else -(-rows * columns // _BLOCK)
    height = -(-rows // blocks)  # of about equal height, as threads would wait for a thin last block
    return (slice(i, min(i + height, rows)) for i in range(0, rows, height))


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        frequency: Tensor,
        update: Update,
        to_matrix: Callable[[Tensor | None], Tensor | None],
        merged: Tensor | None,
    ) -> Tensor:
        ctx.update, ctx.to_matrix, ctx.merged = update, to_matrix, merged
        ctx.bias_dtype = None if bias is None else bias.dtype
        # A quantised parameter carries attributes beside its data, which `save_for_backward` would lose.
        ctx.packed = weight if hasattr(weight, "quant_state") else None
        ctx.save_for_backward(x, None if ctx.packed is not None else weight, a, b, frequency)
        if merged is None:
            merged = merged_weight(to_matrix(weight), a, b, frequency, update, x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A caller may run backward under autocast, which would round the argument of f.
        with without_autocast(gradients[0]):
            return _backward(ctx, gradients[0])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, frequency = ctx.saved_tensors
    weight = ctx.packed if ctx.packed is not None else weight
    matrix = ctx.to_matrix(weight)
    g, x2 = gradient.reshape(-1, b.shape[0]), x.reshape(-1, a.shape[1])
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    update: Update = ctx.update
    # The given weight is a constant, through which second derivatives cannot pass.
    merged: Any = None if torch.is_grad_enabled() else ctx.merged
    building = needs_x and merged is None
    if building:
        merged = _empty(matrix, a, b, x.dtype)
    d_matrix = torch.empty_like(matrix) if needs_weight and matrix is not None else None
    d_a, d_b, d_frequency = torch.zeros_like(a), torch.empty_like(b), torch.zeros_like(frequency)
    for rows in _row_blocks(b.shape[0], a.shape[1]):
        d_merged = (g[:, rows].t() @ x2).to(a.dtype)
        if d_matrix is not None:
            d_matrix[rows] = d_merged.to(d_matrix.dtype)
        raw, written = None if matrix is None else matrix[rows], merged[rows] if building else None
        d_z, by_frequency = _differentiate(b[rows] @ a, d_merged, raw, written, frequency, update)
        d_frequency = d_frequency + by_frequency
        d_b[rows] = d_z @ a.t()
        d_a = d_a + b[rows].t() @ d_z
    d_x = (g @ merged).view(x.shape) if needs_x else None
    d_weight = None if d_matrix is None else _of_weight(ctx.to_matrix, weight, d_matrix)
    d_bias = g.sum(0, dtype=a.dtype).to(ctx.bias_dtype) if needs_bias else None
    return d_x, d_weight, d_bias, d_a, d_b, d_frequency, None, None, None


def _of_weight(to_matrix: Callable[[Tensor | None], Tensor | None], weight: Tensor, d_matrix: Tensor) -> Tensor:
    """The gradient of a parameter that holds the matrix in another layout, such as Conv1D's (in, out)."""
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        matrix = to_matrix(leaf)
    assert matrix is not None
    create_graph = torch.is_grad_enabled()
    (d_weight,) = torch.autograd.grad(matrix, leaf, d_matrix, create_graph=create_graph)
    return d_weight


def merged_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    frequency: Tensor,
    update: Update,
    to_matrix: Callable[[Tensor | None], Tensor | None],
    merged: Tensor | None = None,
) -> Tensor:
    """y = x (W0 + s f(B A))^T + bias.

    Args:
        x: The input (..., in), in any floating dtype.
        weight: The parameter that holds W0, in any floating dtype or quantised; None for zero.
        bias: (out,) in any floating dtype, or None.
        a: A (r, in), float32 or wider, as the argument of f needs the precision.
        b: B (out, r), in the dtype of A.
        frequency: The frequency w, a tensor of no dimension in the dtype of A; it may require a gradient.
        update: s f and its derivatives.
        to_matrix: Returns W0 (out, in) for `weight`, or None for zero. It may subtract a constant from W0.
        merged: W0 + s f(B A) (out, in) in the dtype of x, if it was computed before.

    Returns:
        y (..., out) in the dtype of x.
    """
    if transformed():
        with without_autocast(x):
            matrix, change = to_matrix(weight), update.value(b @ a, frequency)
            formed = (change if matrix is None else matrix + change).to(x.dtype)
            return F.linear(x, formed, None if bias is None else bias.to(x.dtype))
    # Flattened outside the Function: F.linear would flatten a contiguous input inside it and return a view, and PyTorch
    # forbids writing to a view that a Function returns. ViTs with a class token and Swin V2 do write to the output.
    rows = x.reshape(-1, x.shape[-1]) if x.is_contiguous() else x
    with without_autocast(x):
        y: Tensor = _MergedLinear.apply(rows, weight, bias, a, b, frequency, update, to_matrix, merged)
    return y.view(*x.shape[:-1], y.shape[-1]) if rows is not x else y
