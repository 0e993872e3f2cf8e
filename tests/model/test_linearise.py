"""`linearise` against least squares by hand, and on whole models."""

import peft
import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.model.linearise import _Statistics
from tests.matrix import MODELS, adapted, build


def batches(name, count=8, rows=24):
    model = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    shape = (rows, *model.shape[1:])
    for _ in range(count):
        if model.vocabulary:
            yield torch.randint(model.vocabulary, shape, generator=generator)
        else:
            yield torch.randn(shape, generator=generator)


def test_the_correction_is_the_best_of_its_rank():
    """Against the optimum by a singular value decomposition with whitened inputs; any other pair does worse."""
    torch.manual_seed(0)
    z = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    e = torch.randn(500, 7, dtype=torch.float64) + z @ torch.randn(12, 7, dtype=torch.float64)
    sums = _Statistics()
    for part, residual in zip(z.split(100), e.split(100), strict=True):
        sums.add(part, residual, residual)

    def loss(a, b):
        return (e - z @ a.double().T @ b.double().T).square().sum().item()

    previous = e.square().sum().item()
    for rank in range(1, 8):
        a, b = sums.solve(rank)
        assert a.shape == (rank, 12)
        assert b.shape == (7, rank)
        q, _ = torch.linalg.qr(z)
        u, s, vh = torch.linalg.svd(q.T @ e, full_matrices=False)
        best = q @ (u[:, :rank] * s[:rank]) @ vh[:rank]
        optimum = (e - best).square().sum().item()
        assert loss(a, b) == pytest.approx(optimum, rel=1e-3)
        assert loss(a, b) < previous
        previous = loss(a, b)
        for _ in range(5):
            assert loss(a + 0.05 * torch.randn_like(a), b + 0.05 * torch.randn_like(b)) > loss(a, b)


