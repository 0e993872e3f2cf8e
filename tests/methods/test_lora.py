"""LoRA: values and gradients in float64, scaling, dropout, ranks, statistics."""

import copy
import math

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.methods.lora import LoRAAdapter


def layer(**settings) -> LoRAAdapter:
    network = nn.Sequential(nn.Linear(12, 8))
    la.attach(network, la.LoRA(**{"rank": 3, "alpha": 6.0} | settings))
    ((_, adapter),) = la.adapters(network)
    with torch.no_grad():
        adapter.lora_B.normal_()
    return adapter


@pytest.mark.parametrize("rslora", [False, True])
def test_value_and_gradient_against_float64(rslora):
    adapter = layer(rslora=rslora)
    scale = 6 / math.sqrt(3) if rslora else 6 / 3
    x, grad = torch.randn(4, 5, 12, requires_grad=True), torch.randn(4, 5, 8)
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B], grad)

    exact = [t.detach().double().requires_grad_() for t in (x, adapter.lora_A, adapter.lora_B)]
    weight = adapter.weight.double() + scale * exact[2] @ exact[1]
    exact_y = exact[0] @ weight.T + adapter.bias.double()
    expected = torch.autograd.grad(exact_y, exact, grad.double())
    for got, want in zip((y, *actual), (exact_y, *expected), strict=True):
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()
    torch.testing.assert_close(adapter.delta_weight(), (scale * exact[2] @ exact[1]).float())


def test_double_precision_is_kept():
    adapter = layer().double()
    x = torch.randn(5, 12, dtype=torch.float64)
    weight = adapter.weight + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()
    assert (adapter(x) - (x @ weight.T + adapter.bias)).abs().max() < 1e-14
    before = adapter(x)
    adapter.merge()
    assert (adapter(x) - before).abs().max() < 1e-14


def test_initialisation():
    network = nn.Sequential(nn.Linear(12, 8))
    la.attach(network, la.LoRA(rank=3))
    assert not network[0].lora_B.any()
    assert 0.5 / math.sqrt(12) < network[0].lora_A.abs().max() <= 1 / math.sqrt(12)


def test_dropout_acts_on_the_branch_alone_and_only_in_training():
    adapter = layer(dropout=0.5)
    x = torch.ones(2000, 12)
    base = adapter.base(x)
    plain = adapter.eval()(x)
    assert torch.equal(plain, adapter(x))
    trained = adapter.train()(x)
    assert not torch.equal(trained, plain)
    torch.testing.assert_close((trained - base).mean(0), (plain - base).mean(0), rtol=0.1, atol=0.2)
    with torch.no_grad():
        adapter.lora_B.zero_()
    assert torch.equal(adapter(x), base)


def test_rank_pattern_gives_layers_their_own_rank():
    network = nn.ModuleDict({"query": nn.Linear(12, 8), "value": nn.Linear(12, 8), "out": nn.Linear(8, 3)})
    la.attach(network, la.LoRA(rank=4, alpha=8.0, rank_pattern={"query": 2, "o.*": 3}))
    assert {n: (a.rank, a.scaling) for n, a in la.adapters(network)} == {
        "query": (2, 4.0),
        "value": (4, 2.0),
        "out": (3, 8 / 3),
    }


