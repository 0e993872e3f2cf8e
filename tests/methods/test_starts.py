"""LoRA and DoRA that start from the pretrained weight (PiSSA, OLoRA) and subtract their start."""

import copy
import math

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lit_adapters as la
from lit_adapters.optimizers import parameter_groups

KINDS = [la.LoRA, la.DoRA]
STARTS = ["pissa", "olora"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_start = pytest.mark.parametrize("start", STARTS)


def attached(kind=la.LoRA, base: nn.Module | None = None, **settings) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(12, 8) if base is None else copy.deepcopy(base))
    la.attach(network, kind(**{"rank": 3, "alpha": 6.0, "targets": ["0"], "start": "pissa"} | settings))
    return network


def move(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def weight_of(adapter) -> torch.Tensor:
    return adapter.layer.matrix(adapter.base, adapter._parameters["weight"]).detach().double()


# ---- the start


@pytest.mark.parametrize("alpha", [6.0, -6.0])
def test_pissa_takes_the_largest_singular_values(alpha):
    adapter = attached(alpha=alpha)[0]
    start = adapter.scaling * adapter.start_B.double() @ adapter.start_A.double()
    values = torch.linalg.svdvals(weight_of(adapter))
    torch.testing.assert_close(torch.linalg.svdvals(start)[:3], values[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.linalg.svdvals(weight_of(adapter) - start)[:5], values[3:], rtol=1e-5, atol=1e-6)
    sizes = adapter.start_A.norm(dim=1), adapter.start_B.norm(dim=0)  # half of each singular value in either factor
    torch.testing.assert_close(*sizes)


def test_olora_takes_the_first_columns_of_a_qr_decomposition():
    adapter = attached(start="olora")[0]
    a, b = adapter.start_A.double(), adapter.start_B.double()
    torch.testing.assert_close(b.T @ b, torch.eye(3).double(), rtol=0, atol=1e-6)
    assert not a.tril(-1).any()
    torch.testing.assert_close((b @ a)[:, :3], weight_of(adapter)[:, :3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_start
@each_kind
def test_the_start_is_the_pretrained_layer_bit_for_bit(kind, start, dtype, dropout):
    for base, x in [
        (nn.Linear(12, 8), torch.randn(4, 5, 12)),
        (Conv1D(8, 12), torch.randn(5, 12)),
        (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6)),
    ]:
        base, x = base.to(dtype), x.to(dtype)
        network, expected = attached(kind, base, start=start, dropout=dropout), base(x)
        y = network(x)
        assert torch.equal(y, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(x), base(x))
        y.float().square().sum().backward()
        for parameter in (network[0].lora_A, network[0].lora_B):  # both learn from the first step
            assert parameter.grad.any(1).all()
        assert torch.equal(network[0].base.weight, base.weight)


def test_a_quantised_weight_stays_as_it_is():
    pytest.importorskip("bitsandbytes")
    from tests.methods.quantised import content, dequantised, layer

    base, x = layer((128, 64)), torch.randn(5, 128)
    network = nn.Sequential(base)
    expected, before, exact = network(x), content(base.weight), dequantised(base.weight)
    la.attach(network, la.LoRA(rank=4, alpha=8.0, start="pissa"))
    assert torch.equal(network(x), expected)
    start = network[0].scaling * network[0].start_B.double() @ network[0].start_A.double()
    torch.testing.assert_close(
        torch.linalg.matrix_norm(exact - start, 2), torch.linalg.svdvals(exact)[4], rtol=1e-4, atol=0
    )
    move(network)
    assert torch.equal(content(base.weight), before)


# ---- the equation


@each_start
@each_kind
def test_value_and_gradient_against_float64(kind, start):
    network = attached(kind, start=start)
    adapter = move(network)[0]
    x, grad = torch.randn(4, 5, 12, requires_grad=True), torch.randn(4, 5, 8)
    own = [adapter.lora_A, adapter.lora_B] + ([adapter.magnitude] if kind is la.DoRA else [])
    exact = [t.detach().double().requires_grad_() for t in (x, *own)]
    start_product = adapter.start_B.double() @ adapter.start_A.double()
    weight = weight_of(adapter) + adapter.scaling * (exact[2] @ exact[1] - start_product)
    if kind is la.DoRA:
        weight = exact[3][:, None] / weight.detach().norm(dim=1, keepdim=True) * weight
    exact_y = exact[0] @ weight.T + adapter.bias.double()
    expected = torch.autograd.grad(exact_y, exact, grad.double())
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):  # fused operations, and plain ones
        assert adapter.can_fuse(given) == given.is_contiguous()
        y = adapter(given)
        actual = torch.autograd.grad(y, [x, *own], grad)
        for got, want in zip((y, *actual), (exact_y, *expected), strict=True):
            assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    torch.testing.assert_close(adapter.delta_weight(), (weight - weight_of(adapter)).float(), rtol=1e-4, atol=1e-6)
    relative = (adapter.scaling * (exact[2] @ exact[1] - start_product)).norm() / weight_of(adapter).norm()
    assert adapter.statistics()["relative_norm"] == pytest.approx(relative.item(), rel=1e-5)
    update, change = adapter.low_rank_update(), adapter.scaling * (exact[2] @ exact[1] - start_product)
    torch.testing.assert_close(update.scale * update.b @ update.a, change.detach().float(), rtol=1e-4, atol=1e-6)


@each_start
def test_training_is_that_of_peft_which_changes_the_weight(start):
    """The same gradient steps: peft writes W0 - s B0 A0 into the model, ours computes the difference."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=start)
    )
    ours = attached(base=base[0], start=start)
    layer, adapter = theirs.base_model.model[0], ours[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, b @ a, rtol=1e-4, atol=1e-6)
    signs = (adapter.lora_A * a).sum(1).sign()[:, None]  # which are free in both decompositions
    torch.testing.assert_close(signs * adapter.lora_A, a, rtol=1e-4, atol=1e-5)
    x = torch.randn(20, 12)
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (ours, theirs)]
    for _ in range(5):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (network(x) - x[:, :8]).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert (ours(x) - base(x)).abs().max() > 0.1


# ---- the rest of the library


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize(
    ("base", "shape"),
    [(nn.Linear(12, 8), (5, 12)), (Conv1D(8, 12), (5, 12)), (nn.Conv2d(4, 8, 3), (2, 4, 6, 6))],
    ids=["linear", "gpt2", "convolution"],
)
@each_kind
def test_files_merging_and_peft(kind, base, shape, tmp_path):
    x, network = torch.randn(shape), move(attached(kind, base))
    y = network(x)
    la.save_adapters(network, tmp_path / "ours")
    loaded = nn.Sequential(copy.deepcopy(base))
    la.load_adapters(loaded, tmp_path / "ours")
    assert torch.equal(loaded(x), y)
    assert torch.equal(loaded[0].start_B, network[0].start_B)
    la.export_peft(network, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), tmp_path / "peft")
    torch.testing.assert_close(theirs(x), y, rtol=1e-5, atol=1e-5)
    assert theirs.base_model.model[0].r["default"] == 6
    again = nn.Sequential(copy.deepcopy(base))
    la.import_peft(again, tmp_path / "peft")
    torch.testing.assert_close(again(x), y, rtol=1e-6, atol=1e-6)
    la.merge(loaded)
    torch.testing.assert_close(loaded(x), y, rtol=1e-5, atol=1e-5)


def test_loading_a_file_decomposes_nothing(tmp_path, monkeypatch):
    base = nn.Linear(12, 8)
    network = attached(base=base)
    la.save_adapters(network, tmp_path)
    monkeypatch.delattr(torch.linalg, "svd")
    loaded = nn.Sequential(copy.deepcopy(base))
    la.load_adapters(loaded, tmp_path)
    assert torch.equal(loaded[0].lora_A, network[0].lora_A)


@each_kind
def test_weight_decay_leaves_the_pair_alone(kind):
    """Its decay would take s B0 A0 out of the pretrained weight."""
    for pairs in (False, True):
        groups = parameter_groups(attached(kind), lr=0.1, weight_decay=0.5, pairs=pairs)
        assert {group["weight_decay"] for group in groups} == {0.0}
    decays = {g["weight_decay"] for g in parameter_groups(attached(kind, start="zero"), lr=0.1, weight_decay=0.5)}
    assert 0.5 in decays


@each_kind
def test_another_base_that_is_loaded_before_training_gives_another_start(kind):
    network, other = attached(kind), nn.Sequential(nn.Linear(12, 8))
    expected = attached(kind, other[0])
    network.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(network[0].lora_A, expected[0].lora_A)
    x = torch.randn(5, 12)
    assert torch.equal(network(x), other(x))
    pair = move(network)[0].lora_A.clone(), network[0].start_A.clone()
    network.load_state_dict(nn.Sequential(nn.Linear(12, 8)).state_dict(), strict=False)
    assert torch.equal(network[0].lora_A, pair[0])
    assert torch.equal(network[0].start_A, pair[1])


def test_settings_and_weights_that_are_refused():
    with pytest.raises(la.AdapterError, match="start 'pisa' must be one of"):
        la.LoRA(start="pisa")
    broken = nn.Linear(12, 8)
    with torch.no_grad():
        broken.weight[0, 0] = math.nan
    with pytest.raises(la.AdapterError, match="the weight of '0' has values that are not finite"):
        attached(base=broken)
    with pytest.raises(la.AdapterError, match=r"or lit_adapters.LoRA\(start=...\)"):
        la.Peft(peft.LoraConfig(target_modules=["0"], init_lora_weights="pissa"))
