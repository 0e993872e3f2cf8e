"""Rational fits: accuracy against the functions themselves, structure, weighting, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_adapters.activations.fitting import RationalFit, fit_rational
from lit_adapters.errors import AdapterError

FORMS = ("abs-of-sum", "sum-of-abs")


def grid(low: float, high: float, points: int = 8001) -> torch.Tensor:
    return torch.linspace(low, high, points, dtype=torch.float64)


def rms(fit: RationalFit, function, interval, density=None) -> float:
    x = grid(*interval)
    weight = torch.ones_like(x) if density is None else density(x)
    return ((fit(x) - function(x)).square() * weight).sum().div(weight.sum()).sqrt().item()


def normal(mean: float, deviation: float):
    return lambda x: torch.exp(-(((x - mean) / deviation) ** 2) / 2)


# ---- accuracy

REFERENCES = [
    (F.gelu, 6.0, (-3.7316460e-3, 0.5, 0.42029126, 0.12614483, 0.015942420, 7.0832076e-4), (0.25230130, 0.0014168610)),
    (F.gelu, 10.0, (-4.1406e-4, 0.5, 0.40956945, 0.11765572, 0.014069512, 5.9465453e-4), (0.23531164, 0.0011893109)),
    (F.silu, 6.0, (6.8652e-5, 0.5, 0.24977754, 0.052166196, 0.0053601403, 2.2521046e-4), (0.10433238, 4.5042075e-4)),
    (F.silu, 10.0, (1.4611e-3, 0.5, 0.24707733, 0.048722938, 0.0044298762, 1.534e-4), (0.097445936, 3.0680320e-4)),
]


@pytest.mark.parametrize(("function", "bound", "a", "b"), REFERENCES, ids=lambda value: str(value)[:6])
def test_no_worse_than_independent_least_squares_fits(function, bound, a, b):
    reference = RationalFit(a, (0.0, b[0], 0.0, b[1]), "abs-of-sum", (-bound, bound), math.nan)
    x = grid(-bound, bound)
    reference_error = (reference(x) - function(x)).abs().max().item()
    fit = fit_rational(function, (-bound, bound))
    assert fit.max_error <= reference_error * 1.0005
    assert rms(fit, function, (-bound, bound)) <= 1.0005 * rms(reference, function, (-bound, bound))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("degrees", "bound"), [((5, 4), 0.045), ((3, 2), 0.15), ((6, 5), 0.025), ((4, 4), 0.065), ((7, 6), 0.015)], ids=str
)
@pytest.mark.parametrize("interval", [(-10.0, 10.0), (-20.0, 5.0)], ids=str)
def test_other_degrees_and_intervals(form, degrees, bound, interval):
    for function in (F.gelu, F.elu, torch.tanh):
        fit = fit_rational(function, interval, degrees, form)
        assert fit.degrees == degrees
        assert (fit.form, fit.interval) == (form, interval)
        assert fit.max_error <= bound * function(grid(*interval)).abs().max()


def test_a_higher_degree_is_closer():
    errors = [rms(fit_rational(F.silu, degrees=d), F.silu, (-6, 6)) for d in ((3, 2), (5, 4), (7, 6))]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_rational_functions_are_recovered():
    softsign = fit_rational(F.softsign, (-3.0, 12.0), denominator="sum-of-abs")
    assert softsign.max_error < 1e-9
    runge = fit_rational(lambda x: (2 + x) / (1 + 3 * x**2), degrees=(3, 2))
    assert runge.max_error < 1e-7
    assert runge.denominator == pytest.approx((0.0, 3.0), abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_polynomials_keep_a_denominator_of_one(form):
    assert fit_rational(nn.Identity(), denominator=form).numerator == (0, 1, 0, 0, 0, 0)
    assert fit_rational(nn.Identity(), denominator=form).denominator == (0, 0, 0, 0)
    assert fit_rational(torch.zeros_like, denominator=form).numerator == (0, 0, 0, 0, 0, 0)
    cubic = fit_rational(lambda x: 2 - x**3, (-3.0, 7.0), denominator=form)
    assert cubic.numerator == pytest.approx((2, 0, 0, -1, 0, 0), abs=1e-7)
    assert cubic.denominator == (0, 0, 0, 0)


# ---- structure


@pytest.mark.parametrize(
    "function", [F.gelu, F.silu, F.relu, F.leaky_relu, F.hardswish, torch.tanh, torch.sigmoid, F.hardsigmoid]
)
@pytest.mark.parametrize("density", [None, normal(0.0, 2.0)(grid(-6, 6, 101))], ids=["uniform", "normal"])
def test_symmetric_targets_have_no_odd_denominator_terms(function, density):
    fits = [fit_rational(function, denominator=form, density=density) for form in FORMS]
    assert fits[0].denominator[::2] == (0.0, 0.0)
    assert min(fits[0].denominator) >= 0
    assert fits[0].numerator == fits[1].numerator
    assert fits[0].denominator == fits[1].denominator
    if function in (F.gelu, F.silu, F.relu, F.hardswish):
        assert fits[0].numerator[1] == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_a_kink_of_the_target_is_used(form):
    fit = fit_rational(F.elu, denominator=form)
    assert fit.denominator[0] != 0
    assert fit.max_error < 3e-3  # with b1 = b3 = 0 it is 1.7e-2


@pytest.mark.parametrize(("function", "interval"), [(torch.tanh, (-20.0, 5.0)), (F.selu, (-6.0, 6.0))])
def test_no_spike_outside_the_interval(function, interval):
    """The best fits on these intervals have Q = 1 somewhere outside, where |R| exceeds 1,400 and 500."""
    fit = fit_rational(function, interval)
    x = grid(2 * interval[0], 4 * interval[1])
    assert (fit(x) - function(x)).abs().max() < 6


def test_no_spike_between_the_points_of_the_grid():
    fit = fit_rational(lambda x: (x > 1).double(), (-1.15, 620.0), (7, 3))
    assert fit.max_error < 1.5


# ---- density


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("function", "interval", "mean", "deviation", "gain"),
    [
        (F.silu, (-8.0, 8.0), -0.5, 1.0, 4.0),
        (F.gelu, (-30.0, 10.0), -2.0, 2.0, 3.0),
        (F.gelu, (-10.0, 10.0), 0.0, 1.0, 1.3),
    ],
)
def test_density_lowers_the_weighted_error(form, function, interval, mean, deviation, gain):
    density = normal(mean, deviation)
    weighted = fit_rational(function, interval, denominator=form, density=density(grid(*interval, 256)))
    uniform = fit_rational(function, interval, denominator=form)
    assert gain * rms(weighted, function, interval, density) < rms(uniform, function, interval, density)
    # The floor holds R near the function where the density has vanished.
    assert weighted.max_error < 0.03 * (interval[1] - interval[0])


def test_density_scale_and_resolution_are_irrelevant():
    coarse, fine = (
        fit_rational(F.silu, density=c * normal(1, 2)(grid(-6, 6, k))) for c, k in ((1e-3, 201), (40, 4001))
    )
    x = grid(-6, 6)
    torch.testing.assert_close(coarse(x), fine(x), rtol=0, atol=1e-5)
    assert fit_rational(F.silu, density=torch.ones(7)) == fit_rational(F.silu)


# ---- evaluation and surroundings


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_evaluation_keeps_the_shape_and_computes_in_float64(shape):
    fit = fit_rational(F.gelu)
    x = torch.randn(shape)
    assert fit(x).shape == shape
    assert fit(x).dtype == torch.float64
    torch.testing.assert_close(fit(x), F.gelu(x.double()), rtol=0, atol=fit.max_error)


@pytest.mark.parametrize("bound", [6.0, 7.3, 20.0])  # powers of 7.3 are not exact in lower precision
def test_fits_do_not_depend_on_surroundings(bound):
    interval = (-bound, bound)
    expected, threads = fit_rational(F.mish, interval=interval), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            torch.set_default_dtype(torch.bfloat16)
            assert fit_rational(F.mish, interval=interval) == expected
            assert torch.get_num_threads() == 3
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("function", "keywords", "message"),
    [
        (torch.log, {}, "nan at x = -6"),
        (torch.reciprocal, {}, "inf at x = 0"),
        (lambda x: x.softmax(0), {}, "not elementwise"),
        (lambda x: x[:2], {}, "not elementwise"),
        (F.gelu, {"interval": (3.0, -3.0)}, "interval=(3.0, -3.0)"),
        (F.gelu, {"interval": (0.0, math.inf)}, "interval=(0.0, inf)"),
        (F.gelu, {"interval": (math.nan, 1.0)}, "interval=(nan, 1.0)"),
        (F.gelu, {"interval": (-1.0, 0.0, 1.0)}, "interval=(-1.0, 0.0, 1.0)"),
        (F.gelu, {"interval": (-1e80, 1e80)}, "beyond float64"),
        (F.gelu, {"degrees": (5, 0)}, "degrees=(5, 0)"),
        (F.gelu, {"degrees": (5,)}, "degrees=(5,)"),
        (F.gelu, {"denominator": "pade"}, "denominator='pade'"),
        (F.gelu, {"density": torch.zeros(8)}, "density of shape (8,)"),
        (F.gelu, {"density": torch.tensor([1.0, -1.0])}, "density of shape (2,)"),
        (F.gelu, {"density": torch.tensor([1.0, math.nan])}, "density of shape (2,)"),
        (F.gelu, {"density": torch.ones(2, 2)}, "density of shape (2, 2)"),
    ],
)
def test_refusals_name_the_value(function, keywords, message):
    with pytest.raises(AdapterError) as refusal:
        fit_rational(function, **keywords)
    assert message in str(refusal.value)
