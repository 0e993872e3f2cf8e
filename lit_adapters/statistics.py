"""What an adapted function does, as pure functions of sampled values.

A function is given by its values on a grid of D points, an observed density by D non-negative weights on that grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """How far functions moved from the one they started at; each field has the leading shape of `current`.

    Attributes:
        l2: sqrt(E (phi - phi0)^2), the expectation over the density.
        relative: l2 / sqrt(E phi0^2).
        sup: max |phi - phi0| over the grid.
        relative_sup: sup / max |phi0|.
    """

    l2: Tensor
    relative: Tensor
    sup: Tensor
    relative_sup: Tensor


def drift(current: Tensor, initial: Tensor, density: Tensor) -> Drift:
    """Distance of functions `current` (..., D) from `initial` (D,) under `density` (D,)."""
    weights = density / density.sum()
    difference = current - initial
    l2 = (difference.square() * weights).sum(-1).sqrt()
    sup = difference.abs().amax(-1)
    tiny = torch.finfo(initial.dtype).tiny
    norm = (initial.square() * weights).sum(-1).sqrt().clamp_min(tiny)
    return Drift(l2, l2 / norm, sup, sup / initial.abs().amax(-1).clamp_min(tiny))


def slope_bound(values: Tensor, grid: Tensor) -> Tensor:
    """max |phi'| by finite differences on the grid, (..., D) -> (...)."""
    return (values.diff(dim=-1) / grid.diff()).abs().amax(-1)