@pytest.mark.parametrize("settings", [{"rank": 9}, {"rank": 4, "rank_pattern": {"1": 6}}])
def test_rank_above_the_size_of_a_layer(settings):
    network = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5))
    with pytest.raises(la.AdapterError, match=r"rank \d exceeds the size of '[01]' \(. x ..?\); lower rank"):
        la.attach(network, la.LoRA(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2.5}, "rank 2.5 must be a whole number"),
        ({"rank": "8"}, "rank '8' must be a whole number"),
        ({"alpha": float("nan")}, "alpha nan must be a finite number other than 0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"dropout": 1.0}, r"dropout 1.0 must lie in \[0, 1\)"),
        ({"dropout": "0.1"}, "dropout '0.1'"),
        ({"rank_pattern": [4]}, r"rank_pattern \[4\] must map"),
        ({"rank_pattern": {"([": 2}}, "is not a regular expression"),
        ({"targets": None}, "targets None must be a keyword"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(la.AdapterError, match=message):
        la.LoRA(**settings)


def test_patterns_that_match_nothing():
    def network() -> nn.Module:
        return nn.ModuleDict({"query": nn.Linear(12, 8), "block": nn.ModuleDict({"value": nn.Linear(12, 8)})})

    with pytest.raises(la.TargetsNotFound, match="rank_pattern 'quer' matches none of its 2 layers, such as 'query'"):
        la.attach(network(), la.LoRA(rank=4, rank_pattern={"quer": 2}))
    with pytest.raises(la.TargetsNotFound, match=r"exclude 'qvery' matches no module.*Near misses: query"):
        la.attach(network(), la.LoRA(rank=4, exclude=["qvery"]))
    report = la.attach(network(), la.LoRA(rank=4, exclude=["block"]))
    assert [name for name, _, _ in report.adapters] == ["query"]


def test_sizes_can_be_asked_for():
    adapter = layer()
    assert (adapter.in_features, adapter.out_features) == (12, 8)


def test_a_parametrised_weight_is_refused():
    network = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(12, 8)), nn.Linear(8, 2))
    with pytest.raises(la.AdapterError, match="'0' is computed by a parametrisation"):
        la.attach(network, la.LoRA(rank=2))


def test_a_layer_whose_forward_a_library_has_replaced():
    """accelerate does, to bring a layer's weights from where they wait."""
    hooks = pytest.importorskip("accelerate.hooks")
    seen = []

    class Watch(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module))
            return args, kwargs

    network = nn.Sequential(nn.Linear(12, 8))
    hooks.add_hook_to_module(network[0], Watch())
    la.attach(network, la.LoRA(rank=3))
    with torch.no_grad():
        network[0].lora_B.normal_()
    x = torch.randn(5, 12)
    expected = x @ (network[0].weight + network[0].delta_weight()).T + network[0].bias
    torch.testing.assert_close(network(x), expected)
    assert seen == [nn.Linear]


@pytest.mark.parametrize("method", [la.LoRA(rank=3), la.LoRAN(rank=3)])
def test_autocast_leaves_float64_alone(method):
    network = nn.Sequential(nn.Linear(12, 8)).double()
    la.attach(network, method)
    with torch.no_grad():
        network[0].lora_B.normal_()
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), expected)


def test_relative_norm_is_that_of_the_formed_update():
    adapter = layer()
    expected = adapter.delta_weight().norm() / adapter.weight.norm()
    assert adapter.statistics()["relative_norm"] == pytest.approx(expected.item(), rel=1e-6)
    adapter.merge()
    assert adapter.statistics()["relative_norm"] == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        adapter.unmerge()
        adapter.weight.zero_()
        adapter.lora_B.zero_()
    assert adapter.statistics()["relative_norm"] == 0


def test_under_autocast_a_frozen_weight_is_cast_once_until_it_changes():
    adapter, x = layer(), torch.randn(5, 12)

    def cast() -> torch.Tensor | None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = adapter(x)
            expected = nn.functional.linear(x, adapter.weight, adapter.bias)
            expected = expected + 2.0 * (x.bfloat16() @ adapter.lora_A.T) @ adapter.lora_B.T
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        return adapter._cast_weight.value

    first = cast()
    assert torch.equal(first, adapter.weight.bfloat16())
    with torch.inference_mode():
        assert cast() is first
    assert cast() is first
    assert not first.is_inference()
    with torch.no_grad():
        adapter.weight.mul_(-3)
    assert cast() is not first
    second = cast()
    adapter.load_state_dict(adapter.state_dict())
    assert cast() is not second
    third = cast()
    adapter._parameters["weight"] = nn.Parameter(adapter.weight.detach() + 1, requires_grad=False)
    assert cast() is not third
    assert copy.deepcopy(adapter)._cast_weight.value is None
    adapter.double().float()
    assert adapter._cast_weight.value is None
    adapter(x)  # without autocast there is nothing to cast
    assert adapter._cast_weight.value is None
    adapter.sharded = True  # whole only while the layer runs
    assert cast() is None
