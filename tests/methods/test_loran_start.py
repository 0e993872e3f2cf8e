"""LoRAN with start_size: B starts away from 0, and what it does there is subtracted."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lit_adapters as la
from tests.methods.loran_layer import layer
from tests.methods.test_loran import FORMULAS

FREQUENCIES = [7.0, "calibrate"]


def attached(base: nn.Module, **settings):
    network = nn.Sequential(copy.deepcopy(base))
    la.attach(network, la.LoRAN(**{"rank": 3, "alpha": 6.0, "targets": ["0"], "start_size": 0.01} | settings))
    return network


@pytest.mark.parametrize("frequency", FREQUENCIES)
@pytest.mark.parametrize("function", FORMULAS)
def test_every_function_starts_at_the_pretrained_layer_and_trains(function, frequency):
    base, x = nn.Linear(12, 8), torch.randn(50, 12)
    for centered in (True, False):
        network = attached(base, function=function, frequency=frequency, centered=centered)
        torch.testing.assert_close(network(x), base(x), rtol=1e-6, atol=1e-6)
        assert not network[0].delta_weight(torch.float64).any()
        network(x).square().sum().backward()
        for parameter in (network[0].lora_A, network[0].lora_B):  # A learns from the first step, too
            assert parameter.grad.any(1).all()
    network, base = network.bfloat16(), copy.deepcopy(base).bfloat16()
    assert torch.equal(network(x.bfloat16()), base(x.bfloat16()))


def test_the_size_of_the_start():
    adapter = attached(nn.Linear(300, 200), start_size=0.02, rank=16)[0]
    size = adapter.product(torch.float64).square().mean().sqrt().item()
    assert size == pytest.approx(0.02 / math.sqrt(3 * 300), rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("frequency", FREQUENCIES)
@pytest.mark.parametrize("function", ["sine", "tanh", "relu"])
def test_value_and_gradient_against_float64(function, frequency, dropout):
    adapter, f = layer(function=function, frequency=frequency, start_size=0.5, dropout=dropout), FORMULAS[function]
    x, grad = torch.randn(5, 12, requires_grad=True), torch.randn(5, 8)
    wide = [t.detach().double().requires_grad_() for t in (x, adapter.lora_A, adapter.lora_B)]

    def update(b, a):
        z = b @ a
        if frequency != "calibrate":
            return f(z, frequency)
        w = 1 / z.detach().square().mean().sqrt()
        return f(w * z, 1.0) / w

    change = update(wide[2], wide[1]) - update(adapter.start_B.double(), adapter.start_A.double())
    torch.manual_seed(1)
    kept = F.dropout(torch.ones(5, 12), dropout)
    exact = adapter.base.double()(wide[0]) + (wide[0] * kept) @ (adapter.scaling * change).T
    adapter.base.float()
    expected = torch.autograd.grad(exact, wide, grad.double())
    torch.manual_seed(1)
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B], grad)
    for got, want in zip((y, *actual), (exact, *expected), strict=True):
        assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    with torch.no_grad():  # the weight that is kept in eval mode
        torch.testing.assert_close(adapter.eval()(x), adapter.base(x) + x @ adapter.delta_weight().T)


@pytest.mark.parametrize("frequency", FREQUENCIES)
def test_files_merging_and_the_pretrained_layer(tmp_path, frequency):
    base, x = nn.Linear(12, 8), torch.randn(5, 12)
    network = attached(base, function="relu", frequency=frequency)
    with torch.no_grad():
        network[0].lora_B.normal_()
    with la.disabled(network):
        assert torch.equal(network(x), base(x))
    y, update = network(x), network[0].delta_weight()
    la.save_adapters(network, tmp_path)
    loaded = nn.Sequential(copy.deepcopy(base))
    la.load_adapters(loaded, tmp_path)
    assert torch.equal(loaded(x), y)
    la.merge(loaded)
    assert torch.equal(loaded[0].weight, base.weight + update)


def test_convolutions_and_a_weight_that_trains():
    base, x = nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(attached(base, function="sigmoid")(x), base(x), rtol=1e-6, atol=1e-6)
    network = nn.Sequential(nn.Linear(12, 8)).bfloat16()
    la.attach(network, la.LoRAN(rank=3, targets=["0"], start_size=0.5), train=["0"])
    x = torch.randn(5, 12).bfloat16()
    network(x).sum().backward()
    assert network[0].base.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(network[0].base.weight.grad, x.sum(0).expand(8, 12), rtol=0.02, atol=0.02)


def test_the_size_must_be_a_number():
    with pytest.raises(la.AdapterError, match="start_size -1 must be a finite number from 0 to 1000"):
        la.LoRAN(start_size=-1)
