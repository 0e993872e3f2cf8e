"""How far one unit of each rational coefficient moves the function, on given inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adapters.activations.fitting import RationalFit


def coefficient_effects(x: Tensor, weights: Tensor, fit: RationalFit) -> tuple[Tensor, Tensor]:
    """rms over inputs x (N,), with `weights` (N,), of dR/da_i = x^i / Q (m+1,) and dR/db_j = x^j P / Q^2 (n,)."""
    a, b = fit.numerator, fit.denominator
    weights = weights / weights.sum()
    p = torch.stack([c * x**i for i, c in enumerate(a)]).sum(0)
    terms = torch.stack([c * x ** (j + 1) for j, c in enumerate(b)])
    q = 1 + (terms.sum(0).abs() if fit.form == "abs-of-sum" else terms.abs().sum(0))

    def rms(values: Tensor) -> Tensor:
        return (weights * values.square()).sum().sqrt().clamp_min(1e-12)

    numerator = torch.stack([rms(x**i / q) for i in range(len(a))])
    denominator = torch.stack([rms(x ** (j + 1) * p / q**2) for j in range(len(b))])
    return numerator, denominator
