"""The C++ kernel of rational functions: the edges of its vectors and chunks, threads, and what it cannot compute."""

import pytest
import torch

from lit_adapters.ops import _rational_native as native
from lit_adapters.ops import rational, rational_reference
from tests.ops.test_rational import FORMS, coefficients, normwise, run, yardstick


def calls(monkeypatch):
    """Names of the kernels that ran."""
    ran, original = [], native._library
    monkeypatch.setattr(native, "_library", lambda *a: (ran.append(1), original(*a))[1])
    return ran


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [8, 11, 16, 24, 37, 40, 100])
@pytest.mark.parametrize("rows", [1, 7, 8, 300])
def test_rows_of_any_length_in_one_or_several_chunks(length, rows, form, monkeypatch):
    monkeypatch.setattr(native, "_CHUNK", 1 << 10)
    ran = calls(monkeypatch)
    a, b = coefficients(3)
    x, grad = torch.randn(rows, 3 * length) * 4, torch.randn(rows, 3 * length)
    got, expected = run(rational, x, a, b, grad, form=form), yardstick(x, a, b, grad, form=form)
    assert len(ran) == 2
    for value, reference, tolerance in zip(got, expected, (1e-6, 1e-6, 5e-6, 5e-6), strict=True):
        assert normwise(value, reference) <= tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 16, 37])
@pytest.mark.parametrize("rows", [1, 300])
def test_one_function_for_each_channel(rows, channels, form, monkeypatch):
    monkeypatch.setattr(native, "_CHUNK", 1 << 10)
    ran = calls(monkeypatch)
    a, b = coefficients(channels)
    x, grad = torch.randn(rows, channels) * 4, torch.randn(rows, channels)
    got, expected = run(rational, x, a, b, grad, form=form), yardstick(x, a, b, grad, form=form)
    assert len(ran) == 2
    for value, reference, tolerance in zip(got, expected, (1e-6, 1e-6, 5e-6, 5e-6), strict=True):
        assert normwise(value, reference) <= tolerance


@pytest.mark.parametrize("groups", [1, 8, 192])
def test_the_result_does_not_depend_on_the_number_of_threads(groups):
    a, b = coefficients(groups)
    x, grad = torch.randn(700, 192), torch.randn(700, 192)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(rational, x, a, b, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(s, t) for other in results[1:] for s, t in zip(results[0], other, strict=True))


@pytest.mark.parametrize("groups", [2, 4, 48])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_rounded_once(form, groups):
    a, b = coefficients(groups)
    x, grad = (torch.randn(50, 48) * 4).bfloat16(), torch.randn(50, 48).bfloat16()
    got = run(rational, x, a, b, grad, form=form)
    y, dx, *sums = yardstick(x, a, b, grad, form=form)
    assert (got[0].double() - y).abs().le(2**-8 * y.abs() + 1e-6).all()
    assert (got[1].double() - dx).abs().le(2**-8 * dx.abs() + 1e-6).all()
    for value, reference in zip(got[2:], sums, strict=True):
        assert normwise(value, reference) <= 5e-6


@pytest.mark.parametrize("groups", [2, 32])
def test_a_number_too_large_for_float32_powers_and_a_nan_beside_others(groups):
    a, b = coefficients(groups)
    x, grad = torch.randn(5, 32), torch.randn(5, 32)
    x[0, 3], x[2, 31], x[4, 0] = 3e8, -1e30, 2e4
    got, expected = run(rational, x, a, b, grad), yardstick(x, a, b, grad)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-6, atol=1e-6)
    x[1, 1] = float("nan")
    assert rational(x, a, b).isnan().nonzero().tolist() == [[1, 1]]
    assert rational(x.bfloat16(), a, b).isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [3, 111])
def test_equal_functions_differ_by_exactly_zero_in_value_and_gradient(groups, form, dtype):
    a, b = coefficients(groups)
    x = (torch.randn(200, 3 * 37) * 4).to(dtype).requires_grad_()
    y = rational(x, a.clone().requires_grad_(), b, form=form, base=(a, b))
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()


def test_what_it_cannot_compute_takes_another_path(monkeypatch):
    ran = calls(monkeypatch)
    a, b = coefficients(4)
    for x in (torch.randn(3, 32).double(), torch.randn(3, 32).half(), torch.randn(3, 8)):
        y = rational(x, a, b)
        assert y.dtype == x.dtype
        assert normwise(y, rational_reference(x.double(), a.double(), b.double())) <= 1e-3
    assert not ran
