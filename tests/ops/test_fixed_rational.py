"""A rational function of fixed coefficients: the same bits as `rational`, by the prepared kernel where it can run."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_adapters.ops import _native, fixed_rational, rational, set_rational_backend
from lit_adapters.ops import _rational_native as native
from tests.ops.test_rational import FORMS, coefficients


def prepared_calls(monkeypatch):
    """The results of the prepared kernel, call by call; None where it cannot compute."""
    given, original = [], native.Prepared.__call__
    monkeypatch.setattr(native.Prepared, "__call__", lambda self, x: (given.append(original(self, x)), given[-1])[1])
    return given


def fixed(a, b, form="abs-of-sum", channel_dim=-1, base=None):
    return fixed_rational(a, b, form, channel_dim, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "form", "anchored"),
    list(itertools.product([(1, 1, 96), (37, 96), (3, 400, 96)], FORMS, [False, True])),
)
def test_the_prepared_kernel_gives_the_same_bits(shape, form, anchored, dtype, monkeypatch):
    a, b = coefficients(4)
    base = coefficients(4) if anchored else None
    x, given = (torch.randn(shape) * 4).to(dtype), prepared_calls(monkeypatch)
    function = fixed(a, b, form, base=base)
    with torch.no_grad():
        once, again = function(x), function(x)
    assert [y is not None for y in given] == [True, True]
    expected = rational(x, a, b, form, base=base)
    assert once.dtype == dtype
    assert torch.equal(once, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize(
    ("x", "channel_dim"),
    [
        (torch.randn(5, 96, 3), 1),
        (torch.randn(96, 5).t(), -1),
        (torch.randn(5, 96, dtype=torch.float64), -1),
        (torch.randn(5, 20), -1),  # groups of fewer elements than the kernel takes
        (torch.randn(0, 96), -1),
    ],
    ids=["channels in the middle", "not contiguous", "float64", "narrow groups", "empty"],
)
def test_the_same_where_the_prepared_kernel_cannot_run(x, channel_dim, monkeypatch):
    a, b = coefficients(4)
    given = prepared_calls(monkeypatch)
    with torch.no_grad():
        y = fixed(a, b, channel_dim=channel_dim)(x)
    assert all(value is None for value in given)
    assert torch.equal(y, rational(x, a, b, channel_dim=channel_dim))


def test_another_backend_is_used_from_the_next_call_on(monkeypatch):
    a, b = coefficients(4)
    x, function, given = torch.randn(3, 96), fixed(a, b), prepared_calls(monkeypatch)
    try:
        with torch.no_grad():
            function(x)
            set_rational_backend("blocks")
            assert torch.equal(function(x), rational(x, a, b))
    finally:
        set_rational_backend("auto")
    assert len(given) == 1


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(_native, "_broken", {native.NAME})
    a, b = coefficients(4)
    x, given = torch.randn(3, 96), prepared_calls(monkeypatch)
    with torch.no_grad():
        y = fixed(a, b)(x)
    assert given == [None]
    assert torch.equal(y, rational(x, a, b))


def test_groups_that_do_not_divide_the_channels_are_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="4 groups do not divide the 98 channels"):
        fixed(*coefficients(4))(torch.randn(3, 98))


def test_gradients_of_x_are_those_of_the_function():
    a, b = coefficients(4)
    x, function = torch.randn(3, 96, requires_grad=True), fixed(a, b)
    got, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (function, lambda x: rational(x, a, b)))
    assert got.any()
    assert torch.equal(got, expected)


def test_fake_tensors_give_fake_tensors():
    with FakeTensorMode() as mode, torch.no_grad():
        a, b = (mode.from_tensor(c) for c in coefficients(4))
        x = torch.randn(3, 96, dtype=torch.bfloat16)
        y = fixed(a, b)(x)
    assert y.shape == x.shape
    assert y.dtype == torch.bfloat16
