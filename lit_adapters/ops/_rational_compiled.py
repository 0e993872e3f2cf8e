"""Rational functions fused by torch.compile into one pass over memory each way.

The first call for a new (groups, channels, degrees, form, dtype) compiles, about ten seconds on a CPU once and then
kept by PyTorch's on-disk cache; the number of rows is dynamic and never compiles again.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_adapters.ops import _rational_math as math
from lit_adapters.ops._rational_math import Coefficients

log = logging.getLogger(__name__)

# Fewer elements than this are not worth a compilation.
MIN_ELEMENTS = 1 << 18

_compiled: set[tuple[object, ...]] = set()
_broken = False


def _forward(x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str) -> tuple[Tensor, Tensor]:
    wide = x.float()
    return math.value(wide, coefficients, base, form).to(x.dtype), wide.abs().amax(-1)


def _backward(
    grad: Tensor, x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str, need_coefficients: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    wide = x.float()
    grad_x, sums = math.gradients(grad.float(), wide, coefficients, base, form, need_coefficients)
    return grad_x.to(x.dtype), wide.abs().amax(-1), sums


@functools.cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Inductor writes a value to memory once it is read more than a few times, which would split the backward in two.
    return (
        torch.compile(_forward, fullgraph=True),
        torch.compile(_backward, fullgraph=True, options={"realize_reads_threshold": 1 << 20}),
    )


def worthwhile(x: Tensor) -> bool:
    """Whether `x` is large enough to pay for a compilation, and the compiler has not failed before."""
    return not _broken and x.numel() >= MIN_ELEMENTS


def _call(kernel: int, tensors: list[Tensor], coefficients: Coefficients, base: Coefficients | None, *args: Any) -> Any:
    """Run a kernel; None when it cannot be compiled here, after one warning."""
    global _broken
    x = tensors[-1]
    if x.shape[0] < 2:  # a single row cannot be a dynamic dimension
        return None
    # Whether something requires grad, or grad mode is on, would make variants of one kernel.
    tensors = [t.detach() for t in tensors]
    coefficients = (coefficients[0].detach(), coefficients[1].detach())
    base = None if base is None else (base[0].detach(), base[1].detach())
    key = (kernel, x.shape[1:], x.dtype, x.device, base is None, torch.is_inference_mode_enabled(), *args)
    try:
        with torch.no_grad():
            if key in _compiled:
                return _kernels()[kernel](*tensors, coefficients, base, *args)
            log.info("compiling the rational function, %d groups of %d channels, %s", x.shape[1], x.shape[2], x.dtype)
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)
            # One network may hold many widths; the default limit of eight variants is meant for accidental ones.
            with torch._dynamo.config.patch(cache_size_limit=256):
                result = _kernels()[kernel](*tensors, coefficients, base, *args)
        _compiled.add(key)
        return result
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _broken = True
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"torch.compile does not work here ({type(error).__name__}: {reason[0] if reason else ''}); rational "
            "functions run uncompiled, several times slower. A C++ compiler (g++ or clang++) on the PATH mends this.",
            stacklevel=2,
        )
        return None


def forward(x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str) -> Tensor | None:
    """R(x) as a new tensor; None where this path cannot serve `x`."""
    result = _call(0, [x], coefficients, base, form)
    return result[0] if result is not None and result[1].max().item() <= math.LARGE else None


def backward(
    grad: Tensor, x: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str, need_coefficients: bool
) -> tuple[Tensor, Tensor] | None:
    """The gradient of x, and those of the coefficients (G, m+1+n) in float64; None where this path cannot serve `x`."""
    result = _call(1, [grad, x], coefficients, base, form, need_coefficients)
    if result is None or not result[1].max().item() <= math.LARGE:  # NaN hides the others' size
        return None
    grad_x, _, sums = result
    width = coefficients[0].shape[1] + coefficients[1].shape[1]
    if not sums:
        return grad_x, torch.zeros(x.shape[1], width, dtype=torch.float64, device=x.device)
    return grad_x, torch.stack([s.sum(0, dtype=torch.float64) for s in sums], dim=-1)
