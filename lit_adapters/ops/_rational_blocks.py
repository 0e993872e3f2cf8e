"""The path of `rational` that needs no compiler: plain PyTorch operations, block by block.

Runs on the CPU where the C++ kernel cannot, and on a GPU without Triton; rational.py lists the other paths. Blocks are
small enough for temporaries to stay in the processor's cache. Tensors are (outer, G, K) in any floating dtype,
coefficients (G, degree).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_adapters.ops import _rational_math as math
from lit_adapters.ops._rational_math import Coefficients

# Elements of a block. On a CPU, the temporaries of a block should stay in the cache, but threads wait for each other if
# blocks are much smaller; a GPU wants fewer and larger launches.
_BLOCK_OF_THREAD = 1 << 17
_BLOCK_ELSEWHERE = 1 << 22


def _blocks(x: Tensor) -> Iterator[slice]:
    block = _BLOCK_OF_THREAD * torch.get_num_threads() if x.device.type == "cpu" else _BLOCK_ELSEWHERE
    rows = max(1, -(-block // max(1, x.shape[1] * x.shape[2])))
    return (slice(start, start + rows) for start in range(0, x.shape[0], rows))


def _working_dtype(block: Tensor) -> torch.dtype:
    """float32 where it is exact enough; float64 for float64 inputs and for blocks whose powers may overflow."""
    low, high = torch.aminmax(block)  # both are NaN if the block holds a NaN, and the block is then computed in float64
    fits = -low.item() <= math.LARGE and high.item() <= math.LARGE
    return torch.float32 if fits and block.dtype != torch.float64 else torch.float64


def _in_dtype(dtype: torch.dtype, block: Tensor, workspace: math.Workspace) -> Tensor:
    """The block, or a copy of it in another dtype."""
    return block if block.dtype == dtype else workspace.like(block, dtype).copy_(block)


def _cast(coefficients: Coefficients | None, dtype: torch.dtype) -> Coefficients | None:
    return None if coefficients is None else (coefficients[0].to(dtype), coefficients[1].to(dtype))


def forward(x: Tensor, y: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str) -> None:
    """Write R(x), or R(x) - R_base(x) if a base is given, to `y`."""
    workspace = math.Workspace()
    for rows in _blocks(x):
        workspace.begin()
        block = _in_dtype(_working_dtype(x[rows]), x[rows], workspace)
        a, b = (c.to(block.dtype) for c in coefficients)
        y[rows] = math.value(block, (a, b), _cast(base, block.dtype), form, workspace)


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
        The gradients of the coefficients (G, m+1+n) in float64. Rows are added in a fixed order, so that sums do not
        depend on timing.
    """
    a, b = coefficients
    total = torch.zeros(a.shape[1] + b.shape[1], a.shape[0], dtype=torch.float64, device=x.device)
    workspace = math.Workspace()
    for rows in _blocks(x):
        workspace.begin()
        dtype = _working_dtype(x[rows])
        block, block_grad = (_in_dtype(dtype, t[rows], workspace) for t in (x, grad))
        current = a.to(dtype), b.to(dtype)
        grad_x[rows], sums = math.gradients(
            block_grad, block, current, _cast(base, dtype), form, need_coefficients, workspace
        )
        if sums:
            total += torch.stack(sums).sum(2, dtype=torch.float64)
    return total.T
