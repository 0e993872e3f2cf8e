"""The fused low-rank layer against the formula in float64, in value and gradient, and what it keeps for backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lit_adapters as la
from lit_adapters.ops.low_rank import low_rank_linear

SHAPES = [((7, 12), 9, 3), ((2, 5, 12), 9, 1), ((3, 1, 2, 16), 4, 4), ((1, 64), 192, 8), ((33, 96), 8, 8)]
NORMWISE = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2}


PHIS = [None, torch.tanh]


def plain(x, weight, bias, a, b, phi=None):
    z = F.linear(x, a)
    return F.linear(x, weight, bias) + F.linear(z if phi is None else phi(z), b)


def inputs(shape, out, rank, dtype, bias=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight = draw(*shape), draw(out, shape[-1]) / shape[-1] ** 0.5
    a, b = draw(rank, shape[-1]) / shape[-1] ** 0.5, draw(out, rank) / rank**0.5
    return [x.to(dtype), weight.to(dtype), draw(out).to(dtype) if bias else None, a.to(dtype), b.to(dtype)], draw(
        *shape[:-1], out
    ).to(dtype)


def test_the_scale_is_part_of_the_update():
    tensors, upstream = inputs((7, 12), 9, 3, torch.float32)
    scaled = run(lambda *leaves: low_rank_linear(*leaves, scale=0.3), tensors, upstream, None)
    expected = run(lambda *leaves: low_rank_linear(*leaves[:4], 0.3 * leaves[4], leaves[5]), tensors, upstream, None)
    torch.testing.assert_close(scaled, expected)


def run(function, tensors, upstream, phi):
    leaves = [None if t is None else t.clone().requires_grad_(i in (0, 3, 4)) for i, t in enumerate(tensors)]
    y = function(*leaves, phi)
    y.backward(upstream)
    return [y.detach(), leaves[0].grad, leaves[3].grad, leaves[4].grad]


@pytest.mark.parametrize("dtype", list(NORMWISE))
@pytest.mark.parametrize(("case", "bias", "phi"), list(itertools.product(SHAPES, (True, False), PHIS)))
def test_agrees_with_float64(case, bias, phi, dtype):
    tensors, upstream = inputs(*case, dtype, bias)
    got = run(low_rank_linear, tensors, upstream, phi)
    wide = [None if t is None else t.double() for t in tensors]
    expected = run(plain, wide, upstream.double(), phi)
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == dtype
        assert (value.double() - reference).abs().max() <= NORMWISE[dtype] * reference.abs().max()


@pytest.mark.parametrize("dtype", list(NORMWISE))
@pytest.mark.parametrize("case", SHAPES)
def test_an_identity_activation_changes_no_bit(case, dtype):
    """Else AFA-LoRA at beta = 0 would not be LoRA."""
    tensors, upstream = inputs(*case, dtype)
    without, identity = (run(low_rank_linear, tensors, upstream, phi) for phi in (None, lambda z: 1 * z))
    assert all(torch.equal(one, two) for one, two in zip(without, identity, strict=True))


@pytest.mark.parametrize("phi", PHIS)
def test_first_and_second_derivatives(phi):
    (x, weight, bias, a, b), _ = inputs((2, 3, 6), 5, 2, torch.float64)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def function(x, a, b):
        return low_rank_linear(x, weight, bias, a, b, phi)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_only_what_asks_for_a_gradient_gets_one():
    tensors, upstream = inputs((7, 12), 9, 3, torch.float32)
    b = tensors[4].requires_grad_()
    output, computed = low_rank_linear(*tensors), []
    node = output.grad_fn.next_functions[0][0]
    node.register_hook(lambda gradients, _: computed.extend(g is not None for g in gradients))
    output.backward(upstream)
    assert b.grad.any()
    assert computed == [False, False, False, False, True]  # x, W, bias, A, B


@pytest.mark.parametrize("phi", PHIS)
def test_an_input_without_gradient_costs_no_product_for_one(phi):
    tensors, _ = inputs((7, 12), 9, 3, torch.float32)
    tensors[3].requires_grad_()  # A, or through it z
    update = low_rank_linear(*tensors, phi).grad_fn.next_functions[0][0]
    assert update.needs_input_grad == (False, False, False, True, False, False)


def adapted(**changes):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(16, 24))
    la.attach(network, la.LoRA(**{"rank": 2, "targets": ["0"]} | changes))
    with torch.no_grad():
        network[0].lora_B.normal_()
    return network


def saved_for_backward(network, x):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        network(x)
    return sizes


def test_saves_the_input_z_and_the_factors_and_no_output():
    network, x = adapted(), torch.randn(10, 16, requires_grad=True)
    assert sorted(map(tuple, saved_for_backward(network, x))) == sorted([(10, 16), (24, 16), (2, 16), (24, 2), (10, 2)])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_layer_equals_base_plus_update(autocast):
    network, x = adapted(), torch.randn(3, 10, 16)
    layer = network[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = network(x)
        expected = layer.base(x) + layer.scaling * layer.up(layer.down(x))
    assert y.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(y, expected, **({"rtol": 2e-2, "atol": 2e-2} if autocast else {}))


def test_hooks_of_the_pretrained_layer_still_run():
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 24)
    linear.register_forward_hook(lambda module, args, output: output * 2)
    network = torch.nn.Sequential(linear)
    x = torch.randn(5, 16)
    expected = network(x)
    la.attach(network, la.LoRA(rank=2, targets=["0"]))
    assert torch.equal(network(x), expected)


def test_a_pretrained_weight_that_trains_gets_its_gradient():
    network, x = adapted(), torch.randn(5, 16)
    network[0].weight.requires_grad_(True)
    network(x).sum().backward()
    assert network[0].weight.grad.any()


def test_dropout_leaves_the_pretrained_path_alone():
    network, x = adapted(dropout=0.5), torch.ones(2000, 16)
    base = F.linear(x[:1], network[0].weight, network[0].bias)
    mean = network(x).mean(0) - base
    network.eval()
    torch.testing.assert_close(mean, network(x[:1]) - base, rtol=0.3, atol=0.3)
