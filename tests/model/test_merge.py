"""Merging: the measured error, its report, and weights that cannot take an update."""

import copy

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.model.merge import MergeReport
from tests.matrix import adapted


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)
    la.attach(model, la.LoRA(rank=2))
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            adapter.lora_B.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_measured(dtype):
    model = network(dtype)
    exact = {n: a.weight.double() + a.delta_weight(torch.float64) for n, a in la.adapters(model)}
    report = la.merge(model)
    errors = {n: (model.get_submodule(n).weight.double() - w).abs().max().item() for n, w in exact.items()}
    assert report.max_abs_error == pytest.approx(max(errors.values()))
    assert report.max_rel_error == pytest.approx(max(errors[n] / exact[n].abs().max().item() for n in exact))
    assert report.max_rel_error <= torch.finfo(dtype).eps
    assert (report.max_abs_error > 0) == (dtype != torch.float64)


def test_the_report_can_be_read():
    report = la.merge(adapted("vit", "nora++"))
    assert (len(report.merged), len(report.kept)) == (8, 2)
    assert str(report).startswith("merged 8 layers, error ")
    assert str(report).endswith("2 rational activations stay")
    assert str(MergeReport(0.0, 0.0, ["a"], [])) == "merged 1 layers, error 0.0e+00 (0.0e+00 of |W|)"


def test_a_merged_model_is_an_ordinary_one_again():
    model = network()
    la.merge(model)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(p.requires_grad for p in model.parameters())
    for call in (la.merge, la.unmerge, la.detach):
        with pytest.raises(la.AdapterError):
            call(model)
    la.attach(model, la.LoRA(rank=2))


def test_while_merged_the_model_is_not_attached_to_nor_detached():
    model = network()
    la.merge(model, unload=False)
    with pytest.raises(la.AdapterError, match="already has adapters"):
        la.attach(model, la.LoRA(rank=2))
    with pytest.raises(la.AdapterError, match=r"unmerge\(model\) before detaching"):
        la.detach(model)
    la.unmerge(model)
    la.detach(model)


def test_a_state_dict_holds_the_pretrained_weights_even_while_merged():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    la.merge(model, unload=False)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    with pytest.raises(la.AdapterError, match=r"'0' is merged; call lit_adapters.unmerge\(model\) before loading"):
        model.load_state_dict(before)
    la.unmerge(model)
    model.load_state_dict(before)


def test_merging_survives_a_copy_and_a_cast():
    model, x = network(), torch.randn(5, 6)
    weight = model[0].weight.detach().clone()
    la.merge(model, unload=False)
    twin = copy.deepcopy(model)
    la.unmerge(twin)
    assert torch.equal(twin[0].weight, weight)
    assert model[0].merged
    model.to(torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    la.unmerge(model)
    assert torch.equal(model[0].weight, weight.bfloat16())


@pytest.mark.parametrize("unload", [True, False])
def test_values_that_are_not_finite_are_refused_and_nothing_is_merged(unload):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    la.attach(model, la.LoRA(rank=2))
    with torch.no_grad():
        model[1].lora_B.fill_(float("nan"))
    before = [model[i].base.weight.clone() for i in (0, 1)]
    with pytest.raises(la.AdapterError, match="lora_B of '1' holds values that are not finite"):
        la.merge(model, unload=unload)
    assert all(torch.equal(model[i].base.weight, before[i]) for i in (0, 1))
    la.attach(model, la.LoRA(rank=2), name="other")
    la.use(model, ["default", "other"])
    with pytest.raises(la.AdapterError, match="lora_B of '1' holds values that are not finite"):
        la.merge(model, unload=False)


def test_a_tied_weight_is_refused_and_nothing_is_merged():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 6), "fc": nn.Linear(6, 6), "out": nn.Linear(6, 8, bias=False)})
    model["out"].weight = model["embed"].weight
    la.attach(model, la.LoRA(rank=2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for unload in (True, False):
        with pytest.raises(la.AdapterError, match="'out' and 'embed' have one weight"):
            la.merge(model, unload=unload)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(list(la.adapters(model))) == 2


def test_a_weight_that_is_no_real_number_is_refused():
    model = network()
    model[0].weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(la.AdapterError, match=r"'0' has a weight of torch.uint8: dequantise it first"):
        la.merge(model)
    with pytest.raises(la.AdapterError, match=r"the values of '0', and these are on the meta device"):
        la.merge(network().to("meta"))
