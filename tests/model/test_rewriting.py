"""What rewrites layers and knows nothing of adapters: fused norms, reparametrised blocks, pruning, parametrisations."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune

import lit_adapters as la

METHODS = [la.LoRA(rank=2, targets=["0"]), la.DoRA(rank=2, targets=["0"]), la.LoRAN(rank=2, targets=["0"]), la.BitFit()]


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("build", "fuse"), [(convolutions, fusion.fuse_conv_bn_eval), (linears, fusion.fuse_linear_bn_eval)]
)
def test_a_norm_is_fused_after_merging_alone(build, fuse, method):
    model = build()
    la.attach(model, method)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    with pytest.raises(la.AdapterError, match=r"'weight' of '0' cannot be fused.*merge\(model\) first"):
        fuse(model[0], model[1])
    x = torch.randn(2, 4, 5, 5) if build is convolutions else torch.randn(2, 8)
    y = model[1](model[0](x))
    la.merge(model)
    torch.testing.assert_close(fuse(model[0], model[1])(x), y)


REWRITERS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned weight": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


@pytest.mark.filterwarnings("ignore")  # two are deprecated
@pytest.mark.parametrize("name", REWRITERS)
def test_pruning_and_parametrising_after_attach(name):
    for method in METHODS:
        model = linears()
        la.attach(model, method)
        with pytest.raises(la.AdapterError, match=r"of '0' cannot be fused, pruned or parametrised"):
            REWRITERS[name](model[0])


def test_blocks_are_reparametrised_after_merging_alone():
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0", num_classes=3).eval()
    block = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and "stages" in n)
    la.attach(model, la.LoRA(rank=2, targets=[block]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    x = torch.randn(1, 3, 32, 32)
    y = model(x)
    with pytest.raises(la.AdapterError, match="would drop the adapters of this block"):
        timm.utils.reparameterize_model(model)
    torch.testing.assert_close(model(x), y)
    la.merge(model)
    torch.testing.assert_close(timm.utils.reparameterize_model(model)(x), y, rtol=1e-3, atol=1e-4)


def test_a_method_called_fuse_that_takes_part_in_a_forward():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def fuse(self, x, y):
            return x + self.fc(y)

        def forward(self, x):
            return self.fuse(x, x)

    x, model = torch.randn(2, 8), Block()
    y = model(x)
    la.attach(model, la.LoRA(rank=2))
    assert torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    la.detach(model)
    assert "fuse" not in vars(model)
