"""Elementwise functions for a low-rank product, with their derivatives (LoRAN, arXiv 2509.21870).

    sinter    z + a z sin(w z)        sigmoid   1 / (1 + exp(-z))      relu      max(z, 0)
    sine      sin(w z), w learned     tanh      tanh z                 silu      z sigmoid(z)
    fixed_sine  sin(w z), w constant
    cos       z + z cos(w z)          gaussian  z exp(-z^2) / 2        swish25   z sigmoid(25 z)
    identity  z

a is the amplitude and w the frequency. The released code writes swish25 as "swish(25x)"; we read that as Swish with the
slope 25 inside the sigmoid.

A calibrated function acts at the size of its argument: f_1(w z) / w, with f_1 the function at frequency 1 and
w = 1 / rms(z). That is z + a z sin(w z) for sinter, z + z cos(w z) for cos, sin(w z) / w for sine, tanh(w z) / w for
tanh, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Formula = Callable[[Tensor, float, "float | Tensor"], Tensor]  # a function of z, amplitude and frequency

# Below, B A counts as 0. A calibrated frequency then is 1 / _LEAST_RMS: finite, and without effect, as f(0) / w is 0
# where f is centred and the slope at 0 does not depend on w.
_LEAST_RMS = 1e-20
# Size of B A at the start where f is flat at 0, as a share of a freshly initialised weight.
FLAT_START = 1e-3


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
        periodic: Whether f depends on w.
    """

    value: Formula
    derivative: Formula
    by_frequency: Formula | None = None
    flat_at_zero: bool = False
    sinusoid: Callable[[float], tuple[float, float, float, float]] | None = None
    periodic: bool = False


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
        lambda z, a, w: z + a * z * torch.sin(w * z),
        _sinter_slope,
        sinusoid=lambda a: (1.0, 0.0, a, 0.0),
        periodic=True,
    ),
    "sine": WeightFunction(
        lambda z, a, w: torch.sin(w * z),
        lambda z, a, w: w * torch.cos(w * z),
        lambda z, a, w: z * torch.cos(w * z),
        sinusoid=lambda a: (0.0, 1.0, 0.0, 0.0),
        periodic=True,
    ),
    "fixed_sine": WeightFunction(
        lambda z, a, w: torch.sin(w * z),
        lambda z, a, w: w * torch.cos(w * z),
        sinusoid=lambda a: (0.0, 1.0, 0.0, 0.0),
        periodic=True,
    ),
    "cos": WeightFunction(
        lambda z, a, w: z + z * torch.cos(w * z),
        _cos_slope,
        sinusoid=lambda a: (1.0, 0.0, 1.0, math.pi / 2),
        periodic=True,
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


def rms_of_product(b: Tensor, a: Tensor) -> Tensor:
    """The root mean square of the entries of B A, from r x r products alone; float64, without gradient.

    Args:
        b: B (out, r), any floating dtype.
        a: A (r, in), any floating dtype.
    """
    b, a = b.detach().double(), a.detach().double()
    squares = ((b.mT @ b) * (a @ a.mT)).sum()
    return (squares / (b.shape[0] * a.shape[1])).clamp_min(0).sqrt()


def calibrated_frequency(b: Tensor, a: Tensor) -> Tensor:
    """w = 1 / rms(B A), a constant for the gradient; float64."""
    return rms_of_product(b, a).clamp_min(_LEAST_RMS).reciprocal()


@dataclass(frozen=True)
class WeightUpdate:
    """s f as a function of z and of the frequency w.

    Attributes:
        function: The name of f.
        scaling: The factor s.
        amplitude: The constant a.
        centered: Whether to use f(z) - f(0) instead of f(z).
        calibrated: Whether to use f_1(w z) / w instead of f(z), with f_1 the function at frequency 1.
    """

    function: str
    scaling: float
    amplitude: float
    centered: bool
    calibrated: bool = False

    @property
    def f(self) -> WeightFunction:
        """f without s, centring and calibration."""
        return WEIGHT_FUNCTIONS[self.function]

    @property
    def learns_frequency(self) -> bool:
        """Whether w is trained."""
        return self.f.by_frequency is not None and not self.calibrated

    @property
    def is_linear(self) -> bool:
        """Whether f is linear by choice: the identity, or Sinter with amplitude 0."""
        return self.function == "identity" or (self.function == "sinter" and self.amplitude == 0)

    def sinusoid(self, frequency: float) -> tuple[float, float, float, float] | None:
        """c1, c2, c3 and phase if s f(z) = c1 z + (c2 + c3 z) sin(w z + phase), centred or not; None for other f."""
        if self.f.sinusoid is None:
            return None
        c1, c2, c3, phase = self.f.sinusoid(self.amplitude)
        if self.calibrated:
            c2 = c2 / frequency
        return self.scaling * c1, self.scaling * c2, self.scaling * c3, phase

    def value(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s f(z), or s (f(z) - f(0))."""
        w: float | Tensor = frequency
        if self.calibrated:
            z, w = frequency * z, 1.0
        y = self.f.value(z, self.amplitude, w)
        if self.centered:
            y = y - self.f.value(z.new_zeros(()), self.amplitude, w)
        if self.calibrated:
            y = y / frequency
        return self.scaling * y

    def derivative(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s f'(z)."""
        if self.calibrated:
            return self.scaling * self.f.derivative(frequency * z, self.amplitude, 1.0)
        return self.scaling * self.f.derivative(z, self.amplitude, frequency)

    def by_frequency(self, z: Tensor, frequency: Tensor) -> Tensor:
        """s df/dw(z). Centring changes nothing: df/dw is 0 at z = 0 for every f that has it."""
        assert self.f.by_frequency is not None
        return self.scaling * self.f.by_frequency(z, self.amplitude, frequency)
