"""W0 + s f(B A) and the gradients through it: the kernel and the PyTorch operations, both against float64."""

import pytest
import torch

from lit_adapters.activations.weight_functions import WEIGHT_FUNCTIONS, WeightUpdate
from lit_adapters.ops import _merged_native as native
from lit_adapters.ops import merged_linear as module
from lit_adapters.ops.merged_linear import merged_linear, merged_weight
from tests.ops.test_rational import normwise

SINUSOIDS = [name for name, f in WEIGHT_FUNCTIONS.items() if f.sinusoid is not None]


@pytest.fixture(params=["kernel", "operations"])
def path(request, monkeypatch):
    """Which path computes; for the kernel, also checks that it ran."""
    ran, original = [], native.can_run
    monkeypatch.setattr(native, "can_run", lambda *a: request.param == "kernel" and (ran.append(1), original(*a))[1])
    yield request.param
    assert bool(ran) == (request.param == "kernel")


def gradients(function, amplitude, w, dtypes, rows=37, columns=101):
    """Value and gradients of x, A, B and frequency, and the same in float64 by autograd."""
    torch.manual_seed(0)
    update = WeightUpdate(function, 2.0, amplitude, True)
    narrow, wide = dtypes
    x, matrix = torch.randn(9, columns).to(narrow), (0.1 * torch.randn(rows, columns)).to(wide)
    grad = torch.randn(9, rows).to(narrow)
    a, b, w = 0.2 * torch.randn(4, columns), 0.2 * torch.randn(rows, 4), torch.tensor(w)
    fast = [t.clone().requires_grad_() for t in (x, a, b, w)]
    y = merged_linear(fast[0], matrix, None, fast[1], fast[2], fast[3], update, lambda weight: weight)
    y.backward(grad)
    exact = [t.double().requires_grad_() for t in (x, a, b, w)]
    formed = matrix.double() + update.value(exact[2] @ exact[1], exact[3])
    expected = exact[0] @ formed.T
    expected.backward(grad.double())
    return [y, *(t.grad for t in fast)], [expected, *(t.grad for t in exact)], update.learns_frequency


@pytest.mark.parametrize("function", SINUSOIDS)
def test_value_and_gradients_are_those_of_the_formula(function, path):
    got, expected, learns = gradients(function, 0.3, 5.0, (torch.float32, torch.float32))
    for value, reference in zip(got[: 5 if learns else 4], expected, strict=False):
        assert normwise(value, reference) <= 1e-6


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", SINUSOIDS)
def test_bfloat16_inputs_are_as_exact_as_they_can_be(function, weight, path):
    got, expected, _ = gradients(function, 0.3, 5.0, (torch.bfloat16, weight))
    for value, reference in zip(got[:4], expected, strict=False):
        assert normwise(value, reference) <= 6e-3


@pytest.mark.parametrize("function", ["sinter", "cos", "sine"])
def test_arguments_of_thousands_of_radians_keep_their_phase(function):
    """Where float32 loses five digits of the argument; w itself is exact in both."""
    update = WeightUpdate(function, 1.0, 0.5, True)
    z, w, gradient = torch.linspace(-2, 2, 4001), torch.tensor(1e4), torch.randn(4001)
    merged = torch.empty_like(z)
    with torch.no_grad():
        slope, by_frequency = module._differentiate(z, gradient.clone(), None, merged, w, update)
    assert normwise(merged, update.value(z.double(), w.double())) <= 2e-7
    assert normwise(slope, gradient.double() * update.derivative(z.double(), w.double())) <= 2e-7
    if update.learns_frequency:
        expected = gradient.double() * update.by_frequency(z.double(), w.double())
        assert abs(by_frequency - expected.sum()) <= 1e-6 * expected.abs().sum()


def test_arguments_too_large_to_reduce_and_nan():
    update, w = WeightUpdate("sine", 1.0, 0.0, True), torch.tensor(1.0)
    z = torch.tensor([0.5, 1e8, 3e9, -1e30, float("nan"), 2.0]).repeat(5)
    merged = torch.empty_like(z)
    with torch.no_grad():
        module._merge(z, None, merged, w, update)
    torch.testing.assert_close(merged.double(), z.double().sin(), rtol=0, atol=2e-7, equal_nan=True)


@pytest.mark.parametrize("function", SINUSOIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_update_leaves_the_weight_as_it_is(function, dtype):
    matrix, update = torch.randn(70, 33).to(dtype), WeightUpdate(function, 2.0, 0.3, True)
    a, b = torch.randn(4, 33), torch.zeros(70, 4)
    with torch.no_grad():
        assert torch.equal(merged_weight(matrix, a, b, torch.tensor(1e4), update, dtype), matrix)


@pytest.mark.parametrize("size", [1, 7, 16, 17, 1 << 14, (1 << 15) + 3])
def test_any_size_and_number_of_threads(size):
    update, w = WeightUpdate("sine", 2.0, 0.0, True), torch.tensor(20.0)
    z, gradient, matrix = torch.randn(size), torch.randn(size), torch.randn(size)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            merged = torch.empty_like(z)
            with torch.no_grad():
                slope, by_frequency = module._differentiate(z, gradient.clone(), matrix, merged, w, update)
            results.append((merged, slope, by_frequency))
    finally:
        torch.set_num_threads(threads)
    for merged, slope, by_frequency in results:
        assert torch.equal(merged, results[0][0])
        assert torch.equal(slope, results[0][1])
        assert by_frequency == results[0][2]
    assert normwise(results[0][0], matrix.double() + update.value(z.double(), w.double())) <= 1e-6


def test_what_the_kernel_cannot_compute():
    z, matrix = torch.randn(6, 8), torch.randn(6, 8)
    with torch.no_grad():
        assert native.can_run(z, matrix, torch.empty_like(z))
        assert native.can_run(z, None, None)
        assert not native.can_run(z.double(), matrix, None)
        assert not native.can_run(z, matrix.half(), None)
        assert not native.can_run(z, torch.randn(8, 6).t(), None)
        assert not native.can_run(z.to("meta"), None, None)
    assert not native.can_run(z, matrix, None)  # second derivatives need the operations
