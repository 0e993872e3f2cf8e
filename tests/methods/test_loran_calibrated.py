"""LoRAN with frequency="calibrate": f acts at the size that B A has now, in training, files and merging."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.checkpoint import checkpoint

import lit_adapters as la
from tests.lightning.tiny_task import Task, assert_equal_bits, fit, state
from tests.methods.loran_layer import layer
from tests.methods.test_loran import FORMULAS

SETTINGS = {"amplitude": 0.1, "frequency": "calibrate"}


def frequency(adapter) -> torch.Tensor:
    """1 / rms(B A) by definition."""
    return 1 / (adapter.lora_B.double() @ adapter.lora_A.double()).square().mean().sqrt().detach()


@pytest.mark.parametrize("function", FORMULAS)
def test_value_and_gradient_against_float64(function):
    adapter = layer(function=function, **SETTINGS)
    w, f = frequency(adapter), FORMULAS[function]
    assert adapter.current_frequency(torch.float64).item() == pytest.approx(w.item(), rel=1e-12)
    x, grad = torch.randn(5, 12, requires_grad=True), torch.randn(5, 8)
    wide = [t.detach().double().requires_grad_() for t in (x, adapter.lora_A, adapter.lora_B)]
    # w is a constant here, and 1 is what the formula has in place of a frequency.
    update = (f(w * (wide[2] @ wide[1]), 1.0) - f(torch.zeros(()).double(), 1.0)) / w
    exact = wide[0] @ (adapter.base.weight.double() + adapter.scaling * update).T + adapter.base.bias.double()
    expected = torch.autograd.grad(exact, wide, grad.double())
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B], grad)
    for got, want in zip((y, *actual), (exact, *expected), strict=True):
        assert (got - want).abs().max() <= 5e-6 * want.abs().max()


def test_in_words_of_the_formulas():
    for function, formula in (
        ("sine", lambda z, w: torch.sin(w * z) / w),
        ("sinter", lambda z, w: z + 0.1 * z * torch.sin(w * z)),
    ):
        adapter = layer(function=function, **SETTINGS)
        expected = adapter.scaling * formula(adapter.product(torch.float64), frequency(adapter))
        torch.testing.assert_close(adapter.delta_weight(torch.float64), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_b_zero_it_is_the_pretrained_layer_and_trains_as_lora_in_weight_space(dtype):
    gradients = []
    for function in ("identity", "sine", "sinter"):
        adapter = layer(function=function, alpha=0.75, **SETTINGS).to(dtype)
        torch.manual_seed(0)
        x = torch.randn(5, 12).to(dtype)
        with torch.no_grad():
            adapter.lora_A.normal_()
            adapter.lora_B.zero_()
            adapter.base.weight.normal_()
            adapter.base.bias.zero_()
        assert torch.equal(adapter(x), adapter.base(x))
        (gradient,) = torch.autograd.grad(adapter(x).float().square().sum(), adapter.lora_B)
        gradients.append(gradient)
        assert gradient.all()
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=0)


def test_the_frequency_follows_every_step():
    adapter, x = layer(function="sine", **SETTINGS), torch.randn(5, 12)
    optimizer = torch.optim.SGD(adapter.adapter_parameters().values(), 0.1)
    for _ in range(3):
        adapter(x).square().sum().backward()
        optimizer.step(), optimizer.zero_grad()
        assert adapter.statistics()["frequency"] == pytest.approx(frequency(adapter).item(), rel=1e-9)
        assert adapter.statistics()["phase"] == pytest.approx(1.0, rel=1e-9)
    # f_1(w z) / w grows in proportion to z: the frequency is that of this very forward.
    adapter.eval()
    with torch.no_grad():
        adapter(x)
        before, size = adapter(x) - adapter.base(x), adapter.delta_weight()
        adapter.lora_B.mul_(4)
        torch.testing.assert_close(adapter(x) - adapter.base(x), 4 * before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapter.delta_weight(), 4 * size)


def test_nothing_but_a_and_b_is_trained_or_kept(tmp_path):
    network, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(5, 12)
    base = copy.deepcopy(network)
    la.attach(network, la.LoRAN(rank=3, function="sine", **SETTINGS))
    with torch.no_grad():
        network[0].lora_B.normal_()
    assert set(network[0].adapter_tensors()) == {"lora_A", "lora_B"}
    assert network[0].undecayed_parameters() == []
    y, update = network(x), network[0].delta_weight()
    la.save_adapters(network, tmp_path)
    loaded = copy.deepcopy(base)
    la.load_adapters(loaded, tmp_path)
    assert torch.equal(loaded(x), y)
    la.merge(loaded)
    assert torch.equal(loaded[0].weight, base[0].weight + update)


def test_recomputing_changes_nothing():
    adapter, x = layer(function="sine", **SETTINGS), torch.randn(5, 12, requires_grad=True)
    variables = [x, adapter.lora_A, adapter.lora_B]
    expected = torch.autograd.grad(adapter(x).square().sum(), variables)
    again = torch.autograd.grad(checkpoint(adapter, x, use_reentrant=False).square().sum(), variables)
    assert all(torch.equal(got, want) for got, want in zip(again, expected, strict=True))


def test_a_resumed_run_ends_as_one_that_was_not_broken_off(tmp_path):
    method = la.LoRAN(rank=2, function="sine", start_size=0.01, **SETTINGS)
    whole, resumed = Task([method]), Task([method])
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path, whole, la.AdapterCallback(), saving)
    fit(tmp_path, resumed, ckpt=tmp_path / "step=3.ckpt")
    assert_equal_bits(state(whole), state(resumed))


@pytest.mark.slow
@pytest.mark.parametrize("start_size", [0.0, 0.01])
def test_compiling_and_exporting_follow_the_frequency(start_size):
    adapter, x = layer(function="sine", start_size=start_size, **SETTINGS), torch.randn(5, 12)
    compiled = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        variables = [adapter.lora_A, adapter.lora_B]
        expected = torch.autograd.grad(adapter(x).square().sum(), variables)
        actual = torch.autograd.grad(compiled(x).square().sum(), variables)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            adapter.lora_B.mul_(3)
    exported = torch.export.export(adapter.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), adapter(x))


def test_the_frequency_is_a_number_or_calibrate():
    with pytest.raises(la.AdapterError, match="frequency 'calibrated' must be a finite number or 'calibrate'"):
        la.LoRAN(frequency="calibrated")
