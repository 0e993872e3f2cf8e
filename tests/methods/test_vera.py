"""VeRA: values and gradients against peft and the formula, and the frozen pair that no file holds."""

import copy
import io
import itertools
import math
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers.pytorch_utils import Conv1D

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.methods.vera import FrozenPair, VeRAAdapter
from tests.learned.saved_adapters import checkpoint
from tests.lightning.tiny_task import Task
from tests.matrix import move

DOUBLE = torch.float64


def network(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(sizes)))


def attached(model: nn.Module, **settings: object) -> nn.Module:
    """The model with VeRA off its start."""
    la.attach(model, la.VeRA(**{"rank": 5, "seed": 3} | settings))
    move(model)
    return model


def layers(model: nn.Module) -> list[VeRAAdapter]:
    return [adapter for _, adapter in la.adapters(model)]


def pairs(model: nn.Module) -> list[Tensor]:
    return [t for adapter in layers(model) for t in (adapter.vera_A, adapter.vera_B)]


def storages(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


# Values and gradients


def in_double(adapter: VeRAAdapter) -> dict[str, Tensor]:
    """The trained parameters in float64, to put in their place: attached, they stay in float32."""
    return {name: p.detach().double().requires_grad_() for name, p in adapter.adapter_parameters().items()}


def test_values_and_gradients_are_those_of_peft():
    """Two layers of different sizes, so that peft slices the pair too; both draw it from the same seed."""
    ours, theirs = network(12, 20, 8).double(), network(12, 20, 8).double()
    attached(ours, seed=7)
    config = peft.VeraConfig(r=5, target_modules=["0", "1"], projection_prng_key=7, d_initial=0.1)
    peft.get_peft_model(theirs, config).double()
    # One rounding more or less: peft scales inside the draw.
    torch.testing.assert_close(
        theirs[0].vera_A["default"].float(), layers(ours)[0].pair.draw()[0], rtol=3e-7, atol=1e-7
    )
    torch.testing.assert_close(
        theirs[1].vera_B["default"].float(), layers(ours)[0].pair.draw()[1], rtol=3e-7, atol=1e-7
    )

    parameters = {f"{i}.{name}": p for i in range(2) for name, p in in_double(ours[i]).items()}
    for i in range(2):
        theirs[i].vera_A["default"], theirs[i].vera_B["default"] = (t.double() for t in ours[0].pair.draw())
        theirs[i].vera_lambda_d["default"].data.copy_(ours[i].vera_lambda_d)
        theirs[i].vera_lambda_b["default"].data.copy_(ours[i].vera_lambda_b)
    x = torch.randn(3, 4, 12, dtype=DOUBLE, requires_grad=True)
    upstream = torch.randn(3, 4, 8, dtype=DOUBLE)

    y, expected_y = torch.func.functional_call(ours, parameters, (x,)), theirs(x)
    wanted = [getattr(theirs[i], name)["default"] for i in range(2) for name in ("vera_lambda_d", "vera_lambda_b")]
    gradients = torch.autograd.grad(y, [x, *parameters.values()], upstream)
    expected = torch.autograd.grad(expected_y, [x, *wanted], upstream)
    assert list(parameters) == ["0.vera_lambda_d", "0.vera_lambda_b", "1.vera_lambda_d", "1.vera_lambda_b"]
    for got, want in zip((y, *gradients), (expected_y, *expected), strict=True):
        assert got.dtype == DOUBLE
        assert want.abs().max() > 1e-2
        assert (got - want).abs().max() <= 1e-13 * want.abs().max()
    torch.testing.assert_close(ours[1].delta_weight(DOUBLE), theirs[1].get_delta_weight("default"), rtol=1e-13, atol=0)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (2, 3, 12)),
    "gpt2": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 4, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 2, dilation=2, padding=1, padding_mode="circular"), (2, 3, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 8, 2), (2, 3, 4, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_by_the_formula(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    adapter = attached(nn.Sequential(make()).double(), targets=["0"])[0]
    x, parameters = torch.randn(shape, dtype=DOUBLE, requires_grad=True), in_double(adapter)
    y = torch.func.functional_call(adapter, parameters, (x,))
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], upstream)

    a, b = adapter.pair.draw()
    d, scales = parameters["vera_lambda_d"], parameters["vera_lambda_b"]
    update = scales.diag() @ b.double() @ d.diag() @ a.double()
    weight = adapter.base.weight + (update.T if kind == "gpt2" else update.view(-1, *adapter.base.weight.shape[1:]))
    exact = torch.func.functional_call(adapter.base, {"weight": weight}, (x,))
    expected = torch.autograd.grad(exact, [x, d, scales], upstream)
    for got, want in zip((y, *gradients), (exact, *expected), strict=True):
        assert (got - want).abs().max() <= 1e-13 * want.abs().max()


