"""The weight of `merged_linear` and the gradient through it by merged.cpp, for functions f with a sinusoid.

Runs on the CPU in float32 without autograd; merged_linear.py uses PyTorch operations elsewhere.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lit_adapters.ops._native import DTYPES, function, in_memory, library, pointers, threads, usable

NAME = "merged"
_CHUNK = 1 << 14  # elements that a thread takes at a time; sums of chunks do not depend on the number of threads

# c1, c2, c3 and phase of s f(z) = c1 z + (c2 + c3 z) sin(w z + phase), w the frequency.
Sinusoid = tuple[float, float, float, float]


def can_run(z: Tensor, matrix: Tensor | None, merged: Tensor | None, gradient: Tensor | None = None) -> bool:
    """Whether the kernel can compute: eager, on the CPU, not differentiated, contiguous, and in a dtype it has."""
    if not usable(NAME) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    given = [t for t in (z, matrix, merged) if t is not None]
    plain = in_memory(*given, gradient) and all(t.is_contiguous() for t in given)
    return plain and z.dtype == torch.float32 and all(t.dtype in DTYPES for t in given)


def _suffix(z: Tensor, matrix: Tensor | None, merged: Tensor | None) -> str:
    """The dtypes in the kernel's name; a missing tensor counts as float32."""
    return "_".join(DTYPES[(z if t is None else t).dtype] for t in (matrix, merged))


def _constants(sinusoid: Sinusoid, frequency: float) -> ctypes.Array[ctypes.c_double]:
    c1, c2, c3, phase = sinusoid
    return (ctypes.c_double * 5)(c1, c2, c3, frequency, phase)


def merge(z: Tensor, matrix: Tensor | None, merged: Tensor, sinusoid: Sinusoid, frequency: float) -> bool:
    """Write W0 + s f(z) to `merged`.

    Args:
        z: The product B A (rows, in), float32.
        matrix: W0 (rows, in), float32 or bfloat16; None for zero.
        merged: Where the result goes (rows, in), float32 or bfloat16.
        sinusoid: The constants of s f.
        frequency: The frequency w.

    Returns:
        False if the kernel cannot be built; nothing is written then.
    """
    if (functions := library(NAME, "LoRAN")) is None:
        return False
    kernel = function(functions, f"merge_{_suffix(z, matrix, merged)}", pointers=4, sizes=2)
    kernel(*pointers(z, matrix, merged), _constants(sinusoid, frequency), z.numel(), _CHUNK, threads(z.numel()))
    return True


def backward(
    z: Tensor,
    gradient: Tensor,
    matrix: Tensor | None,
    merged: Tensor | None,
    sinusoid: Sinusoid,
    frequency: float,
    by_frequency: bool,
) -> float | None:
    """Turn the gradient of the weight into the gradient of z, in place.

    Args:
        z: The product B A (rows, in), float32.
        gradient: The gradient of the weight (rows, in), float32; overwritten with that of z.
        matrix: W0 (rows, in), float32 or bfloat16; None for zero.
        merged: W0 + s f(z) is written here if it is given.
        sinusoid: The constants of s f.
        frequency: The frequency w.
        by_frequency: Whether the gradient of w is wanted.

    Returns:
        The gradient of w, 0 unless it is wanted; None if the kernel cannot be built.
    """
    if (functions := library(NAME, "LoRAN")) is None:
        return None
    sums = torch.zeros(-(-z.numel() // _CHUNK), dtype=torch.float64, device="cpu") if by_frequency else None
    kernel = function(functions, f"backward_{_suffix(z, matrix, merged)}", pointers=6, sizes=2)
    given = pointers(z, gradient, matrix, merged, sums)
    kernel(*given, _constants(sinusoid, frequency), z.numel(), _CHUNK, threads(z.numel()))
    return 0.0 if sums is None else sums.sum().item()
