"""DenseLoRA: values and gradients in float64, who shares what, and one place for what is shared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.learned.summary import summarise
from lit_adapters.methods import dense_lora
from lit_adapters.methods.dense_lora import DenseLoRAAdapter
from lit_adapters.optimizers import parameter_groups
from tests.learned.saved_adapters import checkpoint
from tests.lightning.tiny_task import Net, Task
from tests.matrix import MODELS, adapted, move

DOUBLE = torch.float64
SETTINGS = {"rank": 4, "alpha": 8.0, "dropout": 0.0}


def net(moved: bool = True, **settings: Any) -> Net:
    """Two blocks of fc1 and fc2 and a head, with DenseLoRA off its start."""
    model = Net().eval()
    la.attach(model, la.DenseLoRA(**SETTINGS | {"exclude": ["head"]} | settings))
    if moved:
        move(model)
    return model


def layers(model: nn.Module) -> dict[str, DenseLoRAAdapter]:
    return dict(la.adapters(model))


def in_double(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters in float64, to put in their place: attached, they stay in float32."""
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}


def formula(x: Tensor, e: Tensor, m: Tensor, d: Tensor, decoder: Any = F.gelu) -> Tensor:
    """The branch at alpha / r = 2."""
    return 2.0 * decoder(F.gelu(x @ e.T) @ m.T @ d.T)


# Values and gradients


def test_without_activations_it_is_lora(monkeypatch):
    """A = E and B = D M; the gradients follow from LoRA's by the chain rule."""
    monkeypatch.setitem(dense_lora.ACTIVATIONS, "gelu", lambda z: z)
    torch.manual_seed(0)
    dense, lora = (nn.Sequential(nn.Linear(12, 8).double()) for _ in range(2))
    lora.load_state_dict(dense.state_dict())
    la.attach(dense, la.DenseLoRA(**SETTINGS))
    la.attach(lora, la.LoRA(rank=4, alpha=8.0))
    move(dense)
    own = in_double(dense)
    e, d, m = (own[f"0.dense_{name}"] for name in "EDM")
    pair = {"0.lora_A": e.detach().clone(), "0.lora_B": (d @ m).detach()}
    pair = {name: value.requires_grad_() for name, value in pair.items()}
    x, upstream = torch.randn(3, 5, 12, dtype=DOUBLE), torch.randn(3, 5, 8, dtype=DOUBLE)
    y, expected = torch.func.functional_call(dense, own, (x,)), torch.func.functional_call(lora, pair, (x,))
    found = torch.autograd.grad(y, [e, d, m], upstream)
    of_a, of_b = torch.autograd.grad(expected, list(pair.values()), upstream)
    for got, want in zip((y, *found), (expected, of_a, of_b @ m.T, d.T @ of_b), strict=True):
        assert want.abs().max() > 1e-2
        assert (got - want).abs().max() <= 1e-13 * want.abs().max()


