"""Least-squares fits of rational functions to activation functions, on the interval a network's inputs live on.

    R(x) = (a_0 + a_1 x + ... + a_m x^m) / Q(x),   Q as in `lit_adapters.ops.rational`; Q >= 1, so that R has no pole

The weighted square error on a uniform grid is minimised in float64 by Levenberg-Marquardt from several starts.
Coefficients belong to the form of Q that they were fitted for: in the other form they are another function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_adapters.activations._least_squares import Problem, Solution
from lit_adapters.errors import AdapterError
from lit_adapters.ops.rational import Denominator, rational_reference

_POINTS = 801
_REFINEMENT = 25  # max_error is measured on a grid that is finer by this factor
_DENSITY_FLOOR = 0.01  # share of a uniform density that is mixed into a given one
# A denominator with odd terms has a kink at 0. It is used only if it lowers the root mean square error to this share.
_MAX_KINKED_ERROR_RATIO = 0.95
# Such a fit is checked for spikes outside the interval, up to this multiple of the interval's largest |x|.
_REACH = 10.0


@dataclass(frozen=True)
class RationalFit:
    """A rational function fitted to an activation.

    Attributes:
        numerator: The coefficients a_0..a_m.
        denominator: The coefficients b_1..b_n.
        form: The form of Q that the coefficients were fitted for and must be evaluated with.
        interval: The interval of the fit.
        max_error: Max |R - f| over 20,001 points of the interval.
    """

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    form: Denominator
    interval: tuple[float, float]
    max_error: float

    @property
    def degrees(self) -> tuple[int, int]:
        """The degrees (m, n)."""
        return len(self.numerator) - 1, len(self.denominator)

    def __call__(self, x: Tensor) -> Tensor:
        """R(x) in float64, for x of any shape."""
        a, b = (torch.tensor([c], dtype=torch.float64, device=x.device) for c in (self.numerator, self.denominator))
        return rational_reference(x.reshape(-1).double(), a, b, self.form).reshape(x.shape)


def fit_rational(
    function: Callable[[Tensor], Tensor],
    interval: tuple[float, float] = (-6.0, 6.0),
    degrees: tuple[int, int] = (5, 4),
    denominator: Denominator = "abs-of-sum",
    density: Tensor | None = None,
) -> RationalFit:
    """Fit R to `function` on `interval` by weighted least squares.

    If the interval and the density are symmetric and the function is linear plus even (GELU, SiLU, ReLU) or constant
    plus odd (sigmoid, tanh), the odd b are exactly 0: R has no kink at 0, and both forms are the same function. In
    other cases odd b are used if they lower the root mean square error by more than 5%.

    Args:
        function: An elementwise function, called with a float64 tensor on the CPU.
        interval: (low, high).
        degrees: (m, n), both at least 1.
        denominator: The form of Q.
        density: Non-negative weights (K >= 2,) on a uniform grid from low to high, ends included, interpolated
            linearly; their scale is irrelevant. 1% of a uniform density is mixed in, so that R stays near the function
            where nothing was observed.

    Raises:
        AdapterError: The interval, the degrees, the form or the density is malformed, or the function is not
            elementwise or not finite on the interval.
    """
    low, high = _checked_interval(interval)
    if len(degrees) != 2 or min(degrees) < 1:
        raise AdapterError(f"degrees={tuple(degrees)}: numerator and denominator need degree 1 or more, as in (5, 4)")
    m, n = degrees
    if denominator not in ("abs-of-sum", "sum-of-abs"):
        raise AdapterError(f"denominator={denominator!r} is unknown; choose 'abs-of-sum' or 'sum-of-abs'")

    # In z = x / s every power lies in [-1, 1], and so do the values divided by their largest.
    s = max(-low, high)
    with _plain_cpu():
        x = _grid(low, high, _POINTS)
        y = _values(function, x)
        dense = _grid(low, high, _REFINEMENT * (_POINTS - 1) + 1)
        dense_y = _values(function, dense)
        top = y.abs().max().item() or 1.0
        for solution in _solutions(x / s, y / top, _weights(density), (m, n), denominator):
            powers = s ** torch.arange(max(m, n) + 1, dtype=torch.float64)
            numerator = tuple((solution.a * top / powers[: m + 1]).tolist())
            coefficients = tuple((solution.b / powers[1 : n + 1]).tolist())
            fit = RationalFit(numerator, coefficients, denominator, (low, high), math.nan)
            errors = (fit(dense) - dense_y).abs()
            fit = replace(fit, max_error=errors.max().item())
            if fit.max_error <= 3 * errors[::_REFINEMENT].max() + 1e-9 * top:  # no spike between the grid's points
                break
    if not math.isfinite(fit.max_error):
        raise AdapterError(f"interval={(low, high)} is beyond float64 for degrees={(m, n)}; choose a smaller one")
    return fit


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    ends = [float(end) for end in interval]
    if len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
        raise AdapterError(f"interval={tuple(interval)} is not a pair of finite numbers low < high, as in (-6.0, 6.0)")
    return ends[0], ends[1]


def _grid(low: float, high: float, points: int) -> Tensor:
    """A uniform grid, both ends included, and exactly symmetric if the interval is."""
    right = torch.arange(points, dtype=torch.float64)
    return (high * right + low * right.flip(0)) / (points - 1)


def _values(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        y = function(x.clone())  # cloned, because activations may work in place
        alone = function(x[:1].clone())
    if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(y[:1], alone, equal_nan=True):
        raise AdapterError(f"{function!r} is not elementwise, so that no function of one variable can replace it")
    bad = ~y.isfinite()
    if bad.any():
        raise AdapterError(f"{function!r} is {y[bad][0].item()} at x = {x[bad][0].item():g}; choose another interval")
    return y.double()


def _weights(density: Tensor | None) -> Tensor:
    """The weights of the points of the fitting grid; they sum to 1."""
    if density is None:
        return torch.full((_POINTS,), 1 / _POINTS, dtype=torch.float64)
    given = density.detach().to("cpu", torch.float64)
    if given.dim() != 1 or len(given) < 2 or not given.isfinite().all() or (given < 0).any() or given.sum() == 0:
        raise AdapterError(
            f"density of shape {tuple(density.shape)} must be one row of two or more finite, non-negative weights, "
            "not all 0, on a uniform grid over the interval"
        )
    weight = torch.nn.functional.interpolate(given[None, None], _POINTS, mode="linear", align_corners=True)[0, 0]
    weight = weight / weight.mean()
    return ((1 - _DENSITY_FLOOR) * weight + _DENSITY_FLOOR) / _POINTS


@contextmanager
def _plain_cpu() -> Iterator[None]:
    """Use the CPU, whatever the default device is, and one thread, as several are slower on products this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_num_threads(threads)


