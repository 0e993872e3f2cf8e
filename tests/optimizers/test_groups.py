"""Parameter groups: what trains, at which rate, and what decays."""

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.optimizers.groups import parameter_groups


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 3))


def attached():
    model = mlp()
    la.attach(model, la.NoRAPlusPlus(nora=la.NoRA(groups=2), lora=la.LoRA(rank=2, targets=["0", "2"])), train=["3"])
    return model


def test_groups_hold_every_trainable_parameter_once():
    model = attached()
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1, lr_scale={"nora": 2.0, "head": 0.5})
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {g["name"]: g["lr"] for g in groups}
    assert rates == pytest.approx({"nora": 2e-2, "lora": 1e-2, "head": 5e-3})
    decay = {g["name"]: g["weight_decay"] for g in groups}
    assert decay == {"nora": 0.0, "lora": 0.1, "head": 0.1}
    torch.optim.AdamW(groups)


def test_names_differ_where_a_method_has_parameters_of_both_kinds():
    model = mlp()
    la.attach(model, [la.DoRA(rank=2, targets=["0"]), la.LoRAN(rank=2, function="sine", targets=["2"])], train=["3"])
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1, lr_scale={"dora": 2.0})
    found = {g["name"]: (g["lr"], g["weight_decay"], len(g["params"])) for g in groups}
    assert found == {
        "dora": (2e-2, 0.1, 2),
        "dora/no_decay": (2e-2, 0.0, 1),
        "loran": (1e-2, 0.1, 2),
        "loran/no_decay": (1e-2, 0.0, 1),
        "head": (1e-2, 0.1, 2),
    }


def test_a_rational_activation_that_trains_does_not_decay():
    model = attached()
    la.merge(model)
    model.requires_grad_(True)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
    undecayed = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    rational = {id(p) for m in model.modules() if isinstance(m, la.RationalActivation) for p in m.parameters()}
    assert undecayed == rational


def test_bad_requests_are_named():
    with pytest.raises(la.AdapterError, match=r"lr_scale names 'lroa'; the trainable groups are head, lora, nora"):
        parameter_groups(attached(), lr=1.0, lr_scale={"lroa": 1.0})
    with pytest.raises(la.AdapterError, match="nothing trains"):
        parameter_groups(mlp().requires_grad_(False), lr=1.0)
