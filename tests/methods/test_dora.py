"""DoRA: values and gradients in float64, the norm by products of width r, the start, and a base that changes."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lit_adapters as la
from lit_adapters.methods.dora import DoRAAdapter


def layer(base: nn.Module | None = None, **settings) -> DoRAAdapter:
    network = nn.Sequential(nn.Linear(12, 8) if base is None else base)
    la.attach(network, la.DoRA(**{"rank": 3, "alpha": 6.0, "targets": ["0"]} | settings))
    ((_, adapter),) = la.adapters(network)
    with torch.no_grad():
        adapter.lora_B.normal_()
        adapter.magnitude.mul_(1 + 0.2 * torch.rand_like(adapter.magnitude))
    return adapter


def reference(adapter: DoRAAdapter, x: torch.Tensor):
    """Output and variables (x, A, B, m) in float64, the norm held constant."""
    trained = adapter.lora_A, adapter.lora_B, adapter.magnitude
    x, a, b, m = (t.detach().double().requires_grad_() for t in (x, *trained))
    base = adapter.base.weight.double()
    base = (base.T if isinstance(adapter.base, Conv1D) else base).flatten(1)
    v = base + adapter.scaling * b @ a
    return m / v.detach().square().sum(1).sqrt(), v, [x, a, b, m]


@pytest.mark.parametrize(
    "base", [nn.Linear(12, 8), nn.Linear(12, 8, bias=False), Conv1D(8, 12)], ids=["bias", "none", "gpt2"]
)
@pytest.mark.parametrize("rslora", [False, True])
def test_value_and_gradient_against_float64(base, rslora):
    adapter = layer(base, rslora=rslora)
    x, grad = torch.randn(4, 5, 12, requires_grad=True), torch.randn(4, 5, 8)
    gain, v, variables = reference(adapter, x)
    exact = gain * (variables[0] @ v.T) + (0 if adapter.base.bias is None else adapter.base.bias.double())
    expected = torch.autograd.grad(exact, variables, grad.double())
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B, adapter.magnitude], grad)
    for got, want in zip((y, *actual), (exact, *expected), strict=True):
        assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    weight = (gain[:, None] * v).float()
    torch.testing.assert_close(adapter.delta_weight(), weight - adapter.layer.matrix(adapter.base, adapter.base.weight))


def test_a_convolution_against_float64():
    base = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    adapter = layer(base)
    x = torch.randn(2, 4, 9, 9)
    gain, v, (_, a, b, m) = reference(adapter, x)
    weight = (gain[:, None] * v).view(base.weight.shape)
    exact = torch.nn.functional.conv2d(x.double(), weight, base.bias.double(), 2, 1)
    y = adapter(x)
    torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(exact.square().sum(), [a, b, m])
    actual = torch.autograd.grad(y.square().sum(), [adapter.lora_A, adapter.lora_B, adapter.magnitude])
    for got, want in zip(actual, expected, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_bfloat16():
    adapter, x = layer(), torch.randn(64, 12)
    gain, v, _ = reference(adapter, x)
    exact = gain * (x.double() @ v.T) + adapter.base.bias.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 0.02 * exact.abs().max()
    y = adapter.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 0.03 * exact.abs().max()


def test_norm_by_products_of_width_r():
    adapter = layer()
    expected = (adapter.base.weight.double() + adapter.scaling * adapter.product(torch.float64)).norm(dim=1)
    assert (adapter.weight_norm() - expected).abs().max() <= 1e-6 * expected.max()


def test_at_the_start_the_gain_is_exactly_one():
    network = nn.Sequential(nn.Linear(384, 384))
    la.attach(network, la.DoRA(rank=8))
    assert torch.equal(network[0].magnitude / network[0].weight_norm(), torch.ones(384))


def test_a_row_of_zeros_does_no_harm():
    base = nn.Linear(12, 8)
    with torch.no_grad():
        base.weight[3] = 0
    network, x = nn.Sequential(base), torch.randn(5, 12)
    before = network(x)
    la.attach(network, la.DoRA(rank=2))
    assert torch.equal(network(x), before)
    network(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network[0].adapter_parameters().values())


def test_the_base_norm_is_measured_once_and_follows_the_base(monkeypatch):
    adapter, x, measured = layer(), torch.randn(5, 12), []
    original = type(adapter)._measure_base
    monkeypatch.setattr(type(adapter), "_measure_base", lambda self: (measured.append(1), original(self))[1])
    adapter(x), adapter(x)
    assert not measured
    for change in (
        lambda: adapter.load_state_dict({"weight": torch.randn(8, 12)}, strict=False),
        lambda: setattr(adapter, "weight", nn.Parameter(torch.randn(8, 12), requires_grad=False)),
    ):
        change()
        gain, v, _ = reference(adapter, x)
        torch.testing.assert_close(adapter(x), (gain * (x.double() @ v.T) + adapter.base.bias.double()).float())
    with torch.no_grad():
        adapter.base.weight.mul_(3)
    gain, v, _ = reference(adapter, x)
    torch.testing.assert_close(adapter(x), (gain * (x.double() @ v.T) + adapter.base.bias.double()).float())
    assert len(measured) == 3


def test_weights_loaded_after_attaching_are_the_start():
    network, source, x = nn.Sequential(nn.Linear(12, 8)), nn.Sequential(nn.Linear(12, 8)), torch.randn(5, 12)
    la.attach(network, la.DoRA(rank=2, targets=["0"]))
    network.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(network(x), source(x))


def test_magnitudes_do_not_decay():
    adapter = layer()
    assert [id(p) for p in adapter.undecayed_parameters()] == [id(adapter.magnitude)]


def test_dropout_acts_on_the_update_alone():
    adapter = layer(dropout=0.5)
    x = torch.ones(4000, 12)
    plain = adapter.eval()(x)
    torch.testing.assert_close(adapter.train()(x).mean(0), plain.mean(0), rtol=0.1, atol=0.3)
    with torch.no_grad():
        adapter.lora_B.zero_()
    torch.testing.assert_close(adapter.train()(x), adapter.eval()(x))


def test_statistics():
    adapter = layer()
    with torch.no_grad():
        adapter.magnitude.copy_(1.5 * adapter.base.weight.norm(dim=1))
    assert adapter.statistics()["magnitude_change"] == pytest.approx(0.5, rel=1e-5)
    update = adapter.scaling * adapter.product(torch.float64)
    assert adapter.statistics()["relative_norm"] == pytest.approx(
        (update.norm() / adapter.base.weight.norm()).item(), rel=1e-5
    )


def test_nora_plus_plus_takes_dora_and_nothing_else():
    method = la.NoRAPlusPlus(nora=la.NoRA(groups=4), lora=la.DoRA(rank=2))
    assert method.parts()[1] == la.DoRA(rank=2)
    with pytest.raises(la.AdapterError, match="made of a NoRA and a LoRA or DoRA, not NoRA and LoRAN"):
        la.NoRAPlusPlus(lora=la.LoRAN())


def test_in_use_the_norm_is_formed_once_and_again_after_a_writing(monkeypatch):
    adapter, x = layer().eval(), torch.randn(5, 12)
    formed, original = [], DoRAAdapter.weight_norm
    monkeypatch.setattr(DoRAAdapter, "weight_norm", lambda self: (formed.append(1), original(self))[1])
    with torch.inference_mode():
        first = adapter(x)
        assert torch.equal(adapter(x), first)
    assert len(formed) == 1
    adapter.train()
    adapter(x).sum().backward()
    assert len(formed) == 2
    adapter.eval()
    with torch.no_grad():
        assert torch.equal(adapter(x), first)
        for tensor in (adapter.lora_A, adapter.lora_B, adapter.magnitude, adapter.base.weight):
            tensor.mul_(1.5)
            y = adapter(x)
            expected, v, _ = (*reference(adapter, x)[:2], None)
            want = (expected[:, None] * v) @ x.double().T + adapter.base.bias.double()[:, None]
            torch.testing.assert_close(y.double(), want.T, rtol=1e-5, atol=1e-5)
    assert len(formed) == 7
