"""Several threads call one model at a time, as servers do."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lit_adapters as la
from tests.methods.test_experts import ThreeExperts


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = ThreeExperts()

    def forward(self, x):
        return self.experts(x)


def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


CASES = {
    "bitfit": (plain, la.BitFit()),
    "experts": (Experts, la.LoRA(rank=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_all_get_the_outputs_of_one_and_frozen_values_stay(name):
    build, methods = CASES[name]
    torch.manual_seed(0)
    model = build()
    la.attach(model, methods)
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(torch.randn_like(parameter))
    model.eval()
    x = torch.randn(5, 8)
    frozen = {n: (p, p.detach().clone()) for n, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad(), ThreadPoolExecutor(3) as pool:
        expected = model(x)

        def wrong(_):
            with torch.no_grad():
                return sum(not torch.equal(model(x), expected) for _ in range(400))

        assert sum(pool.map(wrong, range(3))) == 0
    now = dict(model.named_parameters())
    assert all(now[n] is p and torch.equal(p, values) for n, (p, values) in frozen.items())
