"""NestedLoRA: the outer pair against Eckart-Young, values and gradients in float64, calibration, files."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.methods.nested_lora import NestedLoRAAdapter, outer_pair
from tests.learned.saved_adapters import checkpoint
from tests.lightning.tiny_task import Net, Task
from tests.matrix import move

DOUBLE = torch.float64
SETTINGS = {"rank": 6, "inner_rank": 2, "alpha": 12.0, "init": "svd"}
SIZES = torch.tensor([0.01, 0.1, 0.3, 1, 1, 2, 3, 5, 10, 100, 4, 0.5], dtype=DOUBLE)


def network(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(sizes)))


def attached(model: nn.Module, **settings: Any) -> nn.Module:
    """The model with NestedLoRA off its start."""
    la.attach(model, la.NestedLoRA(**SETTINGS | settings))
    move(model)
    return model


def in_double(adapter: NestedLoRAAdapter) -> dict[str, Tensor]:
    """The trained parameters in float64, to put in their place: attached, they stay in float32."""
    return {name: p.detach().double().requires_grad_() for name, p in adapter.adapter_parameters().items()}


def outer(adapter: NestedLoRAAdapter) -> tuple[Tensor, Tensor]:
    """A_o and B_o in float64."""
    return adapter.nested_outer_A.double(), adapter.nested_outer_B.double()


# The outer pair


@pytest.mark.parametrize("split", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("outputs", [8, 12, 20])
def test_at_full_rank_the_outer_pair_is_the_weight(split, outputs):
    weight = torch.randn(outputs, 12, dtype=DOUBLE)
    a, b = outer_pair(weight, SIZES, min(outputs, 12), split)
    assert (b @ a - weight).abs().max() <= 1e-12 * weight.abs().max()


@pytest.mark.parametrize("split", [0.0, 0.3, 1.0])
def test_the_outer_pair_is_the_truncated_decomposition(split):
    """In both forms of the formula; and no matrix of rank 5 is nearer for inputs of these sizes (Eckart-Young)."""
    weight = torch.randn(20, 12, dtype=DOUBLE)
    for sizes in (torch.ones(12, dtype=DOUBLE), SIZES):
        u, values, vh = torch.linalg.svd(weight * sizes, full_matrices=False)
        a, b = outer_pair(weight, sizes, 5, split)
        torch.testing.assert_close(b.abs(), (u[:, :5] * values[:5] ** split).abs(), rtol=1e-9, atol=1e-11)
        other = (values[:5] ** (1 - split))[:, None] * vh[:5] / sizes
        torch.testing.assert_close(a.abs(), other.abs(), rtol=1e-9, atol=1e-11)
        left = torch.linalg.norm((weight - b @ a) * sizes)
        torch.testing.assert_close(left, values[5:].square().sum().sqrt(), rtol=1e-12, atol=0)


def test_it_is_nearer_to_the_weight_on_inputs_of_these_sizes():
    weight, x = torch.randn(20, 12, dtype=DOUBLE), torch.randn(500, 12, dtype=DOUBLE) * SIZES
    errors = []
    for sizes in (SIZES, torch.ones(12, dtype=DOUBLE)):
        a, b = outer_pair(weight, sizes, 5, 0.5)
        errors.append(torch.linalg.norm(x @ (b @ a - weight).T))
    assert errors[0] < 0.9 * errors[1]


def test_channels_without_input_and_weights_of_low_rank_are_allowed():
    sizes = SIZES.clone()
    sizes[3] = 0
    weight = torch.randn(20, 12, dtype=DOUBLE)
    others = torch.arange(12) != 3
    a, b = outer_pair(weight, sizes, 5, 0.5)
    alone = outer_pair(weight[:, others], sizes[others], 5, 0.5)
    assert a.isfinite().all()
    torch.testing.assert_close((b @ a)[:, others], alone[1] @ alone[0], rtol=1e-9, atol=1e-11)
    thin = torch.randn(20, 2, dtype=DOUBLE) @ torch.randn(2, 12, dtype=DOUBLE)
    for split in (0.0, 0.5, 1.0):
        a, b = outer_pair(thin, sizes, 5, split)
        torch.testing.assert_close((b @ a)[:, others], thin[:, others], rtol=1e-9, atol=1e-11)
        assert a.abs().max() < 1e3


# Values and gradients

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (2, 3, 12)),
    "gpt2": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 2, stride=2, padding=1, padding_mode="circular"), (2, 3, 6, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_by_the_formula(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    adapter = attached(nn.Sequential(make()).double(), targets=["0"])[0]
    x, own = torch.randn(shape, dtype=DOUBLE, requires_grad=True), in_double(adapter)
    inner_a, inner_b = own["nested_inner_A"], own["nested_inner_B"]
    y = torch.func.functional_call(adapter, own, (x,))
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, inner_a, inner_b], upstream)

    a, b = outer(adapter)
    update = 2.0 * b @ inner_b @ inner_a @ a
    torch.testing.assert_close(update.detach().float(), adapter.delta_weight().detach(), rtol=1e-5, atol=1e-7)
    weight = adapter.base.weight + (update.T if kind == "gpt2" else update.view(-1, *adapter.base.weight.shape[1:]))
    exact = torch.func.functional_call(adapter.base, {"weight": weight}, (x,))
    expected = torch.autograd.grad(exact, [x, inner_a, inner_b, update], upstream)
    for got, want in zip((y, *gradients), (exact, *expected[:3]), strict=True):
        assert want.abs().max() > 1e-4
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    by_hand = 2.0 * b.T @ expected[3] @ a.T @ inner_a.detach().T
    assert (gradients[2] - by_hand).abs().max() <= 1e-12 * by_hand.abs().max()


def test_with_an_identity_inside_it_is_lora_xs():
    """W0 x + s B_o R A_o x with R trained."""
    (adapter,) = attached(network(12, 8).double(), inner_rank=6)
    own = in_double(adapter)
    own["nested_inner_B"] = torch.eye(6, dtype=DOUBLE)
    x, upstream = torch.randn(5, 12, dtype=DOUBLE), torch.randn(5, 8, dtype=DOUBLE)
    y = torch.func.functional_call(adapter, own, (x,))
    (gradient,) = torch.autograd.grad(y, [own["nested_inner_A"]], upstream)
    (a, b), r = outer(adapter), own["nested_inner_A"].detach().clone().requires_grad_()
    expected = adapter.base(x) + 2.0 * x @ a.T @ r.T @ b.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, [r], upstream)[0], rtol=1e-12, atol=1e-13)


def test_the_count_does_not_depend_on_the_sizes():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 3072))
    report = la.attach(model, la.NestedLoRA(rank=614, inner_rank=16))
    assert [count for _, _, count in report.adapters] == [19_648, 19_648]


def test_dropout_acts_on_the_branch_alone_and_only_in_training():
    (adapter,) = attached(network(12, 8), dropout=0.5)
    x = torch.ones(2000, 12)
    plain, trained = adapter.eval()(x), adapter.train()(x)
    assert torch.equal(adapter.eval()(x), plain)
    assert not torch.equal(trained, plain)
    torch.testing.assert_close(trained.mean(0), plain.mean(0), rtol=0.1, atol=0.05)
    with torch.no_grad():
        adapter.nested_inner_B.zero_()
    assert torch.equal(adapter.train()(x), adapter.base(x))
    adapter.read_as_weight = True
    with pytest.raises(la.AdapterError, match=r"dropout 0\.5 cannot act; set dropout=0"):
        _ = adapter.weight


# Calibration


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_calibration_measures_the_channels(kind):
    """Over batches of unlike lengths, and with a channel that is always 0."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    la.attach(model, la.NestedLoRA(**SETTINGS | {"init": "awsvd", "activation_power": 0.7, "targets": ["0"]}))
    channel = 1 if kind == "conv2d" else -1
    scale = (torch.arange(shape[channel]) + 0.0).view([-1] + [1] * (2 if kind == "conv2d" else 0))
    batches = [scale * torch.randn(rows, *shape[1:]) for rows in (2, 5)]
    assert model[0].awaits_calibration
    la.calibrate(model, batches)
    assert not model[0].awaits_calibration
    rows = torch.cat([batch.movedim(channel, -1).flatten(0, -2) for batch in batches]).double()
    means = rows.abs().mean(0)
    sizes = (means / means.mean()) ** 0.7
    if kind == "conv2d":
        sizes = sizes.repeat_interleave(4)
    expected = outer_pair(model[0].base.weight.detach().flatten(1), sizes.float(), 6, 0.5)
    for found, want in zip(outer(model[0]), expected, strict=True):
        torch.testing.assert_close(found.float(), want, rtol=1e-4, atol=1e-5)
    plain = outer_pair(model[0].base.weight.detach().flatten(1), torch.ones(len(sizes)), 6, 0.5)
    assert not torch.allclose(model[0].nested_outer_B, plain[1], atol=0.05)


