"""Adapters around layers that have hooks, a replaced `forward` or a computed weight."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.testing import assert_close

import lit_adapters as la

METHODS = {
    "lora": la.LoRA(rank=2),
    "dora": la.DoRA(rank=2),
    "loran": la.LoRAN(rank=2),
    "afa": la.AFALoRA(rank=2),
    "vera": la.VeRA(rank=4),
    "nora": la.NoRA(groups=4, base="anchored"),
    "bitfit": la.BitFit(),
}
X = torch.linspace(-2, 2, 32).view(4, 8)


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def output_hooks(model):
    for module in model:
        module.register_forward_hook(lambda module, args, y: 2 * y + 1)


def output_hooks_with_kwargs(model):
    for module in model:
        module.register_forward_hook(lambda module, args, kwargs, y: 2 * y + 1, with_kwargs=True)


def input_hooks(model):
    for module in model:
        module.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def gradient_hooks(model):
    for module in model:
        module.register_full_backward_hook(lambda module, given, taken: tuple(g if g is None else 2 * g for g in given))


def own_forwards(model):
    for module in (model[0], model[2]):
        module.forward = logged(module.forward)


def logged(forward: Callable):
    def logged_forward(x):
        return forward(x)

    return logged_forward


def trained(model):
    for parameter in (p for _, a in la.adapters(model) for p in a.adapter_parameters().values()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    la.set_progress(model, 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [output_hooks, output_hooks_with_kwargs, input_hooks, gradient_hooks, own_forwards])
def test_hooks_act_as_before_on_the_adapted_layer_and_on_the_merged_one(change, method):
    model = network()
    change(model)
    x = X.clone().requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    la.attach(model, METHODS[method])
    assert_close(model(x), y)
    assert_close(torch.autograd.grad(model(x).sum(), x)[0], gradient)
    trained(model)
    adapted = model(X)
    assert not torch.allclose(adapted, y, atol=1e-3)
    la.merge(model, unload=False)
    assert_close(model(X), adapted)
    if method != "nora":
        la.unmerge(model)
    la.merge(model)
    assert_close(model(X), adapted)


class Doubling(nn.Linear):
    # Up to torch 2.6 the compiler skips a bare nn.Linear.
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize("wrapped", ["accelerate", "compiled", "own"])
def test_biases_reach_a_forward_that_is_bound_to_the_layer(wrapped):
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []
    layer = Doubling(8, 8)
    if wrapped == "accelerate":
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu"))
    elif wrapped == "compiled":
        layer.compile(backend=lambda graph, inputs: calls.append(1) or graph.forward)
    else:
        layer.forward = partial(layer.forward)
    model = nn.Sequential(layer)
    before = model(X)
    la.attach(model, la.BitFit())
    with torch.no_grad():
        model[0].delta_bias.fill_(0.5)
    assert_close(model(X), before + 0.5)
    assert bool(calls) is (wrapped == "compiled")


def test_what_a_layer_notes_on_itself_stays():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    model = nn.Sequential(Counting(8, 8))
    la.attach(model, la.BitFit())
    for _ in range(3):
        model(X)
    assert model[0].base.calls == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_handle_removes_its_hook_before_and_after_detaching(method):
    model = network()
    plain = model(X)
    handles = [module.register_forward_hook(lambda module, args, y: y + 1) for module in model]
    hooked = model(X)
    la.attach(model, METHODS[method])
    la.detach(model)
    assert_close(model(X), hooked, rtol=0, atol=0)
    la.attach(model, METHODS[method])
    for handle in handles:
        handle.remove()
    assert_close(model(X), plain)
    la.detach(model)
    assert_close(model(X), plain, rtol=0, atol=0)


def test_layers_that_share_an_activation_share_its_hooks():
    activation = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 8), activation, nn.Linear(8, 8))
    seen = []
    activation.register_forward_hook(lambda module, args, y: seen.append(y))
    la.attach(model, la.NoRA(groups=4))
    copy.deepcopy(model)(X)
    model(X)
    assert len(seen) == 4
    la.verify(model, X)
    la.detach(model)
    model(X)
    assert len(seen) == 8


def doubled(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


NOT_PLAIN = {
    "forward": (doubled, "has a `forward` of its own, which does not do what a plain layer"),
    "parametrize": (
        lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
        "is computed by a parametrisation; remove that with parametrize.remove_parametrizations",
    ),
    "weight_norm": (weight_norm, "computed by a parametrisation"),
    "weight_norm, new": (parametrizations.weight_norm, "computed by a parametrisation"),
    "spectral_norm": (parametrizations.spectral_norm, "computed by a parametrisation"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "computed by a parametrisation"),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), "weight or bias of '2' is computed"),
}


@pytest.mark.parametrize("method", ["lora", "dora", "loran", "afa", "vera"])
@pytest.mark.parametrize("case", NOT_PLAIN)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_layer_that_does_more_than_multiply_by_a_parameter_is_refused_by_name(case, method):
    model = network().eval()
    change, message = NOT_PLAIN[case]
    change(model[2])
    plain = model(X)
    kind = type(METHODS[method])
    with pytest.raises(la.AdapterError, match=message):
        la.attach(model, kind(rank=2, targets=["2"]))
    assert_close(model(X), plain, rtol=0, atol=0)


def test_an_activation_with_a_forward_of_its_own_is_refused_by_name():
    model = network()
    doubled(model[1])
    with pytest.raises(la.AdapterError, match="the `forward` of '1' was replaced on this one GELU"):
        la.attach(model, la.NoRA(groups=4))


def test_merged_activations_of_an_encoder_layer_stay_unfused():
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation=nn.GELU(), batch_first=True).eval()
    x = X.view(2, 2, 8)
    la.attach(model, la.NoRA(groups=4, targets=["activation"]))
    trained(model)
    with torch.no_grad():
        adapted = model(x)
        la.merge(model)
        assert_close(model(x), adapted)
