"""`to_lora`: exact where the update has the rank, the best approximation elsewhere."""

import peft
import pytest
import torch
from torch import nn

import lit_adapters as la
from tests.matrix import ALL, MODELS, adapted, build, move

# The rank of their updates in tests/matrix.py, 0 for more. Sinter with the published constants is nearly linear.
EXACT = {"lora": 2, "loran": 2, "afa": 2, "lora2": 2, "nested_lora": 2, "rslora": 3, "dora-pissa": 0, "vera": 0}
EXACT |= {"dora": 0, "loran-sine": 0}


@pytest.mark.parametrize("method", EXACT)
def test_the_model_computes_what_the_report_says(tmp_path, method):
    model = adapted("llama", method).eval()
    la.set_progress(model, 1.0)
    updates = {n: a.delta_weight(torch.float64).detach() for n, a in la.adapters(model)}
    before = MODELS["llama"].run(model)
    rank = EXACT[method] or 4
    report = la.to_lora(model, rank)
    assert {a.method for _, a in la.adapters(model)} == {"lora"}
    for name, adapter in la.adapters(model):
        lost = (updates[name] - adapter.delta_weight(torch.float64)).norm() / updates[name].norm()
        assert report.errors[name] == pytest.approx(lost.item(), rel=1e-3, abs=1e-6)
        singular = torch.linalg.svdvals(updates[name])
        assert report.errors[name] == pytest.approx(
            (singular[rank:].norm() / singular.norm()).item(), rel=1e-3, abs=1e-6
        )
    if EXACT[method]:
        assert report.worst < 1e-4
        torch.testing.assert_close(MODELS["llama"].run(model), before, rtol=1e-4, atol=5e-5)
    else:
        assert 1e-3 < report.worst < 1
    la.export_peft(model, tmp_path)
    other = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(MODELS["llama"].run(other), MODELS["llama"].run(model), rtol=1e-4, atol=1e-5)
    assert f"LoRA of rank {rank}" in str(report)


def test_the_full_rank_loses_nothing():
    model = adapted("gpt2", "loran").eval()
    before = MODELS["gpt2"].run(model)
    report = la.to_lora(model, 1000)
    assert report.worst < 1e-6
    torch.testing.assert_close(MODELS["gpt2"].run(model), before, rtol=1e-4, atol=1e-5)


def test_what_is_refused():
    for method, message in (
        ("nora", r"which is no update of a weight alone; call lit_adapters\.linearise first"),
        ("bitfit", "which is no update of a weight alone; exclude it"),
        ("afa", "nonlinear"),
    ):
        model = adapted("llama", method)
        kinds = [type(a) for _, a in la.adapters(model)]
        with pytest.raises(la.AdapterError, match=message):
            la.to_lora(model, 2)
        assert [type(a) for _, a in la.adapters(model)] == kinds
    with pytest.raises(la.AdapterError, match="has no adapters"):
        la.to_lora(build("llama"), 2)
    model = build("llama")
    la.attach(model, ALL["lora"])
    la.merge(model, unload=False)
    with pytest.raises(la.AdapterError, match="is merged"):
        la.to_lora(model, 2)


class Twice(nn.Module):
    """One layer at two places, and a layer whose name is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.block = nn.Linear(6, 6), nn.Module()
        self.block.proj = nn.Linear(6, 6)
        self.again = self.shared = nn.Linear(6, 6)

    def forward(self, x):
        return self.again(self.block.proj(self.shared(self.proj(x))))


def test_places_and_names(tmp_path):
    model = Twice()
    method = la.LoRAN(rank=2, targets=r"proj|again|shared", frequency=30.0, function="sine")
    la.attach(model, method, train=["block.proj"])
    move(model)
    x = torch.randn(5, 6)
    before = model(x)
    assert la.to_lora(model, 6).worst < 1e-6
    assert [name for name, _ in la.adapters(model)] == ["proj", "again"]
    assert model.again is model.shared
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_what_was_unfrozen_stays_in_the_files(tmp_path):
    """A module that the user unfroze after `attach` and that has trained since."""
    model = build("llama")
    la.attach(model, ALL["vera"])
    model.model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        model.model.norm.weight += 0.5
    la.to_lora(model, 3)
    assert model.model.norm.weight.requires_grad
    la.save_adapters(model, tmp_path)
    loaded = build("llama")
    la.load_adapters(loaded, tmp_path)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