@pytest.mark.parametrize("output_activation", [True, False])
def test_derivatives_agree_with_finite_differences(output_activation):
    model = net(output_activation=output_activation, rank=2).double()
    own = in_double(model)
    x = torch.randn(3, 8, dtype=DOUBLE, requires_grad=True)

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(own, values[1:], strict=True)), (values[0],))

    assert torch.autograd.gradcheck(run, (x, *own.values()))


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (2, 3, 12)),
    "gpt2": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 2, stride=2, padding=1, padding_mode="circular"), (2, 3, 6, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("output_activation", [True, False])
def test_values_by_the_formula(kind, output_activation):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    la.attach(model, la.DenseLoRA(**SETTINGS, targets=["0"], output_activation=output_activation))
    move(model)
    e, d, m = (getattr(model[0], f"dense_{name}").double() for name in "EDM")
    x = torch.randn(shape)
    patches = x.double()
    if kind == "conv2d":
        padded = F.pad(patches, (1, 1, 1, 1), mode="circular")
        patches = F.unfold(padded, 2, stride=2).transpose(1, 2)
    branch = formula(patches, e, m, d, F.gelu if output_activation else lambda u: u)
    y = model[0].base(x).double()
    if kind == "conv2d":
        branch = branch.transpose(1, 2).reshape(y.shape)
    expected = y + branch
    assert branch.abs().max() > 1e-2
    assert (model(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_gelu_bounds_the_branch_from_below_and_a_linear_decoder_does_not():
    for output_activation in (True, False):
        (adapter, *_) = layers(net(output_activation=output_activation)).values()
        with torch.no_grad():
            adapter.dense_D.mul_(100)
        lowest = adapter.update(torch.randn(200, 8)).min().item() / adapter.scaling
        assert (-0.1701 < lowest < -0.16) if output_activation else lowest < -1


def test_dropout_acts_on_the_branch_alone_and_only_in_training():
    adapter = layers(net(dropout=0.5))["blocks.0.fc1"]
    x = torch.ones(20, 8)
    plain = adapter.eval()(x)
    assert torch.equal(plain, adapter(x))
    update = adapter.train()(x) - adapter.base(x)
    # An output is dropped with probability 1/2, and what stays differs with the inputs that are dropped.
    assert 0.3 < (update == 0).float().mean() < 0.7
    assert update.unique(dim=0).shape[0] > 10
    with torch.no_grad():
        adapter.dense_D.zero_()
    assert torch.equal(adapter(x), adapter.base(x))


# Who shares


@pytest.mark.parametrize(
    ("share", "groups"), [("kind", [[0, 2], [1, 3]]), ("shape", [[0, 2], [1, 3]]), ("none", [[0], [1], [2], [3]])]
)
def test_the_first_layer_of_a_group_holds_what_it_shares(share, groups):
    found = list(layers(net(share=share)).values())
    for group in groups:
        assert [found[i].is_holder for i in group] == [True] + [False] * (len(group) - 1)
        assert all(found[i].pair()[0] is found[group[0]].dense_E for i in group)
    assert len({id(adapter.sharing) for adapter in found}) == len(groups)


def test_names_and_sizes_tell_the_kind():
    method, shapes = la.DenseLoRA(), la.DenseLoRA(share="shape")
    one = method.group("model.layers.0.self_attn.q_proj", (8, 8))
    assert one == method.group("model.layers.11.self_attn.q_proj", (8, 8))
    assert one != method.group("model.layers.0.self_attn.k_proj", (8, 8))
    assert one != method.group("model.layers.0.self_attn.q_proj", (8, 4))
    assert method.group("blocks.0.mlp.0", (8, 8)) == method.group("blocks.1.mlp.0", (8, 8))
    assert method.group("blocks.0.mlp.0", (8, 8)) != method.group("blocks.0.mlp.2", (8, 8))
    assert shapes.group("a.q", (8, 8)) == shapes.group("b.v", (8, 8)) != shapes.group("b.v", (8, 4))


@pytest.mark.parametrize(
    ("sizes", "rank", "expected"),
    [
        ((4096, 1024, 14336), 16, 925_696),  # LLaMA-3 8B: 0.0115% of the model
        ((4096, 4096, 11008), 16, 917_504),  # LLaMA-2 7B
    ],
)
def test_counts_of_the_paper(sizes, rank, expected):
    hidden, keys, inner = sizes
    shapes = {"q": (hidden, hidden), "k": (hidden, keys), "v": (hidden, keys)}
    shapes |= {"up": (hidden, inner), "down": (inner, hidden)}
    with torch.device("meta"):
        blocks = [nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in shapes.items()}) for _ in range(32)]
        model = nn.Sequential(*blocks)
    report = la.attach(model, la.DenseLoRA(rank=rank))
    assert report.adapter_parameters == expected
    shared = sum(rank * (i + o) for i, o in shapes.values())
    assert report.shared == {"dense_lora": shared}
    assert expected - shared == 160 * rank**2
    assert f"{shared:,} of the parameters are shared by several layers" in str(report)


def test_the_gradient_of_what_is_shared_is_the_sum_over_the_layers():
    shared, apart = net().double(), net(share="none").double()
    own = in_double(shared)
    values = {n: own[n] if n in own else own[n.replace("blocks.1", "blocks.0")] for n in in_double(apart)}
    values = {n: v.detach().clone().requires_grad_() for n, v in values.items()}
    x = torch.randn(6, 8, dtype=DOUBLE)
    losses = [torch.func.functional_call(m, v, (x,)).square().sum() for m, v in ((shared, own), (apart, values))]
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    of_shared, of_apart = (
        dict(zip(v, torch.autograd.grad(loss, list(v.values())), strict=True))
        for loss, v in zip(losses, (own, values), strict=True)
    )
    for name, found in of_shared.items():
        expected = of_apart[name]
        if not name.endswith("dense_M"):
            other = of_apart[name.replace("blocks.0", "blocks.1")]
            assert other.abs().max() > 1e-3 * expected.abs().max()
            expected = expected + other
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


# One place for what is shared


def test_optimisers_and_files_have_each_tensor_once(tmp_path):
    model = net()
    keys = {f"blocks.{i}.fc{j}.dense_{n}" for i in (0, 1) for j in (1, 2) for n in ("M", "size")}
    keys |= {f"blocks.0.fc{j}.dense_{n}" for j in (1, 2) for n in "ED"}
    parameters = [p for group in parameter_groups(model, 1e-2, 0.1, {"dense_lora": 2.0}) for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == 8
    assert {k for k in model.state_dict() if "dense" in k} == keys
    la.save_adapters(model, tmp_path)
    _, tensors = la.files.adapters.read_directory(tmp_path)
    assert {k for k in tensors if "dense" in k} == keys
    again = Net().eval()
    la.load_adapters(again, tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))
    assert len({id(adapter.sharing) for adapter in layers(again).values()}) == 2


def test_a_removed_layer_leaves_the_others_what_they_share():
    model, x = net(), torch.randn(3, 8)
    first, second = model.blocks[0].fc1, model.blocks[1].fc1
    encoder, expected = first.dense_E, second(x)
    parameters = {id(p) for p in model.parameters() if p.requires_grad} - {id(first.dense_M)}
    model.blocks[0].fc1 = first.unwrapped()
    assert type(model.blocks[0].fc1) is nn.Linear
    assert set(model.blocks[0].fc1.state_dict()) == {"weight", "bias"}
    assert second.dense_E is encoder
    assert torch.equal(second(x), expected)
    assert {id(p) for p in model.parameters() if p.requires_grad} == parameters
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert twin.blocks[1].fc1.sharing.layers == [twin.blocks[1].fc1]
    la.detach(model)
    assert model.state_dict().keys() == Net().state_dict().keys()
    assert torch.equal(model(x), Net().eval()(x))


def test_a_copy_shares_among_its_own_layers():
    model, x = net(), torch.randn(3, 8)
    before, twin = model(x), copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].fc1.dense_D.add_(1)
    assert torch.equal(model(x), before)
    assert twin.blocks[1].fc1.pair()[1] is twin.blocks[0].fc1.dense_D


