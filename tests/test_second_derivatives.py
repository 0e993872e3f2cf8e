"""Second derivatives through every method: as of the plain formulas, which torch.func takes."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

import lit_adapters as la
from tests.matrix import ALL


def network(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4))
    la.attach(model, method)
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_of_a_penalty_on_gradients(method, training):
    """d/dp of |dL/dx|^2 + |dL/dp|^2 for all trained p, and d/dx of it."""
    model = network(ALL[method]).train(training)
    la.set_progress(model, 0.1)
    x = torch.randn(6, 12)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(values, x):
        return functional_call(model, values, (x,)).square().sum()

    def penalty(values, x):
        by_values, by_x = grad(loss, argnums=(0, 1))(values, x)
        return by_x.square().sum() + sum(g.square().sum() for g in by_values.values())

    expected, expected_x = grad(penalty, argnums=(0, 1))({n: p.detach() for n, p in parameters.items()}, x)
    given = x.clone().requires_grad_(True)
    sources = [given, *parameters.values()]
    first = torch.autograd.grad(model(given).square().sum(), sources, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), sources, allow_unused=True)
    for name, found in zip(["x", *parameters], second, strict=True):
        wanted = expected_x if name == "x" else expected[name]
        found = torch.zeros_like(wanted) if found is None else found
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-4 * wanted.abs().max().item() + 1e-6)
    assert second[0].abs().sum() > 0
