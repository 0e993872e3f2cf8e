"""Averages of weights keep the constants and the annealing of the model that they average."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

import lit_adapters as la
from tests.lightning.tiny_task import Net, nora


class AverageByData:
    """As many projects write it, ema-pytorch among them; PyTorch does not count such writes."""

    def __init__(self, model):
        self.module = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model):
        for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.1)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            if mine.is_floating_point():
                mine.data.lerp_(theirs.data, 0.1)


AVERAGES = {
    "by data": AverageByData,
    "swa": lambda m: AveragedModel(m),
    "swa with buffers": lambda m: AveragedModel(m, use_buffers=True),
    "swa one by one": lambda m: AveragedModel(m, avg_fn=get_swa_avg_fn(), use_buffers=True),
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema with buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "ema one by one": lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    "timm": lambda m: ModelEmaV3(m, decay=0.9),
    "timm without buffers": lambda m: ModelEmaV3(m, decay=0.9, exclude_buffers=True),
    "timm one by one": lambda m: ModelEmaV3(m, decay=0.9, foreach=False),
    "timm of old": lambda m: ModelEmaV2(m, decay=0.9),
}
METHODS = {
    "afa": lambda: la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=0.8)),
    "nora": nora,
    "vera": lambda: la.VeRA(rank=4),
    "both": lambda: [nora(), la.AFALoRA(rank=2)],
}
STEPS = 6


def averaged(method, average):
    """A model after a few annealed steps, and its average; everything is averaged once after the last step."""
    net = Net()
    la.attach(net, METHODS[method](), train=["head"])
    la.calibrate(net, [torch.randn(8, 8)])
    mean = AVERAGES[average](net)
    update = mean.update_parameters if isinstance(mean, AveragedModel) else mean.update
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        la.set_progress(net, (step + 1) / STEPS)
        update(net)
    return net, mean


def assert_equal_buffers(first, second):
    pairs = list(zip(la.adapters(first), la.adapters(second), strict=True))
    for (name, a), (_, b) in pairs:
        own, others = a.adapter_tensors(), b.adapter_tensors()
        for key in own.keys() - a.adapter_parameters().keys():
            assert torch.equal(own[key], others[key]), (name, key)
    assert any(
        not torch.equal(parameter, b.adapter_parameters()[key])
        for (_, a), (_, b) in pairs
        for key, parameter in a.adapter_parameters().items()
    )


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("method", METHODS)
def test_buffers_are_the_models_own(method, average):
    net, mean = averaged(method, average)
    assert_equal_buffers(net, mean.module)
    state = mean.module.state_dict()
    assert {v.item() for k, v in state.items() if k.endswith(".beta")} <= {0.0}
    assert all(v.dtype == torch.bool for k, v in state.items() if k.endswith(".calibrated"))


@pytest.mark.parametrize("average", AVERAGES)
def test_the_average_is_linear_at_the_end(average):
    """A forward pass alone, without anything that reads beta before it."""
    _, mean = averaged("afa", average)
    x = torch.randn(5, 8)
    with torch.no_grad():
        y = mean.module.eval()(x)
    merged = copy.deepcopy(mean.module)
    la.merge(merged)
    torch.testing.assert_close(merged(x), y)


def test_the_average_outlives_the_model():
    net, mean = averaged("afa", "timm")
    del net
    assert all(a.beta.item() == 0.0 for _, a in la.adapters(mean.module))


def test_a_copy_of_an_average_and_a_file_of_it():
    net, mean = averaged("both", "ema with buffers")
    second = copy.deepcopy(mean)
    assert_equal_buffers(net, second.module)


def test_a_plain_copy_is_independent():
    net = Net()
    la.attach(net, METHODS["afa"](), train=["head"])
    kept = copy.deepcopy(net)
    la.set_progress(net, 1.0)
    with torch.no_grad():
        kept.eval()(torch.randn(2, 8))
    assert {a.beta.item() for _, a in la.adapters(kept)} == {1.0}
    for _, adapter in la.adapters(kept):
        adapter.beta.zero_()
    la.merge(kept)


def test_a_copy_that_trains_is_independent():
    net = Net()
    la.attach(net, [nora(), METHODS["afa"]()], train=["head"])
    own = copy.deepcopy(net)
    optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.1)
    for beta in (0.5, 0.25):
        own(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        for _, adapter in la.adapters(own):
            if adapter.schedule is not None:
                adapter.beta.fill_(beta)  # annealed by hand
    assert {a.beta.item() for _, a in la.adapters(own) if a.schedule is not None} == {0.25}


def test_a_loaded_average_goes_on_following():
    net, mean = averaged("afa", "timm")
    again = ModelEmaV3(net, decay=0.9)
    again.load_state_dict(mean.state_dict())
    la.set_progress(net, 0.4)
    again.update(net)
    assert {a.beta.item() for _, a in la.adapters(again.module)} == {0.5}


@pytest.mark.parametrize("method", [la.DoRA(rank=2), la.LoRAN(rank=2), nora()])
def test_an_average_computes_with_its_present_values(method):
    net = Net()
    la.attach(net, method)
    mean, x = AverageByData(net), torch.randn(4, 8)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.3)
        mean.module(x)
        mean.update(net)
        assert torch.equal(mean.module(x), copy.deepcopy(mean.module).eval()(x))