def test_files_tell_what_was_learned_without_the_model(tmp_path):
    directory = tmp_path / "directory"
    models = {directory: net()}
    la.save_adapters(models[directory], directory)
    task, path = checkpoint(tmp_path / "run", Task(methods=la.DenseLoRA(rank=3)))
    models[path] = task.net
    for place, model in models.items():
        saved = read_saved(place)
        for name, adapter in la.adapters(model):
            e, d = adapter.pair()
            update = saved.layers[name].adapter.low_rank_update()
            product = adapter.scaling * d @ adapter.dense_M @ e
            assert product.any()
            torch.testing.assert_close(update.scale * update.b @ update.a, product.detach())
            size = product.norm().item() / adapter.base.weight.norm().item()
            assert adapter.statistics() == {"relative_product": pytest.approx(size, rel=1e-5)}
        assert {(s.merges, s.method, s.learned.note) for s in summarise(saved)} == {
            ("no", "dense_lora", "as if linear")
        }
        counts = {n: sum(p.numel() for p in a.adapter_parameters().values()) for n, a in la.adapters(model)}
        assert {s.name: s.parameters for s in summarise(saved)} == counts


def test_a_file_without_the_encoder_is_refused():
    adapter = net().blocks[1].fc1
    tensors = adapter.adapter_tensors()
    method = la.DenseLoRA(**SETTINGS)
    placed = method.placeholder("blocks.1.fc1", tensors, {})
    with pytest.raises(la.AdapterError, match=r"no layer holds the parameters that 'blocks\.1\.fc1'"):
        method.join({"blocks.1.fc1": placed})
    for size in (torch.tensor([8]), torch.tensor([8.0, 16.0]), torch.tensor([0, 16]), torch.tensor([1 << 40, 8])):
        with pytest.raises(la.AdapterError, match="dense_size is missing or damaged"):
            method.placeholder("blocks.1.fc1", tensors | {"dense_size": size}, {})
    with pytest.raises(la.AdapterError, match=r"'blocks\.1\.fc1' is 16 x 8, and in the file 8 x 16"):
        adapter.load_state_dict({"dense_size": torch.tensor([8, 16])}, strict=False)


