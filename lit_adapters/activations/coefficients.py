"""The start of trained rational coefficients, base + scale * update, as NoRA and AFA-LoRA hold them.

`base` (k,) is a frozen fit, `scale` (k,) says how far a unit of the update moves each coefficient, and `update` (G, k)
is trained. This file sets base and scale from a fit and from the inputs that the function is expected to see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adapters.activations.fitting import RationalFit

PARTS = ("numerator", "denominator")
Pair = tuple[Tensor, Tensor]  # one tensor for each part
_POINTS = 2001
_REACH = 5.0  # standard deviations


def normal_inputs(std: float) -> Pair:
    """Points x (N,) within five standard deviations of 0 and their `normal_density` (N,), float64 on the CPU."""
    reach = _REACH * std
    x = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64, device="cpu")
    return x, normal_density(x, std)


def normal_density(x: Tensor, std: float) -> Tensor:
    """The density of a normal distribution with mean 0 at x, up to a factor; any shape."""
    return torch.exp(-0.5 * (x / std) ** 2)


@torch.no_grad()
def set_base(base: Pair, fit: RationalFit) -> None:
    """Write the coefficients of `fit` to `base`, the tensors (m+1,) and (n,)."""
    for tensor, values in zip(base, (fit.numerator, fit.denominator), strict=True):
        tensor.copy_(torch.tensor(values, dtype=torch.float64, device="cpu"))


@torch.no_grad()
def set_scale(scale: Pair, effect: float, fit: RationalFit, x: Tensor, weights: Tensor) -> None:
    """Scale updates so that one unit of each coefficient changes the function by the same amount.

    Args:
        scale: The tensors to write to, (m+1,) and (n,).
        effect: The root mean square change of the function by one unit of one coefficient.
        fit: The function that is changed.
        x: Inputs of the function (N,).
        weights: Their weights (N,); the scale of the weights is irrelevant.
    """
    for tensor, unit in zip(scale, coefficient_effects(x, weights, fit), strict=True):
        tensor.copy_(effect / unit)


def coefficient_effects(x: Tensor, weights: Tensor, fit: RationalFit) -> Pair:
    """The root mean squares of dR/da_i = x^i / Q (m+1,) and of dR/db_j = x^j P / Q^2 (n,).

    Args:
        x: Inputs of the function (N,).
        weights: Their weights (N,); the scale of the weights is irrelevant.
        fit: R.
    """
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