def test_calibration_comes_once_and_before_training():
    model, batches = network(12, 8), [torch.randn(4, 12)]
    la.attach(model, la.NestedLoRA(**SETTINGS | {"init": "awsvd"}))
    start = model.eval()(batches[0])
    with pytest.raises(la.AdapterError, match=r"'0' has init='awsvd' and was not calibrated; call .*init='svd'"):
        model.train()(batches[0])
    with pytest.raises(la.AdapterError, match="the inputs seen by '0' are all zero or not finite"):
        la.calibrate(model, [torch.zeros(4, 12)])
    la.calibrate(model, batches)
    assert torch.equal(model(batches[0]), start)
    move(model)
    with pytest.raises(la.AdapterError, match="'0' has been trained: calibrating now would change its function"):
        la.calibrate(model, batches)


# Files


def test_files_hold_the_outer_pair(tmp_path):
    """It is neither computed nor measured again, and tells what was learned without the model."""
    directory = tmp_path / "directory"
    task, path = checkpoint(tmp_path / "run", Task(methods=la.NestedLoRA(rank=3, inner_rank=2)))
    adapters = dict(la.adapters(task.net))
    assert all(adapter.nested_calibrated and adapter.nested_outer_A.any() for adapter in adapters.values())
    la.save_adapters(task.net, directory)
    again = Net()
    la.load_adapters(again, directory)
    assert not any(adapter.awaits_calibration for _, adapter in la.adapters(again))
    x = torch.randn(3, 8)
    assert torch.equal(again.eval()(x), task.net.eval()(x))
    for place in (directory, path):
        for name, layer in read_saved(place).layers.items():
            expected = adapters[name].delta_weight()
            assert expected.any()
            torch.testing.assert_close(layer.adapter.delta_weight(), expected, rtol=0, atol=0)
            update = layer.adapter.low_rank_update()
            assert update.rank == 2
            torch.testing.assert_close(update.scale * update.b @ update.a, expected.detach())
            size = (expected.norm() / adapters[name].weight.norm()).item()
            assert adapters[name].statistics() == {"relative_norm": pytest.approx(size, rel=1e-5)}