def test_a_rank_above_the_sizes_of_the_layer():
    for sizes in ((12, 8), (8, 12)):
        (adapter,) = layers(attached(network(*sizes), rank=32))
        update = adapter.delta_weight(DOUBLE).detach()
        values = torch.linalg.svdvals(update)
        torch.testing.assert_close(adapter.singular_values()["update"], values, rtol=1e-6, atol=1e-6)
        space = adapter.low_rank_update().column_space()
        torch.testing.assert_close(space @ (space.T @ update), update, rtol=1e-6, atol=1e-6)
        expected = update.norm() / adapter.weight.norm()
        assert adapter.statistics()["relative_norm"] == pytest.approx(expected.item(), rel=1e-6)


def test_dropout_acts_on_the_branch_alone_and_only_in_training():
    (adapter,) = layers(attached(network(12, 8), dropout=0.5))
    x = torch.ones(2000, 12)
    plain = adapter.eval()(x)
    trained = adapter.train()(x)
    assert not torch.equal(trained, plain)
    torch.testing.assert_close(trained.mean(0), plain.mean(0), rtol=0.1, atol=0.02)
    with torch.no_grad():
        adapter.vera_lambda_b.zero_()
    assert torch.equal(adapter(x), adapter.base(x))


def test_autocast_leaves_float64_alone():
    model = attached(network(12, 8).double())
    x = torch.randn(5, 12, dtype=DOUBLE)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)


# The pair


def test_the_pair_is_kaiming_uniform_and_drawn_by_the_seed_alone():
    torch.manual_seed(1)
    a, b = FrozenPair(3, 64, 300, 500).draw()
    torch.manual_seed(2)
    again = FrozenPair(3, 64, 300, 500).draw()
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    for matrix, fan_in in ((a, 500), (b, 64)):
        bound = math.sqrt(6 / fan_in)
        assert 0.999 * bound < matrix.max() <= bound
        assert -bound <= matrix.min() < -0.999 * bound
        assert matrix.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
    assert not torch.equal(a, FrozenPair(4, 64, 300, 500).draw()[0])


def test_the_pair_is_drawn_whatever_the_default_device_and_dtype():
    expected = FrozenPair(3, 4, 8, 12).draw()
    torch.set_default_dtype(DOUBLE)
    try:
        with torch.device("meta"):
            drawn = FrozenPair(3, 4, 8, 12).draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(drawn, expected, strict=True))


def test_all_layers_take_the_first_rows_and_columns_of_one_pair():
    model = attached(network(12, 20, 8, 12))
    a, b = FrozenPair(3, 5, 20, 20).draw()
    for adapter in layers(model):
        assert torch.equal(adapter.vera_A, a[:, : adapter.in_features])
        assert torch.equal(adapter.vera_B, b[: adapter.out_features])
    assert len(storages(pairs(model))) == 2


def to_empty_and_load(model: nn.Module) -> nn.Module:
    state = model.state_dict()
    other = network(12, 20, 8, 12).to("meta")
    la.attach(other, la.VeRA(rank=5, seed=3))
    other.to_empty(device="cpu")
    other.load_state_dict(state)
    return other


def by_assignment(model: nn.Module) -> nn.Module:
    other = network(12, 20, 8, 12).to("meta")
    la.attach(other, la.VeRA(rank=5, seed=3))
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        to_empty_and_load,
        by_assignment,
        through_torch,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.half().float(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to_empty(device="cpu"),
        lambda model: model.to("meta").to_empty(device="cpu"),
    ],
    ids=["deepcopy", "load", "assign", "torch-save", "pickle", "half", "double", "bfloat16", "empty", "meta"],
)
def test_the_pair_stays_right_and_shared(change):
    model = attached(network(12, 20, 8, 12))
    before = [t.clone() for t in pairs(model)]
    changed = change(model)
    assert all(torch.equal(t, expected) for t, expected in zip(pairs(changed), before, strict=True))
    assert len(storages(pairs(changed.to("cpu")))) == 2  # a plain pickle holds each tensor by itself until it moves