# Beside others


def test_bitfit_on_the_same_layers():
    model, plain = Net().eval(), net(moved=False)
    la.attach(model, [la.DenseLoRA(**SETTINGS, exclude=["head"]), la.BitFit()])
    move(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(model.get_parameter(name))
    ours, theirs = model.blocks[1].fc2, plain.blocks[1].fc2
    x = torch.randn(3, 16)
    torch.testing.assert_close(ours(x), theirs(x) + ours.delta_bias)
    with pytest.raises(la.AdapterError, match="no weight is equal to it"):
        la.merge(model)


@pytest.mark.slow  # importing bitsandbytes takes seconds
def test_a_base_in_4_bit():
    quantised = pytest.importorskip("tests.methods.quantised", exc_type=ImportError)
    model, x = quantised.network(), quantised.inputs()
    start = model(x)
    la.attach(model, la.DenseLoRA(**SETTINGS))
    assert torch.equal(model(x), start)
    move(model)
    adapter = model[0]
    y, (e, d), m = adapter(x), adapter.pair(), adapter.dense_M
    weight = quantised.dequantised(adapter.weight)
    exact = x.double() @ weight.T + adapter.bias.double() + formula(x.double(), e.double(), m.double(), d.double())
    assert quantised.error(y, exact) <= 1e-6
    with pytest.raises(la.AdapterError, match="no weight is equal to it"):
        la.merge(model)


def test_what_is_observed_is_the_size_of_the_branch():
    model = adapted("vit", "dense_lora")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, adapter in la.adapters(model):
        adapter.register_forward_hook(lambda module, args, y, name=name: seen.update({name: (args[0], y)}))
    MODELS["vit"].run(model)
    for name, adapter in la.adapters(model):
        x, y = seen[name]
        base = adapter.base(x)
        # 51 rows are all taken.
        assert adapter.observe(x)["relative_output"] == pytest.approx(
            ((y - base).norm() / base.norm()).item(), rel=1e-4
        )


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 must be a whole number, at least 1"),
        ({"alpha": 0.0}, "alpha 0.0 must be a finite number other than 0"),
        ({"dropout": 1.0}, r"dropout 1.0 must lie in \[0, 1\)"),
        ({"activation": "relu"}, "activation 'relu' must be one of 'gelu', 'silu', 'tanh'"),
        ({"output_activation": 1}, "output_activation 1 must be True or False"),
        ({"share": "all"}, "share 'all' must be one of 'kind', 'shape', 'none'"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(la.AdapterError, match=message):
        la.DenseLoRA(**settings)


class ReadsWeight(nn.Module):
    """A parent that multiplies by the weight of its layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


@pytest.mark.parametrize(
    ("layer", "targets", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), ["0"], "'0' is a convolution in groups"),
        (nn.Embedding(4, 4), ["0"], "'0' is neither: an embedding"),
        (nn.Linear(8, 3), ["0"], r"rank 4 exceeds the size of '0' \(3 x 8\)"),
    ],
    ids=["groups", "embedding", "rank"],
)
def test_layers_that_cannot_carry_it(layer, targets, message):
    model = nn.Sequential(layer)
    with pytest.raises(la.AdapterError, match=message):
        la.attach(model, la.DenseLoRA(rank=4, targets=targets))
    assert model[0] is layer
    assert not list(la.adapters(model))


def test_a_model_that_reads_the_weight_is_refused_when_it_does():
    """Some models read it in one of their settings alone, so that their source does not tell."""
    model = nn.Sequential(ReadsWeight())
    la.attach(model, la.DenseLoRA(rank=4))
    with pytest.raises(la.AdapterError, match=r"reads the weight of '0\.qkv' .*exclude=\['0\.qkv'\]"):
        model(torch.ones(2, 8))
    with la.disabled(model):
        model(torch.ones(2, 8))
