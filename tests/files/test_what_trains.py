"""Whatever training changed is saved, and a base with other frozen weights is noticed."""

import warnings

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.files.fingerprint import differing, fingerprint


def base(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))


def adapted():
    model = base()
    la.attach(model, la.LoRA(rank=2, targets=["1"]), train=["4"])
    return model


def train(model, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()


def unfreeze(model):
    model[0].requires_grad_(True)
    train(model)


def unfreeze_and_freeze_again(model):
    unfreeze(model)
    model[0].requires_grad_(False)


def unfreeze_statistics(model):
    model[2].requires_grad_(True)
    train(model)


def unfreeze_one_parameter(model):
    train(model)
    model[1].bias.requires_grad_(True)
    train(model, 1)


def unfreeze_all(model):
    model.requires_grad_(True)
    train(model)


@pytest.mark.parametrize(
    "happens", [unfreeze, unfreeze_and_freeze_again, unfreeze_statistics, unfreeze_one_parameter, unfreeze_all]
)
def test_what_was_unfrozen_after_attach_comes_back(happens, tmp_path):
    model = adapted()
    happens(model)
    la.save_adapters(model, tmp_path / "first")
    loaded, x = base(), torch.randn(5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = la.load_adapters(loaded, tmp_path / "first")
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    assert trains == {n: p.requires_grad for n, p in loaded.named_parameters()}
    assert report.trained

    la.save_adapters(loaded, tmp_path / "second")
    again = base()
    la.load_adapters(again, tmp_path / "second")
    assert torch.equal(again.eval()(x), model(x))


def test_a_base_that_is_loaded_or_cast_after_attach_has_not_trained(tmp_path):
    model = adapted()
    model.load_state_dict(base(seed=1).state_dict(), strict=False)
    model.to(torch.bfloat16)
    before = la.files.adapters.adapter_state(model).keys()
    train(model.float())
    model.load_state_dict(model.state_dict())
    la.save_adapters(model, tmp_path)
    _, tensors = la.files.adapters.read_directory(tmp_path)
    assert tensors.keys() == before


def test_a_weight_without_values_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = base()
    la.attach(model, la.LoRA(rank=2, targets=["1"]))
    with pytest.raises(la.AdapterError, match="on the meta device"):
        la.save_adapters(model, tmp_path)


@pytest.mark.parametrize("name", [n for n, _ in base().named_parameters() if not n.startswith("4")])
def test_one_changed_value_of_the_base_is_noticed(name, tmp_path):
    la.save_adapters(adapted(), tmp_path)
    for place in (0, 3, -1):
        other = base()
        with torch.no_grad():
            other.get_parameter(name).view(-1)[place] += 0.5
        with pytest.warns(UserWarning, match=f"trained on other weights of this architecture \\('{name}'\\)"):
            la.load_adapters(other, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_base_does_not_matter(dtype, tmp_path, recwarn):
    la.save_adapters(adapted(), tmp_path)
    la.load_adapters(base().to(dtype), tmp_path)
    other = base().to(dtype)
    with torch.no_grad():
        other[1].weight.mul_(1.5)
    assert not recwarn
    with pytest.warns(UserWarning, match="other weights"):
        la.load_adapters(other, tmp_path)


def test_rows_and_places_of_large_weights_count():
    torch.manual_seed(0)
    weight = torch.randn(300, 512)
    saved = fingerprint({"w": weight})
    assert differing(saved, {"w": weight.clone().t().contiguous().t()}) == []
    assert differing(saved, {"w": weight.to(torch.bfloat16)}) == []
    swapped = weight[torch.randperm(300)]
    assert differing(saved, {"w": swapped}) == ["w"]
    for place in torch.randint(weight.numel(), (20,)):
        other = weight.clone()
        other.view(-1)[place] += 0.1
        assert differing(saved, {"w": other}) == ["w"]
    assert differing(saved, {"w": weight.to("meta")}) == []
    assert differing(saved, {"w": weight[1:]}) == ["w"]
    odd = torch.cat([torch.zeros(3), weight.view(-1)]).to(torch.bfloat16)[3:].view(300, 512)  # not aligned to 8 bytes
    assert differing(saved, {"w": odd}) == []