def _solutions(z: Tensor, y: Tensor, weight: Tensor, degrees: tuple[int, int], form: Denominator) -> list[Solution]:
    """Fits in order of preference, the last one without odd b; z and y lie within [-1, 1]."""
    m, n = degrees
    base = z if form == "abs-of-sum" else z.abs()
    problem = Problem(y, weight.sqrt(), z ** torch.arange(m + 1)[:, None], base ** torch.arange(1, n + 1)[:, None])
    a = problem.best_numerator(torch.zeros(n, dtype=z.dtype))
    if (
        a @ problem.powers - y
    ).abs().max() < 1e-10:  # a polynomial: Q = 1, and rounding makes coefficients such as 0 and 1 exact
        return [Solution(0.0, a.round(decimals=11) + 0.0, torch.zeros(n, dtype=z.dtype))]

    first = 2 if n > 1 else 1
    smooth = torch.arange(1, n + 1) % 2 == first % 2
    best = problem.solve(_start(0.2, n, first), smooth, bounded=True)
    if n == 1 or _is_structured(z, y, weight):
        return [best]
    # For some twenty activations, more starts of these and other kinds found nothing better.
    starts = [best.b] if form == "sum-of-abs" else [best.b, _start(0.8, n, 2), _start(0.2, n, 1)]
    kinked = [problem.solve(b, torch.ones_like(smooth), bounded=form == "sum-of-abs") for b in starts]
    kinked = [
        s for s in kinked if s.loss < _MAX_KINKED_ERROR_RATIO**2 * best.loss and not _vanishes_outside(s.b, z, form)
    ]
    return [*sorted(kinked, key=lambda s: s.loss), best]


def _start(width: float, n: int, first: int) -> Tensor:
    """b_j = width^-j for j = first, first + 2, ... (n,). The sum changes sign at 0 with first = 1, not with 2."""
    b = torch.zeros(n, dtype=torch.float64)
    b[first - 1 :: 2] = width ** -torch.arange(first, n + 1, 2, dtype=torch.float64)
    return b


def _vanishes_outside(b: Tensor, z: Tensor, form: Denominator) -> bool:
    """Whether b_1 z + ... + b_n z^n has a zero outside the interval, where Q = 1 would make a spike of R."""
    if form == "sum-of-abs":
        return False
    wide = _grid(-_REACH, _REACH, _POINTS)
    quotient = b @ wide ** torch.arange(len(b))[:, None]
    return any(bool(quotient[side].gt(0).any() and quotient[side].lt(0).any()) for side in (wide < z[0], wide > z[-1]))


def _is_structured(z: Tensor, y: Tensor, weight: Tensor) -> bool:
    """Whether the target is linear plus even or constant plus odd, on a symmetric grid with symmetric weights."""
    if (z + z.flip(0)).abs().max() > 1e-12 or not torch.allclose(weight, weight.flip(0)):
        return False
    odd, even = (y - y.flip(0)) / 2, (y + y.flip(0)) / 2
    return bool((odd - odd[-1] * z).abs().max() < 1e-9 or (even - even[-1]).abs().max() < 1e-9)