class Block(nn.Module):
    """A gain at a ReLU is a gain of its output, which the next matrix can take over exactly."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def test_what_a_matrix_can_express_is_recovered_exactly():
    torch.manual_seed(0)
    model = Block()
    la.attach(model, la.GroupAffine(groups=4, targets=["act"]))
    ((_, adapter),) = la.adapters(model)
    with torch.no_grad():  # gains, and no shifts
        adapter.input_gain += 0.3 * torch.rand(4)
        adapter.output_gain += 0.3 * torch.rand(4)
    model.eval()
    x = torch.randn(64, 6)
    expected = model(x)
    data = [torch.randn(64, 6) for _ in range(8)]
    report = la.linearise(model, data, rank=5)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    (found,) = report.corrections
    assert (found.activation, found.matrix) == ("act", "fc2")
    assert found.replaced > 0.05
    assert found.corrected < 1e-3
    assert report.recovered > 0.999
    assert "of the effect" in str(report)


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2", "bert"])
def test_whole_models_end_as_lora_and_are_closer(tmp_path, name):
    model = adapted(name, "nora++").eval()
    run = lambda x: model(x, **MODELS[name].arguments)  # noqa: E731
    data = list(batches(name))
    before = MODELS[name].run(model)
    report = la.linearise(model, data, rank=8, run=run)
    assert {type(a).__name__ for _, a in la.adapters(model)} == {"LoRAAdapter"}
    matrices = [c.matrix.rpartition(".")[2] for c in report.corrections]
    assert set(matrices) <= {"fc2", "down_proj", "c_proj", "dense"}
    assert all(c.corrected < c.replaced for c in report.corrections)
    assert report.corrected < report.replaced
    assert 0 < report.recovered <= 1
    # The model computes what the report measured: with the corrections, closer than without.
    after = MODELS[name].run(model)
    assert torch.isfinite(after).all()
    ranks = {n: a.rank for n, a in la.adapters(model)}
    assert all(ranks[c.matrix] == 10 for c in report.corrections)
    error = (after - before).norm() / before.norm()
    assert error < 3 * report.corrected
    la.export_peft(model, tmp_path)
    if name == "llama":
        other = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
        torch.testing.assert_close(MODELS[name].run(other), after, rtol=1e-4, atol=1e-5)
    la.merge(model)
    torch.testing.assert_close(MODELS[name].run(model), after, rtol=1e-4, atol=1e-5)


def test_trained_modules_keep_their_values():
    model = adapted("llama", "nora", train=["norm"]).eval()
    norm = model.model.norm.weight.detach().clone()
    la.linearise(model, list(batches("llama")), rank=4, run=lambda x: model(x, use_cache=False))
    assert torch.equal(model.model.norm.weight, norm)
    assert model.model.norm.weight.requires_grad


def test_what_is_refused_leaves_the_model_as_it_was():
    data = list(batches("llama", 2))
    cases = [
        (adapted("llama", "lora"), "has no learned activations"),
        (adapted("llama", "nora++-dora"), "has dora, to which no correction can be added"),
        (with_biases(), "has lora and bitfit, to which no correction can be added"),
    ]
    for model, message in cases:
        with pytest.raises(la.AdapterError, match=message):
            la.linearise(model, data, rank=2)
    model = adapted("llama", "nora").eval()
    before, kinds = MODELS["llama"].run(model), [type(a) for _, a in la.adapters(model)]
    before_hooks = hooks(model)
    run = lambda x: model(x, use_cache=False)  # noqa: E731
    for arguments, message in (
        ({"batches": data[:1], "rank": 2}, "at least two batches"),
        ({"batches": data, "rank": 33}, r"rank 33 exceeds the size of .*down_proj.* \(32 x 48\)"),
        ({"batches": data, "rank": 0}, "rank 0 must be"),
    ):
        with pytest.raises(la.AdapterError, match=message):
            la.linearise(model, run=run, **arguments)
    with pytest.raises(RuntimeError, match="of its own"):
        la.linearise(model, data, rank=2, run=lambda x: (_ for _ in ()).throw(RuntimeError("of its own")))
    assert torch.equal(MODELS["llama"].run(model), before)
    assert [type(a) for _, a in la.adapters(model)] == kinds
    assert hooks(model) == before_hooks
    beside = adapted("llama", "nora++").eval()
    with pytest.raises(la.AdapterError, match=r"rank 31, beside the 2 of its LoRA, exceeds the size of .*down_proj"):
        la.linearise(beside, data, rank=31, run=lambda x: beside(x, use_cache=False))
    assert {a.method for _, a in la.adapters(beside)} == {"nora", "lora"}


def with_biases():
    model = build("llama")
    la.attach(model, [la.NoRA(groups=4), la.LoRA(rank=2), la.BitFit(add_missing=True)])
    return model


def test_a_compiled_model_is_linearised_as_the_model_inside():
    model = adapted("llama", "nora").eval()
    data = list(batches("llama", 2))
    la.linearise(torch.compile(model), data, rank=2, run=lambda x: model(x, use_cache=False))
    assert {a.method for _, a in la.adapters(model)} == {"lora"}


def hooks(model):
    return {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


class Repeating(nn.Module):
    """A matrix that is called twice in a pass."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc2(self.fc2(self.act(self.fc1(x))))


def test_a_matrix_that_is_called_twice_is_refused():
    model = Repeating()
    la.attach(model, la.NoRA(groups=4))
    with pytest.raises(la.AdapterError, match="calls 'fc2' 2 times in a pass"):
        la.linearise(model, [torch.randn(3, 4)] * 2, rank=1)


class WithoutMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 8), nn.GELU()

    def forward(self, x):
        return self.act(self.fc(x))


def test_an_activation_without_a_matrix_after_it_is_refused():
    model = WithoutMatrix()
    la.attach(model, la.NoRA(groups=4))
    with pytest.raises(la.AdapterError, match="no linear layer of its own follows 'act'"):
        la.linearise(model, [torch.randn(3, 4)] * 2, rank=1)
