"""Elementwise functions for a low-rank product, with their derivatives (LoRAN, arXiv 2509.21870).

    sinter    z + a z sin(w z)        sigmoid   1 / (1 + exp(-z))      relu      max(z, 0)
    sine      sin(w z)                tanh      tanh z                 silu      z sigmoid(z)
    cos       z + z cos(w z)          gaussian  z exp(-z^2) / 2        swish25   z sigmoid(25 z)
    identity  z

a is the amplitude and w the frequency. The released code writes swish25 as "swish(25x)"; we read that as Swish with the
slope 25 inside the sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Formula = Callable[[Tensor, float, "float | Tensor"], Tensor]  # a function of z, amplitude and frequency


@dataclass(frozen=True)
class WeightFunction:
    """f and its derivatives, elementwise functions of z in any shape.

    Attributes:
        value: f(z).
        derivative: f'(z); at a kink, the derivative from the left.
        by_frequency: df/dw(z); None if the frequency cannot be learned.
        flat_at_zero: Whether f'(0) = 0, so that B = 0 would never train.
        sinusoid: Returns c1, c2, c3 and phase for an amplitude if f(z) = c1 z + (c2 + c3 z) sin(w z + phase) and
            f(0) = 0; None for other functions.
    """

    value: Formula
    derivative: Formula
    by_frequency: Formula | None = None
    flat_at_zero: bool = False
    sinusoid: Callable[[float], tuple[float, float, float, float]] | None = None


def _swish(z: Tensor, slope: float) -> Tensor:
    return z * torch.sigmoid(slope * z)


def _swish_slope(z: Tensor, slope: float) -> Tensor:
    gate = torch.sigmoid(slope * z)
    return gate * (1 + slope * z * (1 - gate))


def _sinter_slope(z: Tensor, a: float, w: float | Tensor) -> Tensor:
    phase = w * z
    return 1 + a * (torch.sin(phase) + phase * torch.cos(phase))


def _cos_slope(z: Tensor, a: float, w: float | Tensor) -> Tensor:
    phase = w * z
    return 1 + torch.cos(phase) - phase * torch.sin(phase)


def _logistic_slope(z: Tensor, a: float, w: float | Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 - gate)


WEIGHT_FUNCTIONS: dict[str, WeightFunction] = {
    "sinter": WeightFunction(
        lambda z, a, w: z + a * z * torch.sin(w * z), _sinter_slope, sinusoid=lambda a: (1.0, 0.0, a, 0.0)
    ),
    "sine": WeightFunction(
        lambda z, a, w: torch.sin(w * z),
        lambda z, a, w: w * torch.cos(w * z),
        lambda z, a, w: z * torch.cos(w * z),
        sinusoid=lambda a: (0.0, 1.0, 0.0, 0.0),
    ),
    "cos": WeightFunction(
        lambda z, a, w: z + z * torch.cos(w * z), _cos_slope, sinusoid=lambda a: (1.0, 0.0, 1.0, math.pi / 2)
    ),
    "identity": WeightFunction(
        lambda z, a, w: z, lambda z, a, w: torch.ones_like(z), sinusoid=lambda a: (1.0, 0.0, 0.0, 0.0)
    ),
    "sigmoid": WeightFunction(lambda z, a, w: torch.sigmoid(z), _logistic_slope),
    "tanh": WeightFunction(lambda z, a, w: torch.tanh(z), lambda z, a, w: 1 - torch.tanh(z).square()),
    "relu": WeightFunction(lambda z, a, w: torch.relu(z), lambda z, a, w: (z > 0).to(z.dtype), flat_at_zero=True),
    "silu": WeightFunction(lambda z, a, w: _swish(z, 1.0), lambda z, a, w: _swish_slope(z, 1.0)),
    "swish25": WeightFunction(lambda z, a, w: _swish(z, 25.0), lambda z, a, w: _swish_slope(z, 25.0)),
    "gaussian": WeightFunction(
        lambda z, a, w: 0.5 * z * torch.exp(-z.square()),
        lambda z, a, w: (0.5 - z.square()) * torch.exp(-z.square()),
    ),
}


@dataclass(frozen=True)
class WeightUpdate:
    """s f as a function of z and of the frequency w.

    Attributes:
        function: The name of f.
        scaling: The factor s.
        amplitude: The constant a.
        centered: Whether f(z) - f(0) takes the place of f(z).
    """

    function: str
    scaling: float
    amplitude: float
    centered: bool

    @property
    def f(self) -> WeightFunction:
        """f without s and without centring."""
        return WEIGHT_FUNCTIONS[self.function]

    @property
    def learns_frequency(self) -> bool:
        """Whether w is trained."""
        return self.f.by_frequency is not None

    @property
    def sinusoid(self) -> tuple[float, float, float, float] | None:
        """c1, c2, c3 and phase if s f(z) = c1 z + (c2 + c3 z) sin(w z + phase), centred or not; None for other f."""
        if self.f.sinusoid is None:
            return None
        *factors, phase = self.f.sinusoid(self.amplitude)
        c1, c2, c3 = (self.scaling * c for c in factors)
        return c1, c2, c3, phase

    def value(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s f(z), or s (f(z) - f(0))."""
        y = self.f.value(z, self.amplitude, frequency)
        if self.centered:
            y = y - self.f.value(z.new_zeros(()), self.amplitude, frequency)
        return self.scaling * y

    def derivative(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s f'(z)."""
        return self.scaling * self.f.derivative(z, self.amplitude, frequency)

    def by_frequency(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s df/dw(z). Centring changes nothing: df/dw is 0 at z = 0 for every f that has it."""
        assert self.f.by_frequency is not None
        return self.scaling * self.f.by_frequency(z, self.amplitude, frequency)
