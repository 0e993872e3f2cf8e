"""Which dimension of an activation's input holds the channels, and when their number is known before any forward."""

import pytest
import torch
from timm.layers import BatchNormAct2d, GluMlp, LayerNorm2d, SwiGLU
from torch import nn

import lit_adapters as la
from lit_adapters.methods.channels import Layout, channel_layout
from tests.matrix import MODELS, build, move


def named(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


@pytest.mark.parametrize(
    ("parent", "attribute", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), "1", Layout(-1, 8)),
        (nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.GELU()), "2", Layout(-1, 8)),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), "1", Layout(-3, 8)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), "2", Layout(-3, 8)),
        (nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU()), "1", Layout(-3, 8)),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU()), "1", Layout(-2, 8)),
        (nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU()), "2", Layout(-4, 8)),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()), "2", Layout(1, 8)),
        # The count is unsure: flattened on the way, halved by a gate, or of layers in parallel.
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)), "1", Layout(-3, None)),
        (named(fc1=nn.Linear(4, 16), act=nn.SiLU(), fc2=nn.Linear(8, 4)), "act", Layout(-1, None)),
        (named(gate=nn.Linear(4, 8), up=nn.Linear(4, 8), down=nn.Linear(8, 4), act=nn.SiLU()), "act", Layout(-1, None)),
        (named(act=nn.SiLU(), fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 4)), "act", Layout(-1, None)),
        # ConvNeXt: the last layer before the activation decides.
        (named(dw=nn.Conv2d(4, 4, 3), norm=LayerNorm2d(4), pw=nn.Linear(4, 8), act=nn.GELU()), "act", Layout(-1, None)),
        (named(norm=LayerNorm2d(4), act=nn.GELU()), "act", Layout(-3, None)),
        (named(act=nn.GELU(), conv=nn.Conv2d(8, 8, 3), norm=nn.GroupNorm(2, 8)), "act", Layout(1, None)),
        (BatchNormAct2d(8), "act", Layout(-3, 8)),
    ],
)
def test_layout(parent, attribute, expected):
    assert channel_layout(parent, attribute) == expected


@pytest.mark.parametrize(
    "parent",
    [
        named(act=nn.GELU(), conv=nn.Conv2d(3, 8, 1), fc=nn.Linear(8, 2)),
        named(embed=nn.Embedding(4, 8), act=nn.GELU()),
        named(act=nn.GELU()),
        # PVT: tokens are put on a grid for the convolution and back.
        named(fc1=nn.Linear(4, 8), conv=nn.Conv2d(8, 8, 3), act=nn.GELU(), drop=nn.Dropout(), fc2=nn.Linear(8, 4)),
    ],
)
def test_ambiguous_layout_is_refused_until_channel_dim_is_given(parent):
    assert channel_layout(parent, "act").channel_dim is None
    with pytest.raises(la.AdapterError, match=r"'act' holds the channels \(its neighbours are .*set channel_dim to 1"):
        la.attach(parent, la.NoRA(groups=2, targets=["act"]))
    la.attach(parent, la.NoRA(groups=2, targets=["act"], channel_dim=1))
    assert parent["act"](torch.randn(2, 8, 3)).shape == (2, 8, 3)


@pytest.mark.parametrize("name", MODELS)
def test_groups_lie_along_the_channels_of_real_models(name):
    network, seen = build(name), []
    la.attach(network, la.NoRA(groups=4))
    for _, adapter in la.adapters(network):
        adapter.register_forward_hook(lambda module, args, y: seen.append((args[0].shape, module.channel_dim)))
    MODELS[name].run(network)
    widths = {"vit": {192}, "convnext": {96, 128, 192, 256}, "llama": {48}, "bert": {64}}
    widths |= {"swin": {64, 128}, "gpt2": {128}}
    assert {shape[dim] for shape, dim in seen} == widths[name]


def test_channels_first_mlps():
    network = build("vit")
    network.blocks[0].mlp = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))
    la.attach(network, la.NoRA(groups=4))
    assert [a.channel_dim for _, a in la.adapters(network)] == [-3, -1]


# ---- groups that do not divide the channels


def test_known_at_attach():
    message = r"7 groups do not divide the 192 channels of 'blocks.0.mlp.act'; choose groups among the divisors of 192"
    with pytest.raises(la.AdapterError, match=message):
        la.attach(build("vit"), la.NoRA(groups=7))
    with pytest.raises(la.AdapterError, match=r"3 groups do not divide the 64 channels of 'bert.*act_fn'"):
        la.attach(build("bert"), la.NoRA(groups=3))


@pytest.mark.parametrize("mlp", [GluMlp(8, 24), SwiGLU(8, 24), SwiGLU(8, 24, norm_layer=nn.LayerNorm)])
def test_gated_mlps_run_with_groups_of_their_halves(mlp):
    """GluMlp makes 24 channels and activates 12 of them: 12 groups are right, though attach could not know."""
    model = nn.Sequential(mlp)
    channels = 12 if isinstance(mlp, GluMlp) else 24
    la.attach(model, la.NoRA(groups=channels))
    la.verify(model, torch.randn(2, 5, 8))


def test_unknown_at_attach_raises_at_the_first_forward():
    network = build("llama")
    la.attach(network, la.NoRA(groups=5))
    with pytest.raises(la.AdapterError, match=r"5 groups do not divide the 48 channels of 'model.layers.0.mlp.act_fn'"):
        MODELS["llama"].run(network)
    glu = nn.Sequential(GluMlp(8, 24))
    la.attach(glu, la.NoRA(groups=8))
    with pytest.raises(la.AdapterError, match=r"8 groups do not divide the 12 channels of '0.act'"):
        glu(torch.randn(2, 5, 8))


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize(
    "method",
    [
        la.NoRA(groups=2, targets=["1"]),
        la.GroupAffine(groups=2, targets=["1"]),
        la.AFALoRA(rank=4, activation="rational", groups=2, targets=["0"]),
    ],
)
def test_an_image_without_a_batch_has_the_same_groups(convolution, method):
    model = nn.Sequential(convolution(3, 8, 3, padding=1), nn.GELU(), convolution(8, 4, 1)).eval()
    la.attach(model, method)
    move(model)
    x = torch.randn(2, 3, *[4] * (model[0].weight.dim() - 2))
    torch.testing.assert_close(model(x[0]), model(x)[0])