def test_no_file_holds_the_pair(tmp_path):
    model = attached(network(12, 20))
    expected = {"vera_lambda_d", "vera_lambda_b", "vera_sizes"}
    assert {key.removeprefix("0.") for key in model.state_dict()} == {"weight", "bias"} | expected
    assert layers(model)[0].adapter_tensors().keys() == expected
    la.save_adapters(model, tmp_path)
    other = network(12, 20)
    la.load_adapters(other, tmp_path)
    assert torch.equal(other(torch.ones(12)), model(torch.ones(12)))


def test_a_file_brings_the_pair_that_it_was_trained_with():
    """The other model adapts a layer with more inputs too, for which the pair is another one."""
    model = attached(network(12, 20, 8), targets=["0"])
    other = attached(network(12, 20, 8), targets=["0", "1"])
    assert not torch.equal(other[0].vera_A, model[0].vera_A)
    other[0].load_state_dict(model[0].state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(other[0](x), model[0](x))
    assert torch.equal(copy.deepcopy(other)[0].double().float()(x), model[0](x))
    wrong = attached(network(12, 20, 8), targets=["1"])
    with pytest.raises(la.AdapterError, match="'1' is 8 x 20, and in the file 20 x 12: load it into the model"):
        wrong[1].load_state_dict(model[0].state_dict())


def test_files_tell_the_update_without_the_model(tmp_path):
    model = attached(network(12, 20, 8))
    la.save_adapters(model, tmp_path)
    for name, adapter in la.adapters(model):
        saved = read_saved(tmp_path).layers[name].adapter
        torch.testing.assert_close(saved.delta_weight(), adapter.delta_weight(), rtol=0, atol=0)
    task, path = checkpoint(tmp_path / "run", Task(methods=la.VeRA(rank=3)))
    saved = read_saved(path).layers
    for name, adapter in la.adapters(task):
        update = saved[name.removeprefix("net.")].adapter.delta_weight()
        assert update.any()
        torch.testing.assert_close(update, adapter.delta_weight(), rtol=0, atol=0)


def test_a_pair_first_drawn_in_inference_mode_trains():
    with torch.inference_mode():
        pair = FrozenPair(3, 5, 8, 12).of_layer((8, 12), torch.device("cpu"), torch.bfloat16)
    assert not any(t.is_inference() for t in pair)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_layers_share_what_is_cast(autocast):
    """Each layer keeps A and B from the forward to the backward: the same tensors in all layers."""
    model = attached(network(*[64] * 7), rank=32)
    x = torch.randn(2, 64)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    saved: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with keep, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(x).sum()
    of_the_pair = [t for t in saved if sorted(t.shape) == [32, 64]]
    assert len(of_the_pair) >= 6
    assert {t.dtype for t in of_the_pair} == {torch.bfloat16}
    assert len(storages(of_the_pair)) == 2


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 must be a whole number, at least 1"),
        ({"rank": 2.0}, "rank 2.0 must be"),
        ({"rank": True}, "rank True must be"),
        ({"seed": -1}, "seed -1 must be a whole number, at least 0 and below 2"),
        ({"seed": 2**63}, "seed 9223372036854775808 must be"),
        ({"seed": None}, "seed None must be"),
        ({"d_initial": 0.0}, "d_initial 0.0 must be a finite number other than 0"),
        ({"d_initial": float("inf")}, "d_initial inf"),
        ({"dropout": 1.0}, r"dropout 1.0 must lie in \[0, 1\)"),
        ({"targets": 3}, "targets 3 must be a keyword"),
        ({"exclude": "head"}, "exclude 'head' must be a list"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(la.AdapterError, match=message):
        la.VeRA(**settings)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "'0' is a convolution in groups"),
        (nn.Embedding(4, 4), "'0' is neither: an embedding"),
    ],
)
def test_layers_that_cannot_carry_it(layer, message):
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.raises(la.AdapterError, match=message):
        la.attach(model, la.VeRA(rank=2, targets=["0", "1"]))
    assert [type(m) for m in model] == [type(layer), nn.Linear]


def test_a_weight_that_is_read_cannot_have_dropout():
    (adapter,) = layers(attached(network(12, 8), dropout=0.1))
    adapter.read_as_weight = True
    torch.testing.assert_close(adapter.eval().weight, adapter.base.weight + adapter.delta_weight())
    adapter.train()
    with pytest.raises(la.AdapterError, match=r"dropout 0\.1 cannot act; set dropout=0"):
        _ = adapter.weight


def test_a_fake_tensor_is_never_shared():
    model = attached(network(6, 8))
    x = torch.randn(3, 6)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert type(model(x)) is Tensor
