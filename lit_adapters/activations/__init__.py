"""Activation functions with coefficients, and their fitting to fixed activations."""

from __future__ import annotations

from lit_adapters.activations.affine import AffineActivation
from lit_adapters.activations.fitting import RationalFit, fit_rational
from lit_adapters.activations.presets import activation_name, fit_for, is_known_activation
from lit_adapters.activations.rational import RationalActivation

LEARNED_ACTIVATIONS = (AffineActivation, RationalActivation)  # what merging leaves where a function was learned

__all__ = [
    "LEARNED_ACTIVATIONS",
    "AffineActivation",
    "RationalActivation",
    "RationalFit",
    "activation_name",
    "fit_for",
    "fit_rational",
    "is_known_activation",
]
