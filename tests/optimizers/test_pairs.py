"""Pairs are found by their adapters, and groups that are no pairs are refused."""

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.optimizers import LoFT, LoRAPlus, LoRARITE, low_rank_pairs, parameter_groups
from tests.lightning.tiny_task import Net


def attached(*methods, train=("head",)):
    model = Net()
    la.attach(model, methods, train=list(train))
    return model


def test_pairs_are_whole_and_all_else_is_in_other_groups():
    model = attached(la.DoRA(rank=2, alpha=6.0, targets=["fc1"]), la.LoRA(rank=3, targets=["fc2"]), la.NoRA(rank=2))
    pairs = low_rank_pairs(model)
    names = [f"blocks.{i}.{fc}" for i in (0, 1) for fc in ("fc1", "fc2")]
    assert [(p.name, p.scale) for p in pairs] == list(zip(names, [3.0, 16 / 3] * 2, strict=True))
    for pair in pairs:
        adapter = model.get_submodule(pair.name)
        assert pair.a is adapter.lora_A
        assert pair.b is adapter.lora_B
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1, lr_scale={"lora": 2.0}, pairs=True)
    found = {g["name"]: (g["lr"], g["weight_decay"], len(g["params"]), g.get("scales")) for g in groups}
    assert found == {
        "dora/pairs": (1e-2, 0.1, 4, [3.0, 3.0]),
        "lora/pairs": (2e-2, 0.1, 4, [16 / 3, 16 / 3]),
        "dora": (1e-2, 0.0, 2, None),
        "nora": (1e-2, 0.0, 8, None),
        "head": (1e-2, 0.1, 2, None),
    }
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_frozen_factor_stands_beside_the_one_that_trains():
    model = attached(la.LoRA(rank=2, targets=["fc1"]))
    adapter = model.blocks[0].fc1
    adapter.lora_A.requires_grad_(False)
    model.blocks[1].fc1.requires_grad_(False)
    (group, _) = parameter_groups(model, lr=1.0, pairs=True)
    assert [id(p) for p in group["params"]] == [id(adapter.lora_A), id(adapter.lora_B)]


def test_an_activation_between_a_and_b_is_refused_where_the_product_moves():
    groups = parameter_groups(attached(la.AFALoRA(rank=2, targets=["fc1"])), lr=1e-2, pairs=True)
    LoRAPlus([dict(g) for g in groups])
    for kind in (LoRARITE, LoFT):
        with pytest.raises(la.AdapterError, match=r"moves the product B A, and 'blocks.0.fc1' \(AFA-LoRA\)"):
            kind([dict(g) for g in groups])


def test_a_pair_is_not_torn_apart():
    model = attached(la.LoRA(rank=2, targets=["fc1"]))
    with pytest.raises(la.AdapterError, match=r"for A and B of 'blocks\.0\.fc1'"):
        parameter_groups(model, lr=1.0, lr_scale={".*lora_B": 16.0}, pairs=True)


@pytest.mark.parametrize("kind", [LoRAPlus, LoRARITE, LoFT])
def test_what_is_no_pair_is_refused(kind):
    a, b = (nn.Parameter(torch.ones(size)) for size in [(2, 5), (4, 2)])
    with pytest.raises(la.AdapterError, match="found no pair"):
        kind([a, b])
    with pytest.raises(la.AdapterError, match=r"sizes \(4, 2\) and \(2, 5\)"):
        kind([{"params": [b, a], "pairs": True}])
    with pytest.raises(la.AdapterError, match="3 parameters"):
        kind([{"params": [a, b, nn.Parameter(torch.ones(2, 2))], "pairs": True}])
    for settings in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": float("nan")}, {"eps": -1.0}):
        with pytest.raises(la.AdapterError, match=next(iter(settings))):
            kind([{"params": [a, b], "pairs": True}], **settings)


def test_sharded_factors_are_refused_where_the_product_moves():
    a, b = (nn.Parameter(torch.ones(size)) for size in [(2, 5), (4, 2)])
    a.full_tensor = lambda: a  # as a DTensor has
    LoRAPlus([{"params": [a, b], "pairs": True}])
    for kind in (LoRARITE, LoFT):
        with pytest.raises(la.AdapterError, match=f"{kind.__name__} needs whole matrices"):
            kind([{"params": [a, b], "pairs": True}])
