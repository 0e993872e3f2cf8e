"""When LoRAN keeps the weight it has formed, and what makes it forget."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from lit_adapters.methods.loran import LoRANAdapter
from lit_adapters.model.modes import evaluating
from tests.methods.loran_layer import layer


def counted(adapter: LoRANAdapter, monkeypatch) -> list[int]:
    """One entry for every weight formed outside the autograd path."""
    import lit_adapters.methods.loran as module

    built, original = [], module.merged_weight
    monkeypatch.setattr(module, "merged_weight", lambda *a: (built.append(1), original(*a))[1])
    return built


def test_eval_without_gradients_forms_the_weight_once(monkeypatch):
    adapter = layer().eval()
    built, x = counted(adapter, monkeypatch), torch.randn(5, 12)
    expected = adapter(x)
    assert not built  # a gradient may be wanted here
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(adapter(x), expected)
    assert len(built) == 1
    with torch.inference_mode():
        assert torch.equal(adapter(x), expected)
    assert len(built) == 1
    with torch.no_grad():
        adapter(x.double().float()), adapter(x)
    assert len(built) == 1


def test_training_keeps_nothing_unless_asked(monkeypatch):
    adapter = layer().train()
    built, x = counted(adapter, monkeypatch), torch.randn(5, 12)
    with torch.no_grad():
        adapter(x), adapter(x)
    adapter(x)
    assert not built
    assert adapter._formed_weight.value is None


@pytest.mark.parametrize(
    "event",
    [
        lambda a: a.train().eval(),
        lambda a: a.load_state_dict(a.state_dict()),
        lambda a: a.to(torch.float64).to(torch.float32),
        lambda a: torch.optim.SGD([a.lora_B], 0.1).step(),
        lambda a: torch.optim.AdamW([a.lora_B], 0.1, fused=True).step(),
        lambda a: pytest.importorskip("bitsandbytes").optim.AdamW8bit([a.lora_B], 0.1).step(),
        lambda a: setattr(a, "lora_A", nn.Parameter(a.lora_A.detach() * 2)),
        lambda a: [setattr(a, "training", mode) for mode in (True, False)],  # as Lightning does after a validation
    ],
    ids=["mode", "load", "cast", "step", "fused step", "step of bitsandbytes", "replace", "mode without train"],
)
def test_what_clears_the_kept_weight(event, monkeypatch):
    adapter = layer().eval()
    built, x = counted(adapter, monkeypatch), torch.randn(5, 12)
    with torch.no_grad():
        adapter(x), adapter(x)
    assert len(built) == 1
    adapter.lora_B.grad = torch.ones_like(adapter.lora_B)
    event(adapter)
    with torch.no_grad():
        y = adapter(x)
    assert len(built) == 2
    assert torch.equal(y, adapter(x))  # the path that keeps nothing


def test_a_look_in_eval_mode_leaves_nothing_behind():
    adapter = layer().train()
    with evaluating(adapter), torch.no_grad():
        assert not adapter.base.training
        adapter(torch.randn(5, 12))
        assert adapter._formed_weight.value is not None
    assert adapter._formed_weight.value is None
    assert adapter.base.training


def test_validation_in_inference_mode_does_not_break_the_next_step():
    adapter, x = layer(cache_weight=True), torch.randn(5, 12)
    adapter.eval()
    with torch.inference_mode():
        adapter(x)
    assert not adapter._formed_weight.value.is_inference()
    # Even without a change of mode in between.
    adapter(x.requires_grad_()).sum().backward()
    adapter.train()(x).sum().backward()
    assert adapter.lora_B.grad.any()


def test_on_request_the_weight_is_kept_over_micro_batches(monkeypatch):
    adapter, plain = layer(cache_weight=True), layer()
    plain.load_state_dict(adapter.state_dict())
    built = counted(adapter, monkeypatch)
    optimizers = [torch.optim.SGD([a.lora_A, a.lora_B], 0.1) for a in (adapter, plain)]
    for step in range(2):
        for _ in range(3):
            x = torch.randn(5, 12, requires_grad=True)
            gradients = []
            for a in (adapter, plain):
                y = a(x)
                gradients.append(torch.autograd.grad(y.square().sum(), [x, a.lora_A, a.lora_B], retain_graph=True))
                y.square().sum().backward()
            torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
        assert len(built) == step + 1
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    torch.testing.assert_close(adapter.lora_A, plain.lora_A)


@pytest.mark.parametrize("kept", [True, False])
def test_second_derivatives_with_a_kept_weight(kept):
    adapter = layer(function="tanh", cache_weight=kept).double()
    x, trained = torch.randn(5, 12, dtype=torch.float64, requires_grad=True), [adapter.lora_A, adapter.lora_B]
    (slope,) = torch.autograd.grad(adapter(x).square().sum(), x, create_graph=True)
    actual = torch.autograd.grad(slope.square().sum(), trained)
    a, b = (t.detach().double().requires_grad_() for t in trained)
    y = F.linear(x, adapter.base.weight + adapter.scaling * torch.tanh(b @ a), adapter.base.bias)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    expected = torch.autograd.grad(slope.square().sum(), (a, b))
    for got, want in zip(actual, expected, strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_nothing_is_kept_of_tensors_whose_writings_are_not_counted():
    with torch.inference_mode():
        adapter, x = layer().eval(), torch.randn(5, 12)
        before = adapter(x)
        adapter.lora_B.normal_()
        assert adapter._formed_weight.value is None
        assert not torch.equal(adapter(x), before)


def test_nothing_is_kept_of_stand_ins():
    adapter = layer().eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        adapter(torch.randn(5, 12))
    assert adapter._formed_weight.value is None


def test_a_copy_does_not_carry_the_kept_weight():
    adapter = layer().eval()
    with torch.no_grad():
        adapter(torch.randn(2, 12))
    assert adapter._formed_weight.value is not None
    assert copy.deepcopy(adapter)._formed_weight.value is None
    assert pickle.loads(pickle.dumps(adapter))._formed_weight.value is None
    assert adapter._formed_weight.value is not None
