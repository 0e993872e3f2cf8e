"""peft's methods as ours: every type of its registry does what every method does."""

import copy
import pickle

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import lit_adapters as la
from tests.matrix import changed_tensors, move
from tests.methods.peft_types import (
    NO_HALF,
    NO_PICKLE,
    NOT_MERGED,
    REFUSED,
    RUNNING,
    TOKENS,
    attached,
    method,
    network,
)


def test_every_type_of_peft_is_here():
    of_peft = {kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if not kind.startswith("LIT_")}
    assert of_peft <= RUNNING.keys() | REFUSED.keys()


@pytest.mark.filterwarnings("ignore:.*holds 2 layers that keep all their ranks")  # AdaLoRA, moved by hand
@pytest.mark.parametrize("kind", [k for k in RUNNING if k in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_every_type_that_runs(kind, tmp_path):
    model, config = network(), method(kind)
    before, base = copy.deepcopy(model.state_dict()), model(TOKENS)
    report = la.attach(model, config, train=["head"])
    adapters = dict(la.adapters(model))
    own = {f"{n}.{key}" for n, a in adapters.items() for key in a.adapter_parameters()}
    assert own | {"head.weight", "head.bias"} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert report.adapter_parameters == sum(model.get_parameter(n).numel() for n in own) > 0
    la.verify(model, TOKENS)

    start = model(TOKENS)
    with torch.no_grad():
        for name in sorted(own):  # the order of a set differs between processes, and with it the values
            model.get_parameter(name).add_(0.05 * torch.randn_like(model.get_parameter(name)))
    moved = model(TOKENS)
    assert (moved - start).abs().max() > 1e-4
    moved.square().sum().backward()
    assert all(model.get_parameter(n).grad.any() for n in own)
    with la.disabled(model):
        assert torch.equal(model(TOKENS), base)
    assert not [k for k, v in before.items() if not torch.equal(model.state_dict()[k], v)]

    la.save_adapters(model, tmp_path)
    torch.manual_seed(9)
    loaded = network()
    la.load_adapters(loaded, tmp_path)
    assert torch.equal(loaded(TOKENS), moved)
    assert not changed_tensors(model.state_dict(), loaded.state_dict())
    twin = copy.deepcopy(model)
    assert torch.equal((twin if kind in NO_PICKLE else pickle.loads(pickle.dumps(twin)))(TOKENS), moved)
    move(twin)
    assert torch.equal(model(TOKENS), moved)

    if kind not in NO_HALF:
        half = twin.to(torch.bfloat16)
        assert half(TOKENS).dtype == torch.bfloat16
        tensors = {f"{n}.{k}": t for n, a in la.adapters(half) for k, t in a.adapter_tensors().items()}
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}

    la.detach(model)
    assert not changed_tensors(before, model.state_dict())
    assert torch.equal(model(TOKENS), base)
    assert [type(m) for m in model.modules()] == [type(m) for m in network().modules()]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [k for k in RUNNING if k in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_merging(kind):
    model = attached(kind)
    moved, pretrained = model(TOKENS), copy.deepcopy(model.state_dict())
    if kind in NOT_MERGED:
        for unload in (True, False):
            with pytest.raises(la.AdapterError, match=rf"peft cannot merge 'fc1' \(.*{NOT_MERGED[kind]}"):
                la.merge(model, unload=unload)
        assert torch.equal(model(TOKENS), moved)
        return
    report = la.merge(model, unload=False)
    merged = model(TOKENS)
    assert (merged - moved).abs().max() <= 5e-6 * moved.abs().max()
    assert report.max_rel_error <= 5e-7
    assert report.merged == [name for name, _ in la.adapters(model)]
    assert not changed_tensors(pretrained, model.state_dict())
    with pytest.raises(la.AdapterError, match=r"call lit_adapters.unmerge\(model\) before loading"):
        model.load_state_dict(pretrained)
    la.unmerge(model)
    assert torch.equal(model(TOKENS), moved)
    la.merge(model)
    assert torch.equal(model(TOKENS), merged)
    assert list(model.state_dict()) == list(network().state_dict())


def test_the_error_of_merging_is_measured():
    model = network().to(torch.bfloat16)
    la.attach(model, la.Peft(peft.LoraConfig(r=2, target_modules=["fc1"])))
    move(model)
    tuner = dict(la.adapters(model))["fc1"].tuner
    exact = model.fc1.weight.double() + tuner.scaling["default"] * (
        tuner.lora_B["default"].weight.double() @ tuner.lora_A["default"].weight.double()
    )
    report = la.merge(model)
    error = (model.fc1.weight.double() - exact).abs().max().item()
    assert report.max_abs_error == pytest.approx(error)
    assert 0 < report.max_rel_error < 2**-8
