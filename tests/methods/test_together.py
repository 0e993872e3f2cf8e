"""Lists of methods: those that adapt different layers, and BitFit beside a method on the weight of the same layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.files.peft import check_expressible
from lit_adapters.files.saved import read_saved
from lit_adapters.learned.summary import summarise
from lit_adapters.optimizers import parameter_groups
from tests.matrix import MODELS, build, changed_tensors, linear, move

SHAPE = [la.NoRA(groups=4, base="anchored"), la.GroupAffine(groups=4)]
OTHER_WEIGHTS = [
    la.DoRA(rank=1),
    la.VeRA(rank=3),
    la.LoRAN(rank=1, function="identity"),
    la.AFALoRA(rank=1, activation="silu"),
]
LISTS = [
    *([la.BitFit(), shape] for shape in SHAPE),
    [la.LoRA(rank=1), la.GroupAffine(groups=4)],
    [la.LoRA(rank=1), la.BitFit()],
    *(pytest.param([weight, la.BitFit()], marks=pytest.mark.slow) for weight in OTHER_WEIGHTS),
    [la.BitFit(), la.LoRA(rank=1, targets=["fc1"]), la.GroupAffine(groups=4)],
]


def label(methods: list[la.Method]) -> str:
    return "+".join(method.name for method in methods)


@pytest.mark.parametrize("methods", LISTS, ids=label)
def test_a_list_works_like_a_method(methods, tmp_path):
    """Attach, train, disable, rates, save, load, copy, merge for good, detach."""
    model, head = MODELS["vit"], MODELS["vit"].head
    base = build("vit")
    expected, modules = model.run(base), dict(base.named_modules())
    network = copy.deepcopy(base)
    report = la.attach(network, copy.deepcopy(methods), train=[head])
    assert torch.equal(model.run(network), expected)
    sizes = {m.name: sum(n for _, kind, n in report.adapters if kind == m.name) for m in methods}
    assert all(sizes.values())

    groups = parameter_groups(network, 1e-2, 0.0, {method.name: float(i + 2) for i, method in enumerate(methods)})
    for i, method in enumerate(methods):
        mine = [g for g in groups if g["name"].split("/")[0] == method.name]
        assert {g["lr"] for g in mine} == {1e-2 * (i + 2)}
        assert sum(p.numel() for g in mine for p in g["params"]) == sizes[method.name]
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    for _ in range(2):
        optimizer = torch.optim.Adam(groups)
        optimizer.zero_grad()
        (model.run(network) - torch.linspace(-1, 1, 5)).square().mean().backward()
        optimizer.step()
    assert not [n for n, p in trained.items() if not p.grad.any()]

    linear(network)
    before = model.run(network)
    with la.disabled(network):
        same = {n: p for n, p in network.named_parameters() if n.startswith(head)}
        with torch.no_grad():
            plain = torch.func.functional_call(base, same, (model.inputs(),))
        assert torch.equal(model.run(network), plain)
    la.save_adapters(network, tmp_path)
    loaded = build("vit")
    la.load_adapters(loaded, tmp_path)
    assert not changed_tensors(network.state_dict(), loaded.state_dict())
    assert torch.equal(model.run(loaded), before)
    assert torch.equal(model.run(pickle.loads(pickle.dumps(network))), before)

    la.merge(network)
    assert (model.run(network) - before).abs().max() <= 3e-6 * before.abs().max()
    assert len(list(la.adapters(network))) == 0
    la.detach(loaded)
    assert dict(loaded.named_modules()).keys() == modules.keys()


@pytest.mark.parametrize("order", [1, -1])
def test_a_shared_layer_adds_both_changes(order, tmp_path):
    network = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Conv1d(5, 4, 1), nn.BatchNorm1d(4)).eval()
    x = torch.randn(5, 6)
    with torch.no_grad():
        network[3].running_mean.normal_()
    la.attach(network, [la.LoRA(rank=2, targets=["0", "2"]), la.BitFit()][::order])
    kinds = {name: adapter.method for name, adapter in la.adapters(network)}
    assert kinds == {"0": "lora", "2": "lora", "3": "bitfit"}
    move(network)

    def expected(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
        weight = module.base.weight.double().flatten(1) + module.delta_weight(torch.float64)
        bias = module.base.bias.double() + module.delta_bias.double()
        return torch.einsum("oi,bi...->bo...", weight, h) + bias.view(-1, *[1] * (h.dim() - 2))

    h = expected(network[0], x.double())
    torch.testing.assert_close(network[0](x).double(), h, rtol=1e-5, atol=1e-6)
    y = torch.randn(3, 5, 7)
    torch.testing.assert_close(network[2](y).double(), expected(network[2], y.double()), rtol=1e-5, atol=1e-6)

    change = network[0].delta_bias.detach().norm().item()
    assert network[0].statistics()["bias_change"] == pytest.approx(change)
    la.save_adapters(network, tmp_path)
    saved = read_saved(tmp_path)
    assert torch.equal(saved.layers["0"].tensors["delta_bias"], network[0].delta_bias)
    (row,) = [row for row in summarise(saved) if row.name == "0"]
    assert row.learned.note == f"bias moved by {change:.3g}"
    with pytest.raises(la.AdapterError, match="'0' has a bias of BitFit"):
        check_expressible("0", network[0])

    z = network[2](y)
    la.merge(network, unload=False)
    assert torch.allclose(network[2](y), z, atol=1e-6)
    la.unmerge(network)
    assert torch.equal(network[2](y), z)


def test_biases_that_are_added_merge_into_the_configuration():
    """LLaMA has none: the merged model saves them, as its configuration has switches for them."""
    model, network = MODELS["llama"], build("llama")
    la.attach(network, [la.LoRA(rank=1), la.BitFit(add_missing=True)])
    assert torch.equal(model.run(network), model.run(build("llama")))
    move(network)
    before = model.run(network)
    la.merge(network)
    assert network.config.attention_bias
    assert network.config.mlp_bias
    assert (model.run(network) - before).abs().max() <= 1e-5 * before.abs().max()


def test_other_methods_share_no_layer():
    network = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
    with pytest.raises(la.AdapterError, match="NoRA and GroupAffine both want '1'"):
        la.attach(network, [la.NoRA(groups=5), la.GroupAffine(groups=5)])
    with pytest.raises(la.AdapterError, match="LoRA and DoRA both want '0'"):
        la.attach(network, [la.LoRA(rank=1), la.BitFit(), la.DoRA(rank=1)])
    assert type(network[0]) is nn.Linear
