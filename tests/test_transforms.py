"""The transforms of torch.func and forward-mode derivatives agree with reverse-mode autograd, for every method."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_adapters.ops import rational
from tests.matrix import ALL, MODELS, adapted

TOLERANCE = 2e-5  # of the largest entry: float32 by other products in another order


@pytest.fixture(params=ALL)
def case(request):
    """A loss of the trained parameters and the images, these, and its gradients."""
    network, images = adapted("vit", request.param).eval(), MODELS["vit"].inputs()
    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}

    def loss(values, x):
        return functional_call(network, values, (x,)).square().mean()

    gradients = torch.autograd.grad(loss(parameters, images), list(parameters.values()))
    values = {n: p.detach() for n, p in parameters.items()}
    return loss, values, images, dict(zip(parameters, gradients, strict=True))


def assert_close(found, expected):
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= TOLERANCE * value.abs().max(), name


def test_grad(case):
    loss, values, images, expected = case
    assert_close(grad(loss)(values, images), expected)


def test_gradients_of_every_sample(case):
    loss, values, images, expected = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that vmap is slow over attention
        each = vmap(grad(lambda v, x: loss(v, x[None])), (None, 0))(values, images)
    assert_close({name: g.mean(0) for name, g in each.items()}, expected)


# Not for LoRAN, whose backward writes to its results block by block.
@pytest.mark.parametrize("case", [m for m in ALL if not m.startswith("loran")], indirect=True)
def test_many_gradients_at_a_time(case):
    loss, values, images, expected = case
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    upstream, total = torch.tensor([1.0, -2.0]), loss(leaves, images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that vmap is slow over attention
        found = torch.autograd.grad(total, list(leaves.values()), upstream, is_grads_batched=True)
    assert_close({name: g[1] / -2 for name, g in zip(leaves, found, strict=True)}, expected)


def test_forward_mode(case):
    loss, values, images, expected = case
    with sdpa_kernel(SDPBackend.MATH):  # the only one of PyTorch's attentions with a forward mode
        _, slope = jvp(lambda v: loss(v, images), (values,), (expected,))
    assert slope.item() == pytest.approx(sum(g.square().sum().item() for g in expected.values()), rel=1e-4)


def test_dual_numbers_outside_torch_func():
    torch.manual_seed(0)
    x, a, b = torch.randn(5, 8), torch.randn(2, 6), torch.randn(2, 4)
    upstream = torch.randn(5, 8)
    wanted = x.clone().requires_grad_()
    rational(wanted, a, b, base=(a + 1, b)).backward(upstream)
    with forward_ad.dual_level():
        y = rational(forward_ad.make_dual(x, torch.ones_like(x)), a, b, base=(a + 1, b))
        slopes = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(slopes * upstream, wanted.grad)
