"""Values that are kept while their tensors stay the same."""

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.ops.cache import Cache


def test_what_counts_as_a_change():
    tensor, cache, calls = nn.Parameter(torch.ones(3)), Cache(), []

    def value():
        return cache.get([tensor], lambda: calls.append(1) or tensor.sum().item())

    assert [value(), value(), len(calls)] == [3.0, 3.0, 1]
    with torch.no_grad():
        tensor.mul_(2)
    assert value() == 6.0
    tensor.data = torch.zeros(3)
    assert value() == 0.0


@pytest.mark.parametrize("method", [la.DoRA(rank=2), la.LoRAN(rank=2), la.NoRA(groups=2)])
def test_weights_that_are_exchanged_by_data(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    la.attach(model, method)
    x = torch.randn(4, 8)
    with torch.no_grad():
        model(x)
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data + 0.1  # as code that puts averages in the place of weights does
        assert torch.equal(model(x), model.train()(x))
