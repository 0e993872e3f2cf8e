"""Gradients of base weights that train beside their adapter, in layers that keep them in another layout."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lit_adapters as la

METHODS = [
    la.LoRA(rank=2, alpha=4.0),
    la.AFALoRA(rank=2, alpha=4.0),
    la.DoRA(rank=2, alpha=4.0),
    la.LoRAN(rank=2, alpha=4.0, amplitude=0.5, frequency=3.0),
    la.LoRAN(rank=2, alpha=4.0, function="relu", start_size=0.01),
    la.VeRA(rank=2),
    la.BitFit(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{getattr(method, 'function', '')}")
@pytest.mark.parametrize("width", [6, 4])
@pytest.mark.parametrize("layer", [Conv1D, nn.Linear])
def test_the_gradient_of_a_trained_base_weight_is_that_without_adapter(method, width, layer):
    """At the start an adapter changes nothing, so neither does it change the gradient (DoRA's norms are constants)."""
    torch.manual_seed(0)
    base = (Conv1D(width, 6) if layer is Conv1D else nn.Linear(6, width)).double()
    alone = copy.deepcopy(base)
    model = nn.Sequential(base)
    la.attach(model, method)
    weight = next(p for n, p in model.named_parameters() if n.endswith("weight") and p.shape == alone.weight.shape)
    weight.requires_grad_(True)
    x, cotangent = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, width, dtype=torch.float64)
    (model(x) * cotangent).sum().backward()
    (alone(x) * cotangent).sum().backward()
    torch.testing.assert_close(weight.grad, alone.weight.grad, rtol=1e-6, atol=1e-9)
