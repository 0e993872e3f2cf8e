"""LoRA+ is AdamW with another rate for B."""

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.optimizers import LoRAPlus, parameter_groups
from tests.lightning.tiny_task import Net

STEPS = 4


def network():
    model = Net()
    methods = [la.DoRA(rank=2, targets=["fc1"]), la.AFALoRA(rank=2, targets=["fc2"]), la.NoRA(groups=4, rank=2)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        la.attach(model, methods, train=["head"])
    return model


def train(model, optimizer):
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(12) % 3).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_it_is_adamw_with_a_rate_of_its_own_for_every_b(ratio):
    model, plain = network(), network()
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    groups = parameter_groups(model, **settings, lr_scale={"head": 2.0}, pairs=True)
    got = train(model, LoRAPlus(groups, lr=1e-2, ratio=ratio))
    by_hand = []
    for group in parameter_groups(plain, **settings, lr_scale={"head": 2.0}):
        for parameter in group["params"]:
            is_b = any(parameter is m.lora_B for m in plain.modules() if hasattr(m, "lora_B"))
            rate = group["lr"] * (ratio if is_b else 1.0)
            by_hand.append({"params": [parameter], "lr": rate, "weight_decay": group["weight_decay"]})
    want = train(plain, torch.optim.AdamW(by_hand, lr=1.0))
    assert got.keys() == want.keys()
    assert [name for name in got if not torch.equal(got[name], want[name])] == []


def test_a_ratio_below_zero_is_refused():
    with pytest.raises(la.AdapterError, match="ratio -1"):
        LoRAPlus(parameter_groups(network(), 1.0, pairs=True), ratio=-1)
