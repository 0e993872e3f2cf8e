"""The gain of an output against its formula in float64, in value and gradient."""

import pytest
import torch

from lit_adapters.ops.rescaled import rescaled


def formula(y, change, bias):
    offset = 0.0 if bias is None else bias
    return (1 + change) * (y - offset) + offset


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 1), (300, 33)])
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
    terms = (upstream.double() * (wide[0] - (0 if bias is None else bias))).abs().flatten(0, -2).sum(0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_change_is_exact(dtype):
    y, bias = torch.randn(40, 12).to(dtype), torch.randn(12)
    assert torch.equal(rescaled(y, torch.zeros(12), bias), y)
