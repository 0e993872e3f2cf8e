"""Calls on few rows without gradients, as in generation: the formula, and nothing that was kept too long."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lit_adapters as la
from lit_adapters.methods.short_call import FEW_ROWS
from tests.matrix import move

METHODS = {
    "lora": la.LoRA(rank=4, alpha=6.0),
    "pissa": la.LoRA(rank=4, start="pissa"),
    "dora": la.DoRA(rank=4),
    "afa": la.AFALoRA(rank=4),
    "loran": la.LoRAN(rank=4),
    "loran-tanh": la.LoRAN(rank=4, function="tanh"),
}
every_method = pytest.mark.parametrize("name", METHODS)


def layer(name, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias)).to(dtype)
    la.attach(model, METHODS[name])
    move(model)
    la.set_progress(model, 1.0)
    return model.eval()


def by_formula(model, x):
    """The output with the weight that the adapter stands for, in float64."""
    adapter = model[0]
    weight = adapter.base.weight.detach().double() + adapter.delta_weight(torch.float64).detach()
    bias = adapter.base.bias
    return nn.functional.linear(x.double(), weight, None if bias is None else bias.detach().double())


def assert_right(model, x):
    tolerance = 2e-6 if x.dtype == torch.float32 else 2e-2
    with torch.no_grad():
        expected = by_formula(model, x)
        for _ in range(2):  # the call that keeps and the one that finds it kept
            assert (model(x).double() - expected).abs().max() <= tolerance * expected.abs().max()


@every_method
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (1, 1, 24), (FEW_ROWS, 24), (2, FEW_ROWS, 24)])
def test_the_formula(name, bias, dtype, shape):
    model = layer(name, bias, dtype)
    x = torch.randn(shape).to(dtype)
    assert_right(model, x)
    short = x.numel() <= FEW_ROWS * 24 and (name != "dora" or dtype == torch.float32)
    assert (model[0]._short_call is not None) == short


def write(model):
    with torch.no_grad():
        model[0].lora_B.add_(0.3)


def write_to_the_base(model):
    with torch.no_grad():
        model[0].base.weight.mul_(1.5)


def give_other_memory(model):
    model[0].lora_A.data = model[0].lora_A.data * 2


def replace_the_bias(model):
    model[0].bias = nn.Parameter(torch.ones(40), requires_grad=False)


def load(model):
    la.set_progress(model, 1.0)
    model.load_state_dict(
        {name: tensor * 1.1 for name, tensor in model.state_dict().items() if name != "0.beta"}, False
    )


def scale(model):
    model[0].scaling *= 2


CHANGES = [write, write_to_the_base, give_other_memory, replace_the_bias, load]


@every_method
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(name, change):
    model, x = layer(name), torch.randn(3, 24)
    assert_right(model, x)
    kept = model[0]._short_call
    change(model)
    assert_right(model, x)
    # LoRA's products read the written tensors themselves.
    reads_them = name in ("lora", "afa") and change in (write, write_to_the_base, give_other_memory)
    assert model[0]._short_call is not None
    assert (model[0]._short_call is kept) == reads_them


def test_another_scale_is_seen():
    model, x = layer("lora"), torch.randn(3, 24)
    assert_right(model, x)
    scale(model)
    assert_right(model, x)


@every_method
def test_what_is_disabled_merged_or_trained_takes_the_general_way(name):
    model, x = layer(name), torch.randn(3, 24)
    base = model[0].base_copy()
    with torch.no_grad():
        adapted = model(x)
        assert model[0]._short_call is not None
        with la.disabled(model):
            assert torch.equal(model(x), base(x))
        la.merge(model, unload=False)
        torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
        la.unmerge(model)
        model(x)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model[0].adapter_parameters().values() if p.requires_grad)


@every_method
def test_hooks_on_the_base_are_called(name):
    model, x, seen = layer(name), torch.randn(3, 24), []
    with torch.no_grad():
        model(x)
        expected = model(x)
        model[0].base.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert seen or name.startswith("loran")  # which multiplies by a weight of its own


@every_method
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_tensors(name, copied):
    model, x = layer(name), torch.randn(3, 24)
    assert_right(model, x)
    other = copied(model)
    assert other[0]._short_call is None
    write(other)
    assert_right(other, x)
    assert_right(model, x)


def test_an_activation_that_came_back():
    model, x = layer("afa"), torch.randn(3, 24)
    assert_right(model, x)
    linear = model(x)
    la.set_progress(model, 0.0)
    with torch.no_grad():
        assert not torch.allclose(model(x), linear, atol=1e-3)
        adapter = model[0]
        torch.testing.assert_close(model(x), adapter.base(x) + adapter.branch(x))


@every_method
def test_tensors_of_inference_mode_are_not_kept(name):
    with torch.inference_mode():
        model, x = layer(name), torch.randn(3, 24)
        assert_right(model, x)
        assert model[0]._short_call is None
        write(model)
        assert_right(model, x)


def test_autocast_takes_the_general_way():
    model, x = layer("lora"), torch.randn(3, 24)
    with torch.no_grad():
        model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_model_without_values(method):
    with torch.device("meta"), torch.no_grad():
        model = nn.Sequential(nn.Linear(24, 40))
        la.attach(model, method)
        for _ in range(2):
            assert model.eval()(torch.empty(3, 24)).shape == (3, 40)


@every_method
def test_inputs_of_other_forms(name):
    """Not contiguous, and without rows."""
    model = layer(name)
    assert_right(model, torch.randn(3, 24))
    assert_right(model, torch.randn(3, 2, 24).transpose(0, 1))
    with torch.no_grad():
        assert model(torch.empty(2, 0, 24)).shape == (2, 0, 40)


@every_method
def test_nothing_of_a_dispatch_mode_is_kept(name):
    model, x = layer(name, dtype=torch.bfloat16 if name == "lora" else torch.float32), torch.randn(3, 24)
    x = x.to(model[0].base.weight.dtype)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))
    assert_right(model, x)


@every_method
def test_a_bias_that_came_later(name):
    model, x = layer(name, bias=False), torch.randn(3, 24)
    assert_right(model, x)
    replace_the_bias(model)
    assert_right(model, x)


@every_method
def test_a_shallow_copy(name):
    model, x = layer(name), torch.randn(3, 24)
    assert_right(model, x)
    other = copy.copy(model[0])
    other.enabled = False
    with torch.no_grad():
        assert torch.equal(other(x), model[0].base_copy()(x))
