"""NoRA and GroupAffine with one function for each channel."""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.learned import subspace
from lit_adapters.learned.figures import functions_figure
from lit_adapters.learned.subspace_figures import drift_map
from lit_adapters.methods.method import to_methods
from tests.matrix import build, move
from tests.methods.test_nora import oracle

METHODS = [
    la.NoRA(groups="channels", rank=None, base="anchored"),
    la.NoRA(groups="channels", rank=3),
    la.GroupAffine(groups="channels"),
]


def network() -> nn.Sequential:
    """Two activations of different width."""
    layers = nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 2)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("method", METHODS, ids=["direct", "rank 3", "affine"])
def test_each_layer_has_as_many_functions_as_channels(method, tmp_path):
    torch.manual_seed(0)
    net, x = network(), torch.randn(5, 6)
    la.attach(net, method)
    assert [a.functions()[2].shape[0] for _, a in la.adapters(net)] == [24, 40]
    move(net)
    la.save_adapters(net, tmp_path)
    loaded = network()
    loaded.load_state_dict({k: v for k, v in net.state_dict().items() if k in loaded.state_dict()})
    la.load_adapters(loaded, tmp_path)
    assert torch.equal(loaded(x), net(x))
    saved = read_saved(tmp_path).layers["3"].adapter
    assert saved.groups == 40
    assert to_methods(method.to_config()) == [method]


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("base", ["anchored", "rational"])
def test_value_and_gradient_against_float64(base, rank):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 2))
    la.attach(net, la.NoRA(groups="channels", rank=rank, base=base))
    move(net)
    adapter, x, grad = net[1], (2 * torch.randn(2, 5, 24)).requires_grad_(), torch.randn(2, 5, 24)
    parameters = adapter.adapter_parameters()
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, *parameters.values()], grad)
    exact_x = x.detach().double().requires_grad_()
    factors = {n: p.detach().double().requires_grad_() for n, p in parameters.items()}
    exact_y = oracle(adapter, exact_x, factors)
    exact = torch.autograd.grad(exact_y, [exact_x, *factors.values()], grad.double())
    assert (y - exact_y).abs().max() <= 1e-6 * exact_y.abs().max()
    for got, expected in zip(actual, exact, strict=True):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("rank", [None, 3])
def test_a_step_of_adam_moves_the_output_as_far_as_with_few_groups(rank):
    """The common factor `scale` needs no change where there are more functions."""
    torch.manual_seed(0)
    x, labels, moved = torch.randn(512, 16), torch.randint(10, (512,)), {}
    first, last = nn.Linear(16, 256), nn.Linear(256, 10)
    for groups in (8, "channels"):
        torch.manual_seed(1)
        net = nn.Sequential(first, nn.GELU(), last)
        la.attach(net, la.NoRA(groups=groups, rank=rank, base="anchored"))
        before = net[1](first(x)).detach()
        optimizer = torch.optim.Adam(net[1].adapter_parameters().values(), 1e-2)
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
        moved[groups] = (net[1](first(x)) - before).square().mean().sqrt().item()
        la.detach(net)
    assert moved["channels"] == pytest.approx(moved[8], rel=0.4)


def test_a_layer_whose_width_is_not_known_is_refused():
    with pytest.raises(la.AdapterError, match=r"cannot tell how many channels 'model.layers.0.mlp.act_fn' has; set"):
        la.attach(build("llama"), la.NoRA(groups="channels"))
    with pytest.raises(la.AdapterError, match=r"groups 'channel' must be a whole number, .* or 'channels'"):
        la.GroupAffine(groups="channel")


def test_figures_of_many_functions_show_some_of_them(monkeypatch):
    """A column for each of several thousand functions would be a picture that cannot be drawn."""
    monkeypatch.setattr(subspace, "_MOST_FUNCTIONS", 50)
    net = nn.Sequential(nn.Linear(2, 200), nn.GELU(), nn.Linear(200, 2))
    la.attach(net, la.GroupAffine(groups="channels"))
    adapter = net[1]
    with torch.no_grad():
        adapter.output_shift[123] = 1.0
    with mpl.rc_context({"backend": "agg"}):
        image = drift_map({"1": adapter}).axes[0].images[0].get_array()
        lines = functions_figure({"1": adapter}).axes[0].lines
    assert image.shape == (1, 50)
    assert (image > 0).sum() == 1
    assert len(lines) <= 70
    assert subspace.learned_subspace([adapter]).stack.shape[0] == 50
