"""Second derivatives of `rational`, for penalties on gradients, Hessians and sharpness."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_adapters.ops import rational, rational_reference, set_rational_backend
from tests.matrix import MODELS, adapted

FORMS = ("abs-of-sum", "sum-of-abs")


def coefficients(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, k, generator=generator, dtype=dtype) for k in (6, 4)]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_second_and_third_derivatives_agree_with_differences(form, anchored):
    a, b = (c.requires_grad_() for c in coefficients())
    base = [c.flip(0).detach() for c in (a, b)] if anchored else None
    x = torch.linspace(-3, 3, 4, dtype=torch.float64).view(1, 4, 1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *given: rational(*given, form, 1, base), (x, a, b))

    def slope(x):
        return torch.autograd.grad(rational(x, a.detach(), b.detach(), form, 1, base).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, (x,))


@pytest.mark.parametrize("backend", ["auto", "blocks"])
def test_a_penalty_on_the_gradient(backend):
    """The upstream gradient depends on x and on the coefficients too."""
    set_rational_backend(backend)

    def penalty(function, dtype):
        a, b = (c.to(dtype).requires_grad_() for c in coefficients())
        x = torch.linspace(-3, 3, 48, dtype=torch.float64).view(3, 16).to(dtype).requires_grad_()
        loss = function(function(x, a, b), a, b).square().sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, a, b))

    try:
        found = penalty(rational, torch.float32)
    finally:
        set_rational_backend("auto")
    for got, want in zip(found, penalty(rational_reference, torch.float64), strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_hessians_of_all_kinds_agree(form):
    a, b = coefficients()
    x = torch.linspace(-3, 3, 4, dtype=torch.float64)

    def function(x):
        return rational(x[None], a, b, form).square().sum()

    expected = hessian(function, x)
    assert torch.allclose(hessian(function, x, vectorize=True), expected)
    assert torch.allclose(torch.func.hessian(function)(x), expected)
    wanted = hessian(lambda x: rational_reference(x[None], a, b, form).square().sum(), x)
    assert torch.allclose(expected, wanted)


@pytest.mark.parametrize("method", ["nora", "nora-anchored", "nora++", "afa-rational"])
def test_a_model_trains_on_the_gradient_of_its_input(method):
    network = adapted("vit", method)
    x = MODELS["vit"].inputs().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the only one of PyTorch's attentions with a second derivative
        (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
    trained = [p for p in network.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained)


def test_the_first_derivative_is_the_same_with_and_without_a_second():
    x, (a, b) = torch.randn(3, 16, requires_grad=True), (c.requires_grad_() for c in coefficients(torch.float32))
    slopes = [torch.autograd.grad(rational(x, a, b).sum(), (x, a, b), create_graph=graph) for graph in (False, True)]
    assert all(torch.equal(one, other) for one, other in zip(*slopes, strict=True))
