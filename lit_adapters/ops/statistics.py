"""What adapters have learned, computed from sampled values of functions and from factors of matrices.

A function is given by its values on a grid of D points, the observed density of its inputs by D non-negative weights on
that grid. A low-rank update B A is analysed through its factors (QR and an SVD of size r); the matrix itself is never
formed. Results keep the dtype of the inputs where nothing else is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """How far functions phi have moved from the function phi0 that they started from.

    Attributes:
        l2: sqrt(E (phi - phi0)^2) for each function, with the expectation over the density (...,).
        relative: L2 / sqrt(E phi0^2) (...,).
        sup: Max |phi - phi0| over the grid (...,).
    """

    l2: Tensor
    relative: Tensor
    sup: Tensor


def drift(current: Tensor, initial: Tensor, density: Tensor) -> Drift:
    """The distance of the functions `current` (..., D) from `initial` (D,) under `density` (D,)."""
    weights = density / density.sum()
    difference = current - initial
    l2 = (difference.square() * weights).sum(-1).sqrt()
    sup = difference.abs().amax(-1)
    tiny = torch.finfo(initial.dtype).tiny
    norm = (initial.square() * weights).sum(-1).sqrt().clamp_min(tiny)
    return Drift(l2, l2 / norm, sup)


def slope_bound(values: Tensor, grid: Tensor) -> Tensor:
    """max |phi'| (...,) by finite differences, for functions `values` (..., D) on `grid` (D,)."""
    return (values.diff(dim=-1) / grid.diff()).abs().amax(-1)


def stable_rank(singular_values: Tensor) -> float:
    """sum s_i^2 / max s_i^2, between 1 and the rank; 0 for a zero matrix."""
    energy = singular_values.double().square()
    return (energy.sum() / energy.max()).item() if energy.any() else 0.0


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of p_i = s_i^2 / sum s^2, between 1 and the rank; 0 for a zero matrix."""
    energy = singular_values.double().square()
    if not energy.any():
        return 0.0
    return torch.special.entr(energy / energy.sum()).sum().exp().item()


def components(singular_values: Tensor, share: float) -> int:
    """How many leading singular values hold `share` of the sum of all squares; 0 for a zero matrix."""
    energy = singular_values.double().square().sort(descending=True).values
    if not energy.any():
        return 0
    return min(len(energy), int((energy.cumsum(0) < share * energy.sum()).sum()) + 1)


def product_spectrum(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors (out, r) and singular values (r,) of B A, in float64.

    B = Q R and A^T = P S give B A = Q (R S^T) P^T, so that an SVD of the r x r matrix in the middle is enough.

    Args:
        b: B (out, r), any floating dtype.
        a: A (r, in), any floating dtype.
    """
    q, r = torch.linalg.qr(b.double())
    s = torch.linalg.qr(a.double().T, mode="r").R
    u, values, _ = torch.linalg.svd(r @ s.T, full_matrices=False)
    return q @ u, values


def leading_subspace(matrix: Tensor, k: int, iterations: int = 4) -> Tensor:
    """An orthonormal basis (out, k), float32, of the span of the k leading left singular vectors of `matrix` (out, in).

    Subspace iteration with oversampling (Halko et al., arXiv 0909.4061, algorithm 4.4). It starts from a generator of
    its own, so that no global random state is read. Directions whose singular values hardly differ are separated only
    roughly.
    """
    matrix = matrix.detach().float()
    width = min(k + 8, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32, device="cpu")
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u = torch.linalg.svd(basis.T @ matrix, full_matrices=False).U
    return basis @ u[:, :k]


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """The angles between the spans of two orthonormal bases (n, k) and (n, l): (min(k, l),) in radians, ascending."""
    cosines = torch.linalg.svdvals(first.double().T @ second.double())
    return cosines.clamp(max=1.0).acos()


def overlap(first: Tensor, second: Tensor) -> float:
    """The mean cos^2 of the principal angles between two subspaces.

    It is 1 if one contains the other, 0 if they are orthogonal, and l / n on average for random ones (k <= l).

    Args:
        first: An orthonormal basis (n, k).
        second: An orthonormal basis (n, l).
    """
    shared = (first.double().T @ second.double()).square().sum()
    return (shared / min(first.shape[1], second.shape[1])).item()


def cosine(first: Tensor, second: Tensor) -> float:
    """<x, y> / (|x| |y|) for two tensors of one shape; 0 if one is zero."""
    x, y = first.double().flatten(), second.double().flatten()
    norm = x.norm() * y.norm()
    return (x @ y / norm).item() if norm > 0 else 0.0


@dataclass(frozen=True)
class FunctionalSubspace:
    """The subspace that the changes of many functions span.

    Attributes:
        singular_values: The singular values of `stack`, descending; the sum of their squares is the sum of the squared
            drifts in L2(data).
        directions: The leading right singular vectors (k, D), orthonormal.
        grid: The points (D,) that the functions are given on.
        stack: The changes (N, D), each weighted by the root of its own density.
    """

    singular_values: Tensor
    directions: Tensor
    grid: Tensor
    stack: Tensor


def functional_subspace(changes: Tensor, densities: Tensor, grid: Tensor, k: int = 4) -> FunctionalSubspace:
    """The principal components of functions, in float64; not centred, as zero is where all functions started.

    Args:
        changes: Phi - phi0 for N functions on a common grid (N, D).
        densities: The density of the inputs of each function on that grid (N, D); each row is normalised to sum 1.
        grid: The points (D,).
        k: How many directions to keep.
    """
    weights = densities.double() / densities.double().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    stack = changes.double() * weights.sqrt()
    _, values, directions = torch.linalg.svd(stack, full_matrices=False)
    return FunctionalSubspace(values, directions[:k], grid, stack)


def regular_sample(values: Tensor, count: int) -> Tensor:
    """About `count` of the values in one row, a fixed distance apart, so that no random state is read.

    The distance has no factor in common with the number of values, so that all channels and tokens are visited alike.
    """
    flat = values.detach().flatten()
    step = max(1, flat.numel() // count)
    while math.gcd(step, flat.numel()) > 1:
        step += 1
    return flat[::step]


def histogram(values: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Counts (bins + 2,) of the values below `low`, in `bins` equal parts of [low, high], and above `high`.

    NaN is not counted.
    """
    values = values.detach().float()
    places = ((values[~values.isnan()] - low) * (bins / (high - low))).floor().clamp(-1, bins)
    return torch.bincount((places + 1).long().flatten(), minlength=bins + 2)
