"""LoRAN: values and gradients in float64, what is kept for backward, dropout, initialisation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import lit_adapters as la
from lit_adapters.activations.weight_functions import WEIGHT_FUNCTIONS
from lit_adapters.methods.loran import LoRANAdapter
from tests.methods.loran_layer import layer

# Written out here, independently of the library: f(z) for amplitude 0.1 and frequency 7.
FORMULAS = {
    "sinter": lambda z, w: z + 0.1 * z * torch.sin(w * z),
    "sine": lambda z, w: torch.sin(w * z),
    "fixed_sine": lambda z, w: torch.sin(w * z),
    "cos": lambda z, w: z * torch.cos(w * z) + z,
    "identity": lambda z, w: z,
    "sigmoid": lambda z, w: 1 / (1 + torch.exp(-z)),
    "tanh": lambda z, w: (torch.exp(2 * z) - 1) / (torch.exp(2 * z) + 1),
    "relu": lambda z, w: z.clamp(min=0),
    "silu": lambda z, w: z / (1 + torch.exp(-z)),
    "swish25": lambda z, w: z / (1 + torch.exp(-25 * z)),
    "gaussian": lambda z, w: z * torch.exp(-(z**2)) / 2,
}


def reference(adapter: LoRANAdapter, x: torch.Tensor, function: str, centered: bool = True):
    """Output and gradients (x, A, B and, for sine, the frequency) in float64 by plain autograd."""
    a, b, w = (t.detach().double().requires_grad_() for t in (adapter.lora_A, adapter.lora_B, adapter.frequency))
    x = x.detach().double().requires_grad_()
    f = FORMULAS[function]
    update = f(b @ a, w) - (f(torch.zeros((), dtype=torch.float64), w) if centered else 0)
    base = adapter.base.weight.double()
    base = base.T if isinstance(adapter.base, Conv1D) else base
    y = x @ (base + adapter.scaling * update).T + adapter.base.bias.double()
    return y, [x, a, b, *([w] if function == "sine" else [])]


def test_all_functions_are_covered():
    assert FORMULAS.keys() == WEIGHT_FUNCTIONS.keys()


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("function", FORMULAS)
def test_value_and_gradient_against_float64(function, centered):
    adapter = layer(function=function, amplitude=0.1, frequency=7.0, centered=centered)
    x, grad = torch.randn(4, 5, 12, requires_grad=True), torch.randn(4, 5, 8)
    exact, variables = reference(adapter, x, function, centered)
    expected = torch.autograd.grad(exact, variables, grad.double())
    y = adapter(x)
    trained = [x, adapter.lora_A, adapter.lora_B, *([adapter.frequency] if function == "sine" else [])]
    actual = torch.autograd.grad(y, trained, grad)
    for got, want in zip((y, *actual), (exact, *expected), strict=True):
        assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    delta = adapter.delta_weight(torch.float64)
    inputs = torch.eye(12, dtype=torch.float64)
    columns, _ = reference(adapter, inputs, function, centered)
    formed = columns.detach().T - adapter.base.bias.double()[:, None] - adapter.base.weight.double()
    assert (delta - formed).abs().max() <= 1e-12 * formed.abs().max()
    assert (adapter.delta_weight() - delta).abs().max() <= 1e-5 * delta.abs().max()


@pytest.mark.parametrize(
    "base", [nn.Linear(700, 500), nn.Linear(500, 700), Conv1D(500, 700)], ids=["wide", "tall", "gpt2"]
)
def test_many_row_blocks_and_any_shape(base):
    inputs = 500 if isinstance(base, nn.Linear) and base.in_features == 500 else 700
    adapter = layer(base, function="sinter", amplitude=0.1, frequency=7.0)
    x = torch.randn(3, inputs, requires_grad=True)
    exact, variables = reference(adapter, x, "sinter")
    grad = torch.randn_like(exact)
    expected = torch.autograd.grad(exact, variables, grad)
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B], grad.float())
    for got, want in zip((y, *actual), (exact, *expected), strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_bfloat16_layers_and_autocast():
    adapter = layer(function="sinter", amplitude=0.1, frequency=7.0)
    x, grad = torch.randn(64, 12).bfloat16().float(), torch.randn(64, 8).bfloat16().float()
    exact, variables = reference(adapter, x, "sinter")
    expected = torch.autograd.grad(exact, variables[1:], grad.double())

    def close(y: torch.Tensor) -> None:
        assert y.dtype == torch.bfloat16
        assert (y - exact).abs().max() <= 0.02 * exact.abs().max()
        for got, want in zip(
            torch.autograd.grad(y, [adapter.lora_A, adapter.lora_B], grad.bfloat16()), expected, strict=True
        ):
            assert got.dtype == torch.float32
            assert (got - want).abs().max() <= 0.02 * want.abs().max()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(adapter(x))
    close(adapter.bfloat16()(x.bfloat16()))


def test_the_phase_is_computed_in_float32_whatever_the_model_is():
    adapter = layer(function="sine", frequency=1e4).bfloat16()
    exact = adapter.scaling * torch.sin(1e4 * (adapter.lora_B.double() @ adapter.lora_A.double()))
    y = adapter(torch.eye(12, dtype=torch.bfloat16)).T
    expected = adapter.base.weight.double() + exact + adapter.base.bias.double()[:, None]
    # In bfloat16 the phase would be off by tens of radians, the sine by anything up to 2.
    assert (y - expected).abs().max() <= 0.01 * expected.abs().max() + 0.01


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_output_may_be_written_to(bias, contiguous):
    adapter = layer(nn.Linear(12, 8, bias=bias))
    x = torch.randn(4, 5, 12, requires_grad=True) if contiguous else torch.randn(4, 12, 5, requires_grad=True).mT
    expected = torch.autograd.grad((adapter(x) * 2 + 1).square().sum(), adapter.lora_B)
    y = adapter(x)
    y.mul_(2).add_(1)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), adapter.lora_B), expected)
    with torch.no_grad():
        adapter.lora_B.zero_()
    assert torch.equal(adapter(x), adapter.base(x))


def test_double_precision_is_kept():
    adapter = layer(amplitude=0.1, frequency=7.0).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    exact, _ = reference(adapter, x, "sinter")
    assert (adapter(x) - exact).abs().max() < 1e-13


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    adapter, sizes = layer(nn.Linear(200, 300), rank=4), []
    x = torch.randn(2, 200, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append((t.numel(), t.data_ptr())), t)[1], lambda t: t
    ):
        adapter(x)
    assert len(sizes) >= 4
    assert max(n for n, address in sizes if address != adapter.base.weight.data_ptr()) == 4 * 300


def test_sinter_at_the_published_constants_stays_within_its_amplitude():
    adapter = layer()
    product = adapter.product(torch.float64)
    change = (adapter.delta_weight(torch.float64) / adapter.scaling - product).abs()
    assert (change <= 5e-5 * product.abs() * (1 + 1e-6)).all()
    assert change.any()
    control = layer(function="identity")
    with torch.no_grad():
        control.lora_A.copy_(adapter.lora_A), control.lora_B.copy_(adapter.lora_B)
    lora = control.scaling * control.product(torch.float64)
    assert torch.equal(control.delta_weight(torch.float64), lora)
    # "sinter" without amplitude is the same control.
    off = layer(amplitude=0.0)
    off.load_state_dict(adapter.state_dict())
    assert torch.equal(off.delta_weight(torch.float64), lora)


@pytest.mark.parametrize("function", FORMULAS)
def test_initialisation(function):
    network, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(5, 12)
    before = network(x)
    la.attach(network, la.LoRAN(rank=3, function=function, frequency=7.0))
    if function == "relu":  # flat at 0: a start at B = 0 would never leave it
        assert 0 < network[0].lora_B.abs().max() < 0.01
        torch.testing.assert_close(network(x), before, rtol=0, atol=0.02)
        assert not torch.equal(network(x), before)
    else:
        assert not network[0].lora_B.any()
        assert torch.equal(network(x), before)
    network(x).square().sum().backward()
    assert network[0].lora_B.grad.any()


def test_an_uncentered_sigmoid_moves_the_start_as_published():
    network = nn.Sequential(nn.Linear(12, 8))
    la.attach(network, la.LoRAN(rank=2, alpha=4.0, function="sigmoid", centered=False))
    torch.testing.assert_close(network[0].delta_weight(), torch.full((8, 12), 1.0))


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    adapter = layer(dropout=0.5, amplitude=0.1, frequency=7.0)
    x = torch.ones(4000, 12)
    base, plain = adapter.base(x), adapter.eval()(x)
    trained = adapter.train()(x)
    assert not torch.equal(trained, plain)
    torch.testing.assert_close((trained - base).mean(0), (plain - base).mean(0), rtol=0.1, atol=0.3)
    torch.manual_seed(3)
    y = adapter(x[:5])
    actual = torch.autograd.grad(y.square().sum(), [adapter.lora_A, adapter.lora_B])
    torch.manual_seed(3)
    expected_y = adapter.base(x[:5]) + F.linear(F.dropout(x[:5], 0.5), adapter.delta_weight())
    torch.testing.assert_close(y, expected_y)
    expected = torch.autograd.grad(expected_y.square().sum(), [adapter.lora_A, adapter.lora_B])
    for got, want in zip(actual, expected, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    with torch.no_grad():
        adapter.lora_B.zero_()
    assert torch.equal(adapter(x), base)


def test_a_weight_that_trains_beside_its_adapter_gets_its_gradient():
    network = nn.Sequential(nn.Linear(12, 8))
    la.attach(network, la.LoRAN(rank=3, targets=["0"]), train=["0"])
    with torch.no_grad():
        network[0].lora_B.normal_()
    adapter, x = network[0], torch.randn(5, 12)
    weight = (adapter.base.weight + adapter.delta_weight()).detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(x, weight, adapter.base.bias).square().sum(), weight)
    adapter(x).square().sum().backward()
    torch.testing.assert_close(adapter.base.weight.grad, expected)
    torch.testing.assert_close(adapter.bias.grad, 2 * adapter(x).detach().sum(0))


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_of_any_grouping(groups):
    base = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, padding_mode="circular")
    adapter = layer(base, function="sinter", amplitude=0.1, frequency=7.0)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    a, b = (t.detach().double().requires_grad_() for t in (adapter.lora_A, adapter.lora_B))
    weight = base.weight.double() + adapter.scaling * FORMULAS["sinter"](b @ a, 7.0).view(base.weight.shape)
    twin = copy.deepcopy(base).double()
    expected_y = twin._conv_forward(x.double(), weight, twin.bias)
    expected = torch.autograd.grad(expected_y.square().sum(), [a, b])
    y = adapter(x)
    torch.testing.assert_close(y, expected_y.float(), rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(y.square().sum(), [adapter.lora_A, adapter.lora_B])
    torch.testing.assert_close([g.double() for g in actual], list(expected), rtol=1e-4, atol=1e-4)


def test_the_frequency_does_not_decay():
    adapter = layer(function="sine", frequency=7.0)
    assert [id(p) for p in adapter.undecayed_parameters()] == [id(adapter.frequency)]
    assert layer().undecayed_parameters() == []


def test_sine_lora():
    """As its authors compute it: x W0^T + b + x sin(w A^T B^T) / sqrt(in) * alpha / r, with a constant w."""
    adapter = layer(function="fixed_sine", frequency=7.0, divide_by_root=True)
    x, a, b = torch.randn(5, 12).double(), adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
    expected = adapter.base.double()(x) + x @ torch.sin(7.0 * a.T @ b.T) / math.sqrt(12) * 6.0 / 3
    torch.testing.assert_close(adapter(x), expected, rtol=1e-6, atol=1e-6)
    assert adapter.adapter_parameters().keys() == {"lora_A", "lora_B"}
    assert adapter.adapter_tensors()["frequency"] == 7.0


def test_statistics():
    adapter = layer(function="sine", frequency=7.0)
    product, update = adapter.product(torch.float64), adapter.delta_weight(torch.float64)
    statistics = adapter.statistics()
    assert statistics["relative_norm"] == pytest.approx((update.norm() / adapter.base.weight.norm()).item(), rel=1e-5)
    residual = (update / adapter.scaling - product).norm() / product.norm()
    assert statistics["nonlinearity"] == pytest.approx(residual.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "sin"}, "function 'sin' must be one of 'sinter', 'sine'"),
        ({"frequency": float("inf")}, "frequency inf must be a finite number"),
        ({"amplitude": float("nan")}, "amplitude nan must be a finite number"),
        ({"frequency": "1e4"}, "frequency '1e4' must be a finite number"),
        ({"function": "sine", "frequency": 0.0}, "frequency 0 makes sine zero everywhere"),
        ({"function": "fixed_sine", "frequency": 0.0}, "frequency 0 makes fixed_sine zero everywhere"),
        ({"divide_by_root": 1}, "divide_by_root 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(la.AdapterError, match=message):
        la.LoRAN(**settings)
