"""Every method inside a compiled model: one graph, equal values and gradients, no second compilation."""

import pytest
import torch

import lit_adapters as la
from tests.matrix import METHODS, MODELS, adapted, move


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("vit", "inductor"), ("llama", "aot_eager")])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_trains_alike(method, name, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = adapted(name, method)
    trainable = [p for p in network.parameters() if p.requires_grad]
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    for progress in (0.0, 0.1, 1.0):
        move(network)
        la.set_progress(network, progress)
        expected, actual = MODELS[name].run(network), MODELS[name].run(compiled)
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        gradients = [torch.autograd.grad(y.square().sum(), trainable) for y in (expected, actual)]
        for want, got in zip(*gradients, strict=True):
            # Compiled, AFA-LoRA's gradients on this network are 1.6e-4 from float64 at beta = 0.67; uncompiled, 1.2e-5.
            assert (got - want).abs().max() <= 3e-4 * want.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
