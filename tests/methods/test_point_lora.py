"""PointLoRA on a small transformer: values, what blocks share, files, copies, removal, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.methods.point_lora import PointLoRAAdapter, TokenPromptAdapter
from lit_adapters.methods.token_selection import TokenSelector, take
from lit_adapters.optimizers import parameter_groups

METHOD = la.PointLoRA(rank=2, alpha=4.0, bottleneck=3, selected=2)
PROMPTS = ("prompt", "patch", "selected")


def network() -> nn.Module:
    """A vision transformer, whose sequence is a class token and 16 patches: the last two count as selected."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, depth=3, num_classes=5).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def adapted(moved: float = 0.3, method: la.Method = METHOD) -> nn.Module:
    model = network()
    la.attach(model, method, train=["head"])
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(moved * torch.randn_like(parameter))
    return model


def is_prompt(name: str) -> bool:
    return name.rpartition(".")[2].startswith(PROMPTS)


# ---- values


def test_the_start_is_the_pretrained_model_bit_for_bit():
    assert torch.equal(adapted(moved=0.0)(images()), network()(images()))


def test_layers_and_blocks_against_the_equations_in_float64():
    model = adapted().double()  # adapters stay in float32
    found = dict(la.adapters(model))
    x = torch.randn(2, 6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def mlp(holder: str, prompt: str, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (t.double() for n, t in found[holder].named_parameters() if n.startswith(prompt))
        return F.gelu(x @ down.T + down_bias) @ up.T + up_bias

    for name in ("qkv", "proj"):
        layer = found[f"blocks.2.attn.{name}"]
        a, b = layer.lora_A.double(), layer.lora_B.double()
        expected = x @ layer.base.weight.T + layer.base.bias + 2.0 * x @ a.T @ b.T
        expected = expected + mlp(f"blocks.0.attn.{name}", "prompt_", x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    block = found["blocks.2"]
    tokens = x.clone()
    tokens[:, 1:4] += mlp("blocks.0", "patch_", x[:, 1:4])
    tokens[:, 4:] += mlp("blocks.0", "selected_", x[:, 4:])
    torch.testing.assert_close(block.prompted(x), tokens, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block(x), block.base(tokens), rtol=1e-10, atol=1e-10)


def test_with_prompts_of_zero_it_is_lora():
    model, lora = adapted(), network()
    la.attach(lora, la.LoRA(rank=2, alpha=4.0, targets=["attn.qkv", "attn.proj"]), train=["head"])
    own = {n: t for n, t in model.state_dict().items() if not is_prompt(n) and not n.endswith("token_width")}
    lora.load_state_dict(own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_prompt(name):
                parameter.zero_()
    assert torch.equal(model(images()), lora(images()))
    assert not torch.equal(model(images()), network()(images()))


def test_a_record_of_the_input_tells_the_size_of_the_prompt():
    layer, x = dict(la.adapters(adapted()))["blocks.1.attn.proj"], torch.randn(2, 5, 64)
    expected = layer.prompt("prompt", x[:1]).norm() / layer.base(x[:1]).norm()
    assert layer.observe(x)["relative_prompt"] == pytest.approx(expected.item(), rel=1e-5)
    assert "relative_norm" in layer.statistics()


# ---- sharing


def test_blocks_share_the_prompts_and_all_of_them_train():
    model = adapted()
    found = dict(la.adapters(model))
    assert [n for n in found if found[n].shared_parameters()] == ["blocks.0", "blocks.0.attn.qkv", "blocks.0.attn.proj"]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")}
    # A and B of each block; V, v, U, u of four prompts, one of them with three times the outputs.
    assert sum(p.numel() for p in trained.values()) == 3 * 2 * (4 * 64 + 2 * 64) + 4 * (3 * 64 + 3 + 3 * 64 + 64) + 512
    model(images()).square().sum().backward()
    assert all(p.grad.any() for p in trained.values())
    biases = {id(p) for n, p in trained.items() if is_prompt(n) and n.endswith("_bias")}
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
    assert biases <= {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}


def test_removing_the_holder_keeps_the_prompts_of_the_others():
    model, x = adapted(), torch.randn(1, 4, 64)
    found = dict(la.adapters(model))
    before = found["blocks.1"].prompted(x), found["blocks.1.attn.qkv"](x)
    for name in ("blocks.0", "blocks.0.attn.qkv"):
        found[name].unwrapped()
    assert torch.equal(found["blocks.1"].prompted(x), before[0])
    assert torch.equal(found["blocks.1.attn.qkv"](x), before[1])
    assert found["blocks.1"].is_holder
    assert "prompt_up" in found["blocks.1.attn.qkv"].adapter_parameters()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
def test_a_copy_shares_among_its_own_blocks(duplicate):
    model = adapted()
    twin, before = duplicate(model), model(images())
    assert torch.equal(twin(images()), before)
    with torch.no_grad():
        dict(la.adapters(twin))["blocks.0"].patch_up.zero_()
    assert torch.equal(model(images()), before)
    assert not torch.equal(twin(images()), before)


# ---- files, removal


def test_saved_adapters_load_and_can_be_looked_at_without_the_model(tmp_path):
    model = adapted()
    la.save_adapters(model, tmp_path / "out")
    again = network()
    la.load_adapters(again, tmp_path / "out")
    assert torch.equal(again(images()), model(images()))
    x, found = torch.randn(1, 5, 64), dict(la.adapters(model))
    layers = read_saved(tmp_path / "out").layers
    assert set(layers) == set(found)
    for name, layer in layers.items():
        if isinstance(layer.adapter, TokenPromptAdapter):
            assert torch.equal(layer.adapter.prompted(x), found[name].prompted(x))
            assert layer.adapter.summary().size == "tokens of width 64"
        else:
            assert isinstance(layer.adapter, PointLoRAAdapter)
            assert torch.equal(layer.adapter.prompt("prompt", x), found[name].prompt("prompt", x))
            update = found[name].scaling * found[name].lora_B @ found[name].lora_A
            assert layer.adapter.summary().change == pytest.approx(update.norm().item(), rel=1e-4)


class Flat(nn.Module):
    """A model whose adapted layer is a direct child of its adapted block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("make", [network, Flat])
def test_detaching_leaves_no_trace(make):
    model = make()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    la.attach(model, la.PointLoRA(rank=2, targets="all-linear", bottleneck=3, selected=1))
    assert {type(a) for _, a in la.adapters(model)} == {PointLoRAAdapter, TokenPromptAdapter}
    la.verify(model, images() if make is network else torch.randn(2, 4, 6))
    la.detach(model)
    assert [type(m) for m in model.modules()] == kinds
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


# ---- what it refuses


def test_what_it_refuses():
    with pytest.raises(la.AdapterError, match="PointLoRA is nonlinear"):
        la.merge(adapted())
    with pytest.raises(la.AdapterError, match="selected -1"):
        la.PointLoRA(selected=-1)
    with pytest.raises(la.TargetsNotFound, match=r"blocks 'layer' match no module.*Set blocks="):
        la.attach(network(), la.PointLoRA(rank=2, blocks="layer"))
    with pytest.raises(la.AdapterError, match=r"'blocks\.0\.norm1' has no linear layer"):
        la.attach(network(), la.PointLoRA(rank=2, blocks=["norm1"]))
    with pytest.raises(la.AdapterError, match=r"'patch_embed\.proj' is a convolution"):
        la.attach(network(), la.PointLoRA(rank=2, targets=["patch_embed.proj"]))
    model = network()
    la.attach(model, la.PointLoRA(rank=2))  # 40 selected tokens, of a sequence of 17
    with pytest.raises(la.AdapterError, match="a class token and 40 selected tokens"):
        model(images())


# ---- the token selection


def test_the_selection_is_a_sort_by_score():
    torch.manual_seed(0)
    selector, scales = TokenSelector(8, keep=(4, 1)), [torch.randn(3, 9, 8), torch.randn(3, 5, 8)]
    indices, _ = selector(scales)
    for chosen, tokens, keep in zip(indices, scales, (4, 1), strict=True):
        scores = torch.sigmoid(selector.score(tokens)).squeeze(-1).tolist()
        best = [sorted(range(len(row)), key=row.__getitem__, reverse=True)[:keep] for row in scores]
        assert chosen.tolist() == best
        assert torch.equal(take(tokens, chosen)[1, 0], tokens[1, best[1][0]])
    with pytest.raises(la.AdapterError, match=r"keep \[4, 1\] cannot be taken from scales of \[3, 5\] tokens"):
        selector([scales[0][:, :3], scales[1]])


def test_the_loss_of_the_selection_and_that_it_moves_scores_to_a_half():
    torch.manual_seed(0)
    selector, scales = TokenSelector(8, keep=(4, 1)).double(), [4 * torch.randn(2, n, 8).double() for n in (9, 5)]
    expected = 0.0
    for tokens, weight in zip(scales, (1.0, 0.25), strict=True):
        p = torch.sigmoid(selector.score(tokens))
        expected += weight * (p * p.log() + (1 - p) * (1 - p).log()).mean().item()
    assert selector(scales)[1].item() == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        selector.score[2].bias.fill_(2000.0)
    assert selector(scales)[1].item() == 0.0  # finite where p is 1
    with torch.no_grad():
        selector.score[2].bias.fill_(2.0)
    optimizer = torch.optim.SGD(selector.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        selector(scales)[1].backward()
        optimizer.step()
    assert all((torch.sigmoid(selector.score(tokens)) - 0.5).abs().max() < 0.1 for tokens in scales)
