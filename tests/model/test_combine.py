"""Adapters combined into one: by rules for updates of weights, and in the space of functions."""

import copy
import itertools

import pytest
import torch
from torch import nn

import lit_adapters as la
from tests.matrix import METHODS, MODELS, build
from tests.model.test_named import OF_WEIGHTS, move, with_two

RUN = MODELS["llama"].run


def updates(model, name):
    with la.using(model, name):
        return {n: a.delta_weight(torch.float64).detach() for n, a in la.adapters(model)}


def test_a_linear_sum_of_lora_is_exact():
    model, _, _ = with_two("llama", (la.LoRA(rank=2), la.AFALoRA(rank=3, targets=["q_proj", "up_proj"])))
    la.set_progress(model, 1.0)
    a, b = updates(model, "a"), updates(model, "b")
    report = la.combine(model, ["a", "b"], [0.7, -2.0], name="c")
    assert la.in_use(model) == ["c"]
    assert la.adapter_names(model) == ["a", "b", "c"]
    assert report.rank == 5
    assert max(report.weights.values()) == 0.0
    assert "LoRA of rank 5" in str(report)
    made = updates(model, "c")
    assert made.keys() == a.keys()
    for name, update in made.items():
        expected = 0.7 * a[name] - 2.0 * b.get(name, torch.zeros_like(update))
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    for adapter in dict(la.adapters(model)).values():
        assert adapter.rank == (5 if adapter.qualified_name in b else 2)
    la.use(model, ["a", "b"])
    with torch.no_grad():
        together = RUN(model)
        la.combine(model, ["a", "b"], name="d")
        torch.testing.assert_close(RUN(model), together, rtol=1e-5, atol=1e-5)


