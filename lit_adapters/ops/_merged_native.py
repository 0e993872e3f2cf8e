"""The weight of `merged_linear` and the gradient through it by merged.cpp, for the f that it knows (see _native.py)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lit_adapters.ops._native import DTYPES, function, in_memory, library, pointers, threads, usable

NAME = "merged"
_CHUNK = 1 << 14  # elements a thread takes at a time; sums over chunks do not depend on the number of threads

Wave = tuple[float, float, float, float]  # c1, c2, c3 and phase of s f(z) = c1 z + (c2 + c3 z) sin(w z + phase)


def serves(z: Tensor, matrix: Tensor | None, merged: Tensor | None, gradient: Tensor | None = None) -> bool:
    """Whether this path can compute; not on a GPU, while traced or differentiated, or in another dtype or order."""
    if not usable(NAME) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    given = [t for t in (z, matrix, merged) if t is not None]
    plain = in_memory(*given, gradient) and all(t.is_contiguous() for t in given)
    return plain and z.dtype == torch.float32 and all(t.dtype in DTYPES for t in given)


def _names(z: Tensor, matrix: Tensor | None, merged: Tensor | None) -> str:
    return "_".join(DTYPES[(z if t is None else t).dtype] for t in (matrix, merged))


def _constants(wave: Wave, frequency: float) -> ctypes.Array[ctypes.c_double]:
    c1, c2, c3, phase = wave
    return (ctypes.c_double * 5)(c1, c2, c3, frequency, phase)


def merge(z: Tensor, matrix: Tensor | None, merged: Tensor, wave: Wave, frequency: float) -> bool:
    """Write W0 + s f(z) to `merged`; False where the kernel cannot be built. All (rows, in)."""
    if (functions := library(NAME, "LoRAN")) is None:
        return False
    kernel = function(functions, f"merge_{_names(z, matrix, merged)}", pointers=4, sizes=2)
    kernel(*pointers(z, matrix, merged), _constants(wave, frequency), z.numel(), _CHUNK, threads(z.numel()))
    return True


def backward(
    z: Tensor,
    gradient: Tensor,
    matrix: Tensor | None,
    merged: Tensor | None,
    wave: Wave,
    frequency: float,
    by_frequency: bool,
) -> float | None:
    """Turn `gradient`, of the weight, into that of z, in place; write W0 + s f(z) to `merged` where it is given.

    Returns the sum of gradient s df/dw, 0 unless asked for, or None where the kernel cannot be built.
    """
    if (functions := library(NAME, "LoRAN")) is None:
        return None
    sums = torch.zeros(-(-z.numel() // _CHUNK), dtype=torch.float64, device="cpu") if by_frequency else None
    kernel = function(functions, f"backward_{_names(z, matrix, merged)}", pointers=6, sizes=2)
    given = pointers(z, gradient, matrix, merged, sums)
    kernel(*given, _constants(wave, frequency), z.numel(), _CHUNK, threads(z.numel()))
    return 0.0 if sums is None else sums.sum().item()
