"""The gain of an output against its formula in float64, in value and gradient."""

import pytest
import torch

from lit_adapters.ops import _native
from lit_adapters.ops.rescaled import scale_without_bias as rescaled


@pytest.fixture(params=["kernel", "operations"], autouse=True)
def path(request, monkeypatch):
    """By rescaled.cpp, or without a compiler."""
    monkeypatch.setattr(_native, "_broken", set() if request.param == "kernel" else {"rescaled"})
    if request.param == "kernel":
        _native.build("rescaled")  # or the other path would be tested twice


def formula(y, change, bias):
    offset = 0.0 if bias is None else bias
    return (1 + change) * (y - offset) + offset


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 1), (300, 33), (12,), (0, 12)])
@pytest.mark.parametrize("biased", [True, False])
def test_agrees_with_float64(shape, biased, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    change = (0.3 * torch.randn(shape[-1], generator=generator)).requires_grad_()
    bias = torch.randn(shape[-1], generator=generator) if biased else None
    upstream = torch.randn(shape, generator=generator).to(dtype)
    h = rescaled(y, change, bias)
    h.backward(upstream)
    wide = [t.detach().double().requires_grad_() for t in (y, change)]
    expected = formula(*wide, None if bias is None else bias.double())
    expected.backward(upstream.double())
    terms = (upstream.double() * (wide[0] - (0 if bias is None else bias))).abs().reshape(-1, shape[-1]).sum(0)
    if y.numel() == 0:
        assert h.shape == y.grad.shape == y.shape
        assert not change.grad.any()
        return
    assert h.dtype == y.grad.dtype == dtype
    assert change.grad.dtype == torch.float32
    for got, reference, scale in (
        (h, expected, expected.abs().max()),
        (y.grad, wide[0].grad, wide[0].grad.abs().max()),
        (change.grad, wide[1].grad, terms.max()),
    ):
        assert (got.double() - reference).abs().max() <= tolerance * scale


def test_first_and_second_derivatives():
    y, change, bias = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2, 5), (5,), (5,)))
    leaves = [y.requires_grad_(), change.requires_grad_()]
    assert torch.autograd.gradcheck(lambda y, c: rescaled(y, c, bias), leaves)
    assert torch.autograd.gradgradcheck(lambda y, c: rescaled(y, c, bias), leaves)


def gradients(y, change, bias, upstream):
    leaves = [y.clone().requires_grad_(), change.clone().requires_grad_()]
    h = rescaled(*leaves, bias)
    return [h, *torch.autograd.grad(h, leaves, upstream)]


def test_results_do_not_depend_on_the_number_of_threads():
    y, upstream, change, bias = (torch.randn(*s) for s in ((301, 515), (301, 515), (515,), (515,)))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(gradients(y, change, bias, upstream))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_memory_order_and_what_is_not_finite(dtype):
    y, upstream = torch.randn(12, 40).to(dtype), torch.randn(12, 40).to(dtype)
    y[0, 0], upstream[3, 1] = float("nan"), float("inf")
    change, bias = torch.rand(40), torch.randn(40)
    plain = gradients(y, change, bias, upstream)
    turned = gradients(*(t.t().contiguous().t() if t.dim() == 2 else t for t in (y, change, bias, upstream)))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for one, other, spoilt in zip(plain, turned, ([0], [3 * 40 + 1], [0, 1]), strict=True):
        assert torch.equal(~one.isfinite().flatten(), torch.isin(torch.arange(one.numel()), torch.tensor(spoilt)))
        finite = one.isfinite()
        assert torch.equal(finite, other.isfinite())
        torch.testing.assert_close(one[finite], other[finite], **tolerance)


def test_a_change_without_gradient_costs_no_sums():
    y, change = torch.randn(5, 8, requires_grad=True), torch.randn(8)
    h = rescaled(y, change, None)
    with torch.no_grad():
        found = h.grad_fn.apply(torch.ones(5, 8))
    torch.testing.assert_close(found[0], (1 + change).expand(5, 8))
    assert found[1] is None


def test_the_kernel_leaves_second_derivatives_to_autograd():
    y, change, bias = torch.randn(6, 40, requires_grad=True), torch.randn(40, requires_grad=True), torch.randn(40)
    first = torch.autograd.grad(rescaled(y, change, bias).square().sum(), change, create_graph=True)[0]
    found = torch.autograd.grad(first.sum(), [y, change])
    wide = [t.detach().double().requires_grad_() for t in (y, change)]
    slope = torch.autograd.grad(formula(*wide, bias).square().sum(), wide[1], create_graph=True)[0]
    expected = torch.autograd.grad(slope.sum(), wide)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(default):
    tensors = [torch.randn(*s) for s in ((130, 40), (40,), (40,), (130, 40))]
    expected = gradients(*tensors)
    try:
        torch.set_default_dtype(default)
        found = gradients(*tensors)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


def test_many_gradients_at_a_time():
    y, change, upstream = torch.randn(6, 40, requires_grad=True), torch.randn(40), torch.randn(3, 6, 40)
    (found,) = torch.autograd.grad(rescaled(y, change, None), y, upstream, is_grads_batched=True)
    torch.testing.assert_close(found, upstream * (1 + change))


def test_a_gradient_in_another_memory_order():
    y, change, bias, upstream = torch.randn(6, 40), torch.randn(40), torch.randn(40), torch.randn(40, 6).t()
    found, expected = gradients(y, change, bias, upstream), gradients(y, change, bias, upstream.contiguous())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_change_is_exact(dtype):
    y, bias = torch.randn(40, 12).to(dtype), torch.randn(12)
    assert torch.equal(rescaled(y, torch.zeros(12), bias), y)