def test_another_base_gives_another_outer_pair_until_training_begins():
    model, base = network(12, 8), nn.Sequential(nn.Linear(12, 8))
    la.attach(model, la.NestedLoRA(**SETTINGS))
    model.load_state_dict(base.state_dict(), strict=False)
    for found, want in zip(outer(model[0]), outer_pair(base[0].weight, torch.ones(12), 6, 0.5), strict=True):
        torch.testing.assert_close(found.float(), want)
    move(model)
    before = model[0].nested_outer_A.clone()
    model.load_state_dict(network(12, 8).state_dict(), strict=False)
    assert torch.equal(model[0].nested_outer_A, before)


def test_a_damaged_file_is_refused():
    adapter = attached(network(12, 8))[0]
    tensors, method = adapter.adapter_tensors(), la.NestedLoRA(**SETTINGS)
    for broken in (torch.zeros(6), torch.zeros(0, 8)):
        with pytest.raises(la.AdapterError, match=r"0\.nested_outer_B is missing or no matrix"):
            method.placeholder("0", tensors | {"nested_outer_B": broken}, {})


# Beside others


def test_bitfit_on_the_same_layer():
    model, x = network(12, 8), torch.randn(3, 12)
    la.attach(model, [la.NestedLoRA(**SETTINGS), la.BitFit()])
    move(model)
    (adapter,) = model
    y = model(x)
    expected = x @ (adapter.base.weight + adapter.delta_weight()).T + adapter.bias + adapter.delta_bias
    torch.testing.assert_close(y, expected)
    la.merge(model)
    torch.testing.assert_close(model(x), y)


@pytest.mark.slow  # importing bitsandbytes takes seconds
def test_a_base_in_4_bit():
    quantised = pytest.importorskip("tests.methods.quantised", exc_type=ImportError)
    model, x = quantised.network(), quantised.inputs()
    start = model(x)
    la.attach(model, la.NestedLoRA(**SETTINGS))
    assert torch.equal(model(x), start)
    move(model)
    adapter = model[0]
    weight = quantised.dequantised(adapter.weight)
    a, b = outer_pair(weight, torch.ones(128, dtype=DOUBLE), 6, 0.5)
    found = outer(adapter)
    torch.testing.assert_close(found[1] @ found[0], b @ a, rtol=1e-4, atol=1e-5)
    exact = x.double() @ (weight + adapter.delta_weight(DOUBLE)).T + adapter.bias.double()
    y = adapter(x)
    assert quantised.error(y, exact) <= 1e-6
    assert la.merge(model).dequantised == ["0", "2"]


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 must be a whole number, at least 1"),
        ({"inner_rank": 7}, "inner_rank 7 must be a whole number, at least 1 and at most 6"),
        ({"alpha": 0.0}, "alpha 0.0 must be a finite number other than 0"),
        ({"init": "pissa"}, "init 'pissa' must be 'awsvd' or 'svd'"),
        ({"activation_power": -1.0}, "activation_power -1.0 must be a finite number from 0 to 4"),
        ({"split": 1.5}, "split 1.5 must be a finite number from 0 to 1"),
        ({"dropout": 1.0}, r"dropout 1.0 must lie in \[0, 1\)"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(la.AdapterError, match=message):
        la.NestedLoRA(**SETTINGS | settings)


def broken() -> nn.Linear:
    layer = nn.Linear(12, 8)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), "'0' is a convolution in groups"),
        (nn.Embedding(8, 8), "'0' is neither: an embedding"),
        (nn.Linear(12, 5), r"rank 6 exceeds the size of '0' \(5 x 12\)"),
        (broken(), "the weight of '0' has values that are not finite"),
    ],
    ids=["groups", "embedding", "rank", "nan"],
)
def test_layers_that_cannot_carry_it(layer, message):
    model = nn.Sequential(layer)
    with pytest.raises(la.AdapterError, match=message):
        la.attach(model, la.NestedLoRA(**SETTINGS, targets=["0"]))
    assert model[0] is layer