def ties(parts, density):
    """By its definition, entry by entry."""
    trimmed = []
    for part in parts:
        threshold = sorted(part.abs().flatten().tolist(), reverse=True)[-(-int(density * part.numel()) // 1) - 1]
        trimmed.append(torch.where(part.abs() >= threshold, part, 0.0))
    result = torch.zeros_like(parts[0])
    for i, j in itertools.product(*map(range, result.shape)):
        entries = [t[i, j].item() for t in trimmed]
        total = sum(entries)
        agreeing = [e for e in entries if e != 0 and (e > 0) == (total > 0) and total != 0]
        result[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def test_ties_by_its_definition():
    layer = nn.Sequential(nn.Linear(8, 6))
    for seed, key in enumerate("abc"):
        la.attach(layer, la.LoRA(rank=3, targets=["0"]), name=key)
        move(layer, seed)
    parts = [2.0 * updates(layer, "a")["0"], updates(layer, "b")["0"], updates(layer, "c")["0"]]
    report = la.combine(layer, ["a", "b", "c"], [2.0, 1.0, 1.0], name="d", rule="ties", density=0.25, rank=6)
    expected = ties(parts, 0.25)
    torch.testing.assert_close(updates(layer, "d")["0"], expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert report.weights["0"] == pytest.approx(0.0, abs=1e-12)


def test_dare_keeps_the_mean():
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    la.attach(layer, la.LoRA(rank=4, targets=["0"]), name="a")
    move(layer, 0)
    a = updates(layer, "a")["0"]
    means = torch.zeros_like(a)
    for seed in range(20):
        la.combine(layer, ["a"], name="b", rule="dare", density=0.5, rank=64, seed=seed)
        made = updates(layer, "b")["0"]
        kept = made.abs() > 1e-6 * a.abs().max()
        assert 0.45 < kept.double().mean() < 0.55
        torch.testing.assert_close(made[kept], 2 * a[kept], rtol=1e-3, atol=1e-5 * a.abs().max().item())
        means += made / 20
        la.detach(layer, "b")
    assert (means - a).norm() / a.norm() < 0.3  # each entry has the relative error 1 / sqrt(20)
    la.combine(layer, ["a"], name="b", rule="dare", density=0.5, rank=64, seed=3)
    again = updates(layer, "b")["0"]
    la.combine(layer, ["a"], name="c", rule="dare", density=0.5, rank=64, seed=3)
    assert torch.equal(updates(layer, "c")["0"], again)


@pytest.mark.parametrize("rule", ["linear", "ties", "dare"])
@pytest.mark.parametrize("method", [m for m in OF_WEIGHTS if m not in ("dense_lora", "bitfit", "afa")])
def test_the_error_is_that_of_the_cut(method, rule):
    model, _, _ = with_two("llama", (METHODS[method], la.LoRAN(rank=3)))
    full = la.combine(model, ["a", "b"], name="full", rule=rule, rank=48)
    assert max(full.weights.values()) < 1e-12
    exact = updates(model, "full")
    report = la.combine(model, ["a", "b"], name="cut", rule=rule, rank=4)
    assert report.rank == 4
    for name, update in updates(model, "cut").items():
        lost = ((update - exact[name]).norm() / exact[name].norm()).item()
        assert report.weights[name] == pytest.approx(lost, rel=1e-3)
        assert torch.linalg.matrix_rank(update, rtol=1e-5) <= 4


def test_biases_add_up():
    model, a, b = with_two("llama", ([la.LoRA(rank=2), la.BitFit(add_missing=True)], la.BitFit(add_missing=True)))
    la.combine(model, ["a", "b"], [1.0, 0.5], name="c")
    for name, adapter in la.adapters(model):
        expected = a.get_submodule(name).delta_bias + 0.5 * b.get_submodule(name).delta_bias
        torch.testing.assert_close(adapter.delta_bias, expected)
    with torch.no_grad():
        alone = RUN(model)
        merged = copy.deepcopy(model)
        for other in ("a", "b"):
            la.detach(merged, other)
        la.merge(merged)
        torch.testing.assert_close(RUN(merged), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (la.NoRA(groups=4, base="anchored"), la.NoRA(groups=8, base="anchored")),
        (la.NoRA(groups=4), la.NoRA(groups=4, denominator="sum-of-abs")),
        (la.NoRA(groups=4, denominator="sum-of-abs"), la.GroupAffine(groups=2)),
        (la.GroupAffine(groups=4), la.NoRA(groups=48, rank=None, base="anchored")),
    ],
)
def test_functions_add_up_in_the_space_of_functions(first, second):
    model, _, _ = with_two("llama", (first, second))
    changes = {}
    with la.using(model, "a"):
        grid = next(la.adapters(model))[1].grid()
    for key in "ab":
        with la.using(model, key):
            changes[key] = {n: x.learned_change(grid) for n, x in la.adapters(model)}
    report = la.combine(model, ["a", "b"], [0.5, 1.5], name="c")
    assert report.functions.keys() == changes["a"].keys()
    assert 0 < max(report.functions.values()) < 0.1
    assert "the largest error of a change of functions" in str(report)
    for name, adapter in la.adapters(model):
        a, b = (x[name].repeat_interleave(adapter.groups // len(x[name]), 0) for x in changes.values())
        made = adapter.learned_change(grid)
        wanted = 0.5 * a + 1.5 * b
        weight = adapter.density.double()
        lost = (((made - wanted) ** 2 * weight).sum(1) / (wanted**2 * weight).sum(1)).sqrt().max().item()
        assert report.functions[name] == pytest.approx(lost, rel=1e-6)
    with torch.no_grad():
        assert torch.isfinite(RUN(model)).all()


def test_one_function_alone_stays_as_it_is():
    model, a, _ = with_two("llama", (la.NoRA(groups=4, base="anchored"), la.LoRA(rank=2)))
    report = la.combine(model, ["a"], name="c")
    assert max(report.functions.values()) < 1e-3
    with torch.no_grad():
        torch.testing.assert_close(RUN(model), RUN(a), rtol=1e-3, atol=1e-3)


def test_the_result_is_saved_and_trains(tmp_path):
    model, _, _ = with_two("llama", (METHODS["nora++"], METHODS["lora"]))
    la.combine(model, ["a", "b"], name="c")
    la.save_adapters(model, tmp_path)
    loaded = build("llama").eval()
    la.load_adapters(loaded, tmp_path)
    with torch.no_grad():
        assert torch.equal(RUN(loaded), RUN(model))
    RUN(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_is_refused():
    model, _, _ = with_two("llama", (la.LoRA(rank=2), METHODS["loran"]))
    la.attach(model, METHODS["dense_lora"], name="dense")
    la.attach(model, METHODS["afa"], name="afa")
    la.use(model, "a")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for message, names, kwargs in (
        ("no adapters called 'x'", ["a", "x"], {}),
        ("already has adapters called 'a'", ["a", "b"], {"name": "a"}),
        ("one weight for each", ["a", "b"], {"weights": [1.0]}),
        ("one weight for each", "a", {}),
        ("one weight for each", [], {}),
        ("weights nan", ["a"], {"weights": [float("nan")]}),
        ("rule 'max'", ["a"], {"rule": "max"}),
        ("density 0 would leave nothing", ["a"], {"rule": "ties", "density": 0}),
        ("density 1.5", ["a"], {"rule": "ties", "density": 1.5}),
        ("rank 0", ["a"], {"rank": 0}),
        ("give the rank of the new LoRA", ["a", "b"], {}),
        ("give the rank of the new LoRA", ["a"], {"rule": "dare"}),
        ("DenseLoRA is nonlinear", ["a", "dense"], {"rank": 4}),
        ("nonlinear", ["a", "afa"], {"rank": 4}),
    ):
        with pytest.raises(la.AdapterError, match=message):
            la.combine(model, names, **{"name": "new"} | kwargs)
        assert la.in_use(model) == ["a"]
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    trained, _, _ = with_two("bert", (METHODS["lora"], METHODS["lora"]), ((), ["classifier"]))
    with pytest.raises(la.AdapterError, match=r"'b' train 'classifier\.\w+'"):
        la.combine(trained, ["a", "b"], name="c")


def test_places_with_settings_of_their_own():
    """An activation after a convolution, one after a linear layer, and functions of other degrees."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.linear, self.second = nn.Conv2d(3, 8, 1), nn.GELU(), nn.Linear(8, 12), nn.GELU()

        def forward(self, x):
            return self.second(self.linear(self.first(self.conv(x)).mean((2, 3))))

    model, x = Net(), torch.randn(2, 3, 8, 8)
    for seed, key in enumerate("ab"):
        first = la.NoRA(groups=4, base="anchored", targets=["first"], channel_dim=1)
        second = la.NoRA(groups=4, base="anchored", targets=["second"], channel_dim=-1, degrees=(3, 2))
        la.attach(model, [first, second], name=key)
        move(model, seed)
    la.use(model, ["a", "b"])
    with torch.no_grad():
        together = model(x)
        report = la.combine(model, ["a", "b"], name="c")
        assert [a.channel_dim for _, a in la.adapters(model)] == [1, -1]
        assert [a.config.degrees for _, a in la.adapters(model)] == [(5, 4), (3, 2)]
        la.use(model, [])
        effect = (together - model(x)).abs().max().item()
        la.use(model, "c")
        assert (model(x) - together).abs().max().item() < 0.2 * effect
    assert max(report.functions.values()) < 0.2


def test_an_error_in_the_middle_changes_nothing(monkeypatch):
    model, a, _ = with_two("llama", (la.NoRA(groups=4), la.LoRA(rank=2)))
    la.use(model, "a")

    def fail(*args):
        raise RuntimeError("no fit")

    monkeypatch.setattr("lit_adapters.model.combine.fit_rational", fail)
    with pytest.raises(RuntimeError, match="no fit"):
        la.combine(model, ["a"], name="c")
    assert la.adapter_names(model) == ["a", "b"]
    assert la.in_use(model) == ["a"]
    with torch.no_grad():
        assert torch.equal(RUN(model), RUN(a))
