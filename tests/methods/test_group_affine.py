"""GroupAffine: values and gradients in float64, the exact start, groups, what it reports and what merging leaves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lit_adapters as la
from lit_adapters.activations import AffineActivation
from lit_adapters.methods.group_affine import GroupAffineActivation
from lit_adapters.optimizers import parameter_groups


def network(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 24), activation or nn.GELU(), nn.Linear(24, 2))


def adapted(moved: float = 0.3, activation: nn.Module | None = None, **settings: object) -> GroupAffineActivation:
    net = network(activation)
    la.attach(net, la.GroupAffine(**{"groups": 4} | settings))
    ((_, adapter),) = la.adapters(net)
    with torch.no_grad():
        for parameter in adapter.adapter_parameters().values():
            parameter.add_(moved * torch.randn_like(parameter))
    return adapter


def expected(x: torch.Tensor, parameters: list[torch.Tensor], channel_dim: int) -> torch.Tensor:
    """The equation, one group after the other."""
    u, v, s, t = parameters
    pieces = x.chunk(len(u), channel_dim)
    done = [F.gelu((1 + u[g]) * piece + v[g]) * (1 + s[g]) + t[g] for g, piece in enumerate(pieces)]
    return torch.cat(done, channel_dim)


@pytest.mark.parametrize("groups", [4, 24])
@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 5, 24), -1), ((3, 24, 4), 1), ((24,), 0)])
def test_value_and_gradient_against_float64(groups, shape, channel_dim):
    adapter = adapted(groups=groups, channel_dim=channel_dim)
    x = (2 * torch.randn(shape)).requires_grad_()
    grad = torch.randn(shape)
    parameters = list(adapter.adapter_parameters().values())
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, *parameters], grad)
    exact = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    exact_y = expected(exact[0], exact[1:], channel_dim)
    wanted = torch.autograd.grad(exact_y, exact, grad.double())
    assert (y - exact_y).abs().max() <= 1e-6 * exact_y.abs().max()
    for got, want in zip(actual, wanted, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(inplace=True), nn.Mish()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_start_is_the_activation_itself(activation, dtype):
    adapter = adapted(0.0, activation)
    x = torch.cat([torch.linspace(-50, 50, 24 * 40), torch.tensor([0.0, 6e4, -6e4, 1e-7] * 6)]).to(dtype).view(-1, 24)
    y = adapter(x)
    assert torch.equal(y, activation(x.clone()))
    assert y.dtype == dtype


def test_bfloat16_rounds_the_exact_values_only():
    """A gain of 1 + 3e-3 is not representable in bfloat16, and acts all the same."""
    adapter = adapted(0.0, nn.ReLU())
    with torch.no_grad():
        adapter.output_gain.fill_(3e-3)
    x = torch.rand(400, 24).to(torch.bfloat16)
    assert torch.equal(adapter(x), (x.double() * (1 + adapter.output_gain[0].double())).to(torch.bfloat16))
    assert not torch.equal(adapter(x), x)


def test_a_group_changes_its_own_channels_only():
    adapter, x = adapted(0.0), torch.randn(10, 24)
    before = adapter(x)
    with torch.no_grad():
        adapter.input_shift[1] = 1.0
    changed = (adapter(x) != before).any(0)
    assert changed.tolist() == [6 <= channel < 12 for channel in range(24)]


def test_four_parameters_a_group_that_do_not_decay():
    net = network()
    report = la.attach(net, la.GroupAffine(groups=8), train=["2"])
    assert report.adapter_parameters == 32
    groups = {g["name"]: g["weight_decay"] for g in parameter_groups(net, 1e-2, 0.1, {"group_affine": 2.0})}
    assert groups == {"group_affine": 0.0, "head": 0.1}


def test_functions_and_statistics_follow_the_parameters():
    adapter = adapted(0.0)
    grid, initial, current = adapter.functions()
    assert torch.equal(initial, F.gelu(grid))
    assert torch.equal(current, initial.expand(4, -1))
    assert adapter.statistics()["sup_drift"] == 0.0
    then = tuple(c.detach().clone() for c in adapter.coefficients())
    with torch.no_grad():
        adapter.output_shift[2] = 0.5
        adapter.input_gain[1] = 1.0
    changes = adapter.learned_change(grid)
    assert not changes[[0, 3]].any()
    assert (changes[2] - 0.5).abs().max() < 1e-12
    torch.testing.assert_close(changes[1], F.gelu(2 * grid) - F.gelu(grid))
    assert not adapter.learned_change(grid, then).any()
    statistics = adapter.statistics()
    assert statistics["relative_max_slope"] == pytest.approx(2.0, abs=1e-2)
    assert statistics["drift"] > 0.5


def test_an_activation_with_a_weight_of_its_own():
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU())
    la.attach(model, la.GroupAffine(groups=2))
    adapter = model[1]
    with torch.no_grad():
        adapter.output_shift[1] = 0.5
    grid, initial, current = adapter.functions()
    torch.testing.assert_close(initial, torch.where(grid < 0, 0.25 * grid, grid))
    torch.testing.assert_close(current[1], initial + 0.5)
    assert adapter.statistics()["sup_drift"] == pytest.approx(0.5)


def test_calibration_measures_the_inputs_and_keeps_the_function():
    net = network()
    la.attach(net, la.GroupAffine(groups=4))
    adapter, x = net[1], torch.randn(500, 6)
    assert not adapter.awaits_calibration
    with torch.no_grad():
        adapter.input_shift += 0.1
    before = net(x)
    la.calibrate(net, [x])
    assert adapter.calibrated
    assert torch.equal(net(x), before)
    h = net[0](x).detach().double()
    mean = (adapter.grid() * adapter.density.double()).sum()
    assert mean.item() == pytest.approx(h.mean().item(), abs=0.02)


def test_merging_leaves_the_same_function():
    net = network(nn.SiLU(inplace=True))
    la.attach(net, la.GroupAffine(groups=4))
    with torch.no_grad():
        for parameter in net[1].adapter_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(7, 6)
    before = net(x)
    report = la.merge(net)
    assert report.kept == ["1"]
    assert type(net[1]) is AffineActivation
    assert torch.equal(net(x), before)
    assert torch.equal(copy.deepcopy(net)(x), before)
    net.requires_grad_(True)
    net(x).sum().backward()
    assert net[1].before.grad.any(1).all()
    assert {g["weight_decay"] for g in parameter_groups(net, 1e-2, 0.1)} == {0.0, 0.1}
