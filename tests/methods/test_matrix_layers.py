"""The kinds of layers that hold a matrix, parents that read weights without calling layers, and what is refused."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d, create_conv2d
from torch import nn
from transformers.pytorch_utils import Conv1D

import lit_adapters as la
from tests.matrix import move

LOW_RANK = {"lora": la.LoRA, "dora": la.DoRA, "afa": la.AFALoRA, "loran": la.LoRAN}
CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 8, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 8, (3, 5), padding="same", dilation=2), (2, 4, 9, 7)),
    "2d-reflect": (nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect", bias=False), (2, 4, 9, 9)),
    "3d": (nn.Conv3d(4, 8, 2), (2, 4, 5, 4, 3)),
    "patch": (nn.Conv2d(3, 16, 4, stride=4), (2, 3, 8, 8)),
}


def attached(base: nn.Module, method: str, **settings):
    network = nn.Sequential(copy.deepcopy(base))
    la.attach(network, LOW_RANK[method](**{"rank": 3, "alpha": 6.0, "targets": ["0"]} | settings))
    move(network)
    la.set_progress(network, 1.0)
    return network


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_does_what_its_adapted_weight_does(kind, method):
    base, shape = CONVOLUTIONS[kind]
    network, x = attached(base, method), torch.randn(shape)
    adapter = network[0]
    matrix = adapter.base.weight.double().flatten(1) + adapter.delta_weight(torch.float64)
    twin = copy.deepcopy(base).double()
    twin.weight = nn.Parameter(matrix.view(base.weight.shape))
    expected = twin(x.double())
    torch.testing.assert_close(network(x), expected.float(), rtol=1e-5, atol=1e-5)
    assert (network(x) - base(x)).abs().max() > 1e-3
    before = network(x)
    report = la.merge(network)
    assert type(network[0]) is type(base)
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-5)
    assert report.max_rel_error < 1e-6


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_transposed_linear_layer_of_gpt2(method):
    base = Conv1D(8, 12)
    network, x = attached(base, method), torch.randn(2, 5, 12)
    adapter = network[0]
    assert adapter.delta_weight().shape == (8, 12)
    expected = F.linear(x, base.weight.T + adapter.delta_weight(), base.bias)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    with la.disabled(network):
        assert torch.equal(network(x), base(x))
    la.merge(network)
    assert type(network[0]) is Conv1D
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_a_fused_projection_is_one_layer():
    network = timm.create_model("test_vit", img_size=32)
    report = la.attach(network, la.LoRA(rank=2, targets=["qkv"]))
    assert {n for _, _, n in report.adapters} == {2 * (64 + 3 * 64)}


# ---- parents that read the weight

SMALL = {
    "beit": ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 3}),
    "eva02": (
        "eva02_tiny_patch14_224",
        {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 3},
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1,), "num_heads": (2,), "num_classes": 3},
    ),
}


def small(name: str, **changes) -> nn.Module:
    kind, settings = SMALL[name]
    torch.manual_seed(0)
    network = timm.create_model(kind, pretrained=False, **settings | changes).eval()
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):  # SwinV2 starts with some at zero, which no gradient passes
            nn.init.ones_(module.weight)
    return network


def image(name: str) -> torch.Tensor:
    return torch.randn(2, 3, 28 if name == "eva02" else 32, 28 if name == "eva02" else 32)


@pytest.mark.parametrize("method", [la.LoRA(rank=2, start="eva"), la.NestedLoRA(rank=2, inner_rank=1)])
@pytest.mark.parametrize("name", SMALL)
def test_inputs_of_a_layer_that_is_never_called_cannot_be_measured(name, method):
    with pytest.raises(la.AdapterError, match="does not call it, so that the layer's inputs cannot be measured"):
        la.attach(small(name), replace(method, targets=["qkv"]))


@pytest.mark.parametrize("method", ["lora", "dora", "loran"])
@pytest.mark.parametrize("name", SMALL)
def test_a_weight_that_is_read_is_the_adapted_one(name, method):
    base, network, x = small(name), small(name), image(name)
    report = la.attach(network, LOW_RANK[method](rank=2, targets=["qkv"]))
    assert len(report.adapters) == 1
    assert torch.equal(network(x), base(x))
    la.verify(network, x)
    move(network)
    changed = network(x)
    changed.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.requires_grad)
    with la.disabled(network):
        assert torch.equal(network(x), base(x))
    ((layer, adapter),) = la.adapters(network)
    with torch.no_grad():
        base.get_submodule(layer).weight += adapter.delta_weight()
    torch.testing.assert_close(changed, base(x), rtol=1e-4, atol=1e-5)
    la.merge(network, unload=False)
    torch.testing.assert_close(network(x), changed, rtol=1e-4, atol=1e-5)
    la.unmerge(network)
    la.merge(network)
    torch.testing.assert_close(network(x), changed, rtol=1e-4, atol=1e-5)
    assert type(network.get_submodule(layer)) is nn.Linear


@pytest.mark.parametrize("name", SMALL)
def test_no_weight_does_what_an_activation_or_dropout_would(name):
    network, x = small(name), image(name)
    la.attach(network, la.AFALoRA(rank=2, activation="silu"))
    with pytest.raises(
        la.AdapterError, match=r"reads the weight of .*qkv' and does not call it, so that no activation"
    ):
        la.verify(network, x)
    la.set_progress(network, 1.0)
    la.verify(network, x)  # at the end it is a weight
    network = small(name)
    la.attach(network, la.LoRA(rank=2, dropout=0.1))
    with pytest.raises(la.AdapterError, match=r"so that dropout 0.1 cannot act; set dropout=0 or exclude="):
        network.train()(x)
    network = small(name)
    la.attach(network, la.AFALoRA(rank=2, exclude=["qkv"], activation="silu"))
    la.verify(network, x)


def test_code_that_reads_a_weight_in_some_cases_only():
    network = timm.create_model(
        "vit_small_patch16_dinov3", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3
    )
    la.attach(network, la.AFALoRA(rank=2, dropout=0.1))
    la.verify(network, torch.randn(2, 3, 32, 32))


def test_a_layer_of_which_only_the_dtype_is_read_is_called():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wo = nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wo(x.to(self.wo.weight.dtype))

    network = nn.Sequential(Careful())
    la.attach(network, la.LoRA(rank=2))
    assert not network[0].wo.read_as_weight
    assert network[0].wo.weight is network[0].wo.base.weight


# ---- what is refused


@pytest.mark.parametrize("method", ["lora", "dora", "afa"])
def test_a_grouped_convolution(method):
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4))
    with pytest.raises(la.AdapterError, match=r"'0' is a convolution in groups.*use LoRAN"):
        la.attach(network, LOW_RANK[method](rank=2, targets=["0"]))


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.MultiheadAttention(8, 2), "keeps q, k and v in one parameter"),
        (nn.Embedding(10, 8), "looks rows up"),
        (nn.Bilinear(8, 8, 8), "this is a Bilinear"),
        (nn.ConvTranspose2d(4, 8, 3), "this is a ConvTranspose2d"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_layers_that_hold_no_matrix(layer, message, method):
    with pytest.raises(la.AdapterError, match=rf"'0' is neither: {message}|'0' is neither: nn\..*{message}|{message}"):
        la.attach(nn.Sequential(layer), LOW_RANK[method](rank=2, targets=["0"]))


@pytest.mark.parametrize("method", LOW_RANK)
def test_layers_with_a_forward_of_their_own(method):
    same, standardised = create_conv2d(4, 8, 3, stride=2, padding="same"), StdConv2d(4, 8, 3)
    for layer in (same, standardised, Router(8, 4)):
        network = nn.Sequential(layer)
        with pytest.raises(
            la.AdapterError, match=f"'0' is a {type(layer).__name__}, which does not do what a plain layer"
        ):
            la.attach(network, LOW_RANK[method](rank=2, targets=["0"]))
    # By name they are refused, "all-linear" leaves them out.
    report = la.attach(nn.Sequential(nn.Linear(8, 8), Router(8, 4), Plain(8, 8)), LOW_RANK[method](rank=2))
    assert [name for name, _, _ in report.adapters] == ["0", "2"]


class Plain(nn.Linear):
    """A forward of its own that is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Router(nn.Linear):
    """As those of mixtures of experts."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(x)
        return logits, logits.topk(2).indices


def test_the_projection_of_an_attention_module():
    network = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert [n for n, _, _ in la.attach(network, la.LoRA(rank=2)).adapters] == ["fc"]
    la.detach(network)
    with pytest.raises(la.AdapterError, match=r"belongs to an nn.MultiheadAttention, which reads its weights"):
        la.attach(network, la.LoRA(rank=2, targets=["attn.out_proj"]))


def test_methods_in_one_list():
    network = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 8))
    methods = [
        la.NoRA(groups=2),
        la.LoRAN(rank=2, targets=["0"]),
        la.DoRA(rank=2, targets=["2"]),
        la.AFALoRA(rank=2, targets=["3"]),
    ]
    report = la.attach(network, methods)
    assert [m for _, m, _ in report.adapters] == ["loran", "nora", "dora", "afa"]
    with pytest.raises(la.AdapterError, match="LoRA and DoRA both want '0'"):
        la.attach(nn.Sequential(nn.Linear(8, 8)), [la.LoRA(rank=2), la.DoRA(rank=2)])
