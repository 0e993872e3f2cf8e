"""The path of `rational` in C++, on the CPU: rational.cpp, compiled at first use for each form and its degrees.

Runs for float32 and bfloat16 inputs with groups of at least 8 elements, or of one channel that is last in memory;
rational.py lists the other paths. If the
kernel cannot be built or loaded, there is one warning, and _rational_blocks.py takes over.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lit_adapters.ops._native import DTYPES, function, library, pointers, threads, usable
from lit_adapters.ops._rational_math import Coefficients

NAME = "rational"
_CHUNK = 1 << 15  # elements of a chunk of rows in backward; x, dy and dx of a chunk fit a core's second-level cache
_SHORTEST = 8  # elements of a group that are neighbours in memory; fewer would hardly fill vectors
_MOST_CHUNKS = 64  # of rows where each channel is a group; each has sums of its own in backward

Shape = tuple[int, int, int]  # outer, G, K
# The function, the addresses of the coefficients, and the coefficients themselves, which must stay referenced.
_Kernel = tuple[Any, list[int | None], list[Tensor | None]]


def can_run(x: Tensor, shape: Shape) -> bool:
    """Whether the kernel can compute for `x` in this shape: on the CPU, in a dtype it has, with groups long enough."""
    return usable(NAME) and x.device.type == "cpu" and x.dtype in DTYPES and (shape[2] >= _SHORTEST or shape[2] == 1)


def _library(coefficients: Coefficients, form: str) -> ctypes.CDLL | None:
    m, n = coefficients[0].shape[1] - 1, coefficients[1].shape[1]
    return library(NAME, "rational function", M=m, N=n, ABS_OF_SUM=int(form == "abs-of-sum"))


def _floats(coefficients: Coefficients, base: Coefficients | None) -> list[Tensor | None]:
    tensors = [_as_float(c) for c in (*coefficients, *(base or ()))]
    return [*tensors, *[None] * (4 - len(tensors))]


def _as_float(c: Tensor) -> Tensor:
    if not c.is_cpu:
        raise RuntimeError(f"the coefficients of a rational function are on {c.device}, its input on the CPU")
    # The test saves time: for a single token, three conversions that change nothing take longer than the function.
    return c if c.dtype == torch.float32 and c.is_contiguous() else c.detach().to(torch.float32).contiguous()


def _columns(coefficients: list[Tensor | None]) -> list[Tensor | None]:
    """The coefficients of each degree side by side in memory, (degree, G)."""
    return [None if c is None else c.detach().T.contiguous() for c in coefficients]


def _rows(shape: Shape) -> int:
    """Rows of a chunk where each channel is a group."""
    outer, groups, _ = shape
    return max(1, _CHUNK // max(1, groups), -(-outer // _MOST_CHUNKS))


def forward(
    x: Tensor, y: Tensor, shape: Shape, coefficients: Coefficients, base: Coefficients | None, form: str
) -> bool:
    """Write R(x), or R(x) - R_base(x) if a base is given, to `y`.

    Args:
        x: In memory like a contiguous tensor of `shape`; float32 or bfloat16.
        y: As `x`.
        shape: (outer, G, K).
        coefficients: (G, m+1) and (G, n), any floating dtype.
        base: Coefficients of the subtracted function, of the same shapes.
        form: "abs-of-sum" or "sum-of-abs".

    Returns:
        False if the kernel cannot be built; nothing is written then.

    Raises:
        RuntimeError: The coefficients are not on the CPU.
    """
    if (functions := _library(coefficients, form)) is None:
        return False
    floats = _floats(coefficients, base)  # referenced until the kernel has run
    if shape[2] == 1:
        kernel = function(functions, f"forward_channels_{DTYPES[x.dtype]}", pointers=6, sizes=3)
        floats = _columns(floats)
        kernel(*pointers(x, y, *floats), *shape[:2], _rows(shape), threads(x.numel()))
    else:
        kernel = function(functions, f"forward_{DTYPES[x.dtype]}", pointers=6, sizes=3)
        kernel(*pointers(x, y, *floats), *shape, threads(x.numel()))
    return True


class Prepared:
    """`forward` for coefficients that do not change: everything that does not depend on x is looked up once."""

    def __init__(self, coefficients: Coefficients, base: Coefficients | None, form: str) -> None:
        self._coefficients, self._base, self._form = coefficients, base, form
        self._kernels: dict[torch.dtype, _Kernel] = {}

    def __call__(self, x: Tensor) -> Tensor | None:
        """R(x) of a contiguous x (..., D) on the CPU; None if the kernel cannot compute it."""
        channels, groups = x.shape[-1], self._coefficients[0].shape[0]
        found = self._kernels.get(x.dtype) or self._find(x.dtype)
        if found is None or channels % groups or channels < _SHORTEST * groups or not x.numel():
            return None
        kernel, addresses, _ = found
        y, rows = torch.empty_like(x), x.numel() // channels
        kernel(x.data_ptr(), y.data_ptr(), *addresses, rows, groups, channels // groups, threads(x.numel()))
        return y

    def _find(self, dtype: torch.dtype) -> _Kernel | None:
        if dtype not in DTYPES or not usable(NAME) or (functions := _library(self._coefficients, self._form)) is None:
            return None
        floats = _floats(self._coefficients, self._base)
        kernel = function(functions, f"forward_{DTYPES[dtype]}", pointers=6, sizes=3)
        return self._kernels.setdefault(dtype, (kernel, pointers(*floats), floats))


def backward(
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor,
    shape: Shape,
    coefficients: Coefficients,
    base: Coefficients | None,
    form: str,
    need_coefficients: bool,
) -> Tensor | None:
    """Write the gradient of x to `grad_x`.

    Returns:
        The gradients of the coefficients (G, m+1+n) in float64; None if the kernel cannot be built. Chunks are added in
        a fixed order, so that sums do not depend on timing.
    """
    if (functions := _library(coefficients, form)) is None:
        return None
    outer, groups, length = shape
    rows = _rows(shape) if length == 1 else max(1, _CHUNK // max(1, groups * length))
    width = coefficients[0].shape[1] + coefficients[1].shape[1]
    chunks = -(-outer // rows)
    sums = torch.zeros(chunks, groups, width, dtype=torch.float64, device="cpu") if need_coefficients else None
    floats = _floats(coefficients, base)
    if length == 1:
        kernel = function(functions, f"backward_channels_{DTYPES[x.dtype]}", pointers=8, sizes=3)
        floats = _columns(floats)
        kernel(*pointers(grad, x, grad_x, sums, *floats), outer, groups, rows, threads(x.numel()))
    else:
        kernel = function(functions, f"backward_{DTYPES[x.dtype]}", pointers=8, sizes=4)
        kernel(*pointers(grad, x, grad_x, sums, *floats), *shape, rows, threads(x.numel()))
    return torch.zeros(groups, width, dtype=torch.float64, device="cpu") if sums is None else sums.sum(0)
