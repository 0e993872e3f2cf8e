"""LoRA-RITE and LoFT: equal to independent computations, invariant, resumable, clipped inside."""

import copy
import itertools

import pytest
import pytorch_optimizer
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.errors import AdapterError
from lit_adapters.optimizers import LoFT, LoRAPlus, LoRARITE, parameter_groups
from tests.lightning.tiny_task import Net
from tests.optimizers.pairs import Pairs, distance, loss, train

SIZES = [(7, 5, 3), (7, 5, 3), (4, 6, 1)]
INVARIANT = {
    LoRARITE: {"lr": 0.02, "eps": 1e-30, "clip": 0.1, "weight_decay": 0.1, "escape": True},
    LoFT: {"lr": 0.02, "eps": 1e-3, "clip": 0.1, "weight_decay": 0.1, "damping": 1e-30},
}


def transformed(pairs, kind):
    """The same products with other factors: A -> T^-1 A, B -> B T."""
    other = copy.deepcopy(pairs)
    draw = torch.Generator().manual_seed(5)
    for a, b in zip(other.a, other.b, strict=True):
        t = torch.randn(len(a), len(a), generator=draw, dtype=torch.float64) + 2 * torch.eye(len(a))
        t = {"scaling": 30 * torch.eye(len(a)).double(), "general": t}[kind]
        a.data, b.data = torch.linalg.solve(t, a.data), b.data @ t
    return other


@pytest.mark.parametrize("change", ["scaling", "general"])
@pytest.mark.parametrize("kind", [LoRARITE, LoFT])
def test_products_do_not_depend_on_how_they_are_factored(kind, change):
    pairs = Pairs(*SIZES, scale=2.0)
    other = transformed(pairs, change)
    paths = [train(p, kind(p.groups(), **INVARIANT[kind]), range(12)) for p in (pairs, other)]
    assert distance(*paths) < 1e-10


def test_adamw_depends_on_it():
    pairs = Pairs(*SIZES, scale=2.0)
    other = transformed(pairs, "scaling")
    paths = [train(p, LoRAPlus(p.groups(), lr=0.02, ratio=1.0), range(12)) for p in (pairs, other)]
    assert distance(*paths) > 0.1


# ---- LoRA-RITE


@pytest.mark.parametrize(("escape", "zero"), [(False, True), (True, False)])
def test_rite_equals_the_public_implementation(escape, zero):
    ours, theirs = (Pairs(*SIZES, zero=zero) for _ in range(2))
    got = train(ours, LoRARITE(ours.groups(), lr=0.01, clip=0.1, weight_decay=0.1, escape=escape), range(12))
    oracle = pytorch_optimizer.LoRARite(
        theirs.groups()[0]["params"],
        lr=0.01,
        clip_unmagnified_grad=0.1,
        weight_decay=0.1,
        apply_escape=escape,
        update_skipping=0.0,
    )
    assert distance(got, train(theirs, oracle, range(12))) < 1e-10


def test_the_first_step_of_rite_is_orthogonal():
    pairs = Pairs((8, 6, 3))
    a, b = pairs.a[0].detach().clone(), pairs.b[0].detach().clone()
    train(pairs, LoRARITE(pairs.groups(), lr=0.01, eps=1e-30), range(1))
    _, r_a = torch.linalg.qr(a.T)
    _, r_b = torch.linalg.qr(b)
    for change, r, rows in ((pairs.a[0] - a, r_b, 6), ((pairs.b[0] - b).T, r_a, 8)):
        sizes = torch.linalg.svdvals(r @ change.detach())
        torch.testing.assert_close(sizes, torch.full_like(sizes, 0.01 * rows**0.5))


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_rite_leaves_rounding_alone_where_gradients_have_a_low_rank(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    la.attach(model, la.LoRA(rank=8, alpha=8))
    x, y = torch.randn(2, rows, 32)
    optimizer = LoRARITE(parameter_groups(model, 1e-3, pairs=True))
    for _ in range(100):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert max(p.abs().max() for p in model.parameters() if p.requires_grad) < 4  # was about 1,000 for 1 to 4 rows


def test_the_factor_on_the_product_only_rescales_the_rate_of_rite():
    pairs, scaled = Pairs(*SIZES, zero=True), Pairs(*SIZES, zero=True, scale=0.25)
    path = train(pairs, LoRARITE(pairs.groups(), lr=0.01, eps=1e-30, clip=None), range(8))
    other = train(scaled, LoRARITE(scaled.groups(), lr=0.04, eps=1e-30, clip=None), range(8))
    assert distance(path[1:], other[1:]) < 1e-10


def test_rite_trains_on_a_loss_a_thousand_times_as_large():
    pairs, large = Pairs(*SIZES), Pairs(*SIZES)
    path = train(pairs, LoRARITE(pairs.groups(), lr=0.01, eps=1e-30, clip=None), range(6))
    other = train(large, LoRARITE(large.groups(), lr=0.01, eps=1e-30, clip=None), range(6), factor=1e3)
    assert distance(path, other) < 1e-10


# ---- LoFT


def test_loft_on_square_layers_of_full_rank_is_adamw_on_the_weight():
    pairs = Pairs((6, 6, 6), (5, 5, 5), scale=0.5)
    for p in (*pairs.a, *pairs.b):
        p.data = torch.linalg.qr(p.data)[0]
    weights = [nn.Parameter(w.detach().clone()) for w in pairs.weights()]
    got = train(pairs, LoFT(pairs.groups(), lr=0.01, eps=1e-4, damping=1e-300), range(30))
    adamw, want = torch.optim.AdamW(weights, lr=0.01, eps=1e-4, weight_decay=0.0), []
    for step in range(30):
        adamw.zero_grad()
        loss(weights, pairs.targets, pairs.scales, step).backward()
        adamw.step()
        want.append([w.detach().clone() for w in weights])
    assert distance(got, want) < 1e-12


@pytest.mark.parametrize("fixed", ["a", "b"])
def test_loft_with_one_factor_fixed_is_projected_adamw(fixed):
    """The dense form: gradient and update of W times the projection on the rows of A, or the columns of B."""
    pairs = Pairs((7, 5, 2), scale=4.0, zero=fixed == "a")
    factor = getattr(pairs, fixed)[0].requires_grad_(False)
    rows = factor if fixed == "a" else factor.T
    projection = torch.linalg.pinv(rows) @ rows
    weight = nn.Parameter(pairs.weights()[0].detach().clone())
    got = train(pairs, LoFT(pairs.groups(), lr=0.01, eps=1e-4, damping=1e-300), range(20))
    first = second = torch.zeros_like(weight)
    want = []
    for t in range(1, 21):
        (gradient,) = torch.autograd.grad(loss([weight], pairs.targets, pairs.scales, t - 1), weight)
        gradient = gradient @ projection if fixed == "a" else projection @ gradient
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-4)
        update = update @ projection if fixed == "a" else projection @ update
        weight.data -= 0.01 * update
        want.append([weight.detach().clone()])
    assert distance(got, want) < 1e-12


def test_loft_writes_b_in_odd_steps_and_a_in_even_ones():
    pairs = Pairs((7, 5, 2))
    optimizer = LoFT(pairs.groups(), lr=0.01)
    for step in range(4):
        before = pairs.a[0].detach().clone(), pairs.b[0].detach().clone()
        train(pairs, optimizer, range(step, step + 1))
        moved = tuple(not torch.equal(x, y) for x, y in zip(before, (pairs.a[0], pairs.b[0]), strict=True))
        assert moved == ((False, True) if step % 2 == 0 else (True, False))


# ---- both


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_loft_goes_on_with_turns_after_a_factor_was_frozen(factor, steps):
    pairs = Pairs((6, 5, 3))
    frozen = getattr(pairs, factor)[0]
    optimizer = LoFT(pairs.groups(), lr=0.01)
    frozen.requires_grad_(False)
    train(pairs, optimizer, range(steps))
    frozen.requires_grad_(True)
    moved = []
    for step in range(steps, steps + 6):
        before = [t.detach().clone() for t in (pairs.a[0], pairs.b[0])]
        train(pairs, optimizer, range(step, step + 1))
        moved.append(tuple(not torch.equal(*both) for both in zip(before, (pairs.a[0], pairs.b[0]), strict=True)))
    assert set(moved) == {(True, False), (False, True)}
    assert all(one != other for one, other in itertools.pairwise(moved))


@pytest.mark.parametrize("kind", [LoRARITE, LoFT])
def test_nothing_moves_at_a_rate_of_zero(kind):
    pairs = Pairs((7, 5, 2))
    before = copy.deepcopy(pairs.state_dict())
    train(pairs, kind(pairs.groups(), lr=0.0, weight_decay=0.1), range(3))
    assert all(torch.equal(before[name], value) for name, value in pairs.state_dict().items())


@pytest.mark.parametrize("kind", [LoRARITE, LoFT])
def test_stacked_layers_train_as_each_by_itself(kind, monkeypatch):
    together, apart = Pairs(*SIZES), Pairs(*SIZES)
    got = train(together, kind(together.groups(), lr=0.01, clip=None), range(5))
    monkeypatch.setattr(kind, "largest_batch", 1)
    assert distance(got, train(apart, kind(apart.groups(), lr=0.01, clip=None), range(5))) < 1e-12


@pytest.mark.parametrize("kind", [LoRARITE, LoFT])
def test_clipping_shrinks_the_gradients_of_all_parameters_by_one_factor(kind):
    clipped, smaller = (Pairs(*SIZES) for _ in range(2))
    heads = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    optimizers = [
        kind([*p.groups(), {"params": [h]}], clip=c)
        for p, h, c in zip((clipped, smaller), heads, (1e-3, None), strict=True)
    ]
    (clipped.loss(0) + (heads[0] * torch.arange(3)).sum()).backward()
    squares = [heads[0].grad.square().sum()]
    for a, b in zip(clipped.a, clipped.b, strict=True):
        squares.append(passed_on(b.grad, a.mT))
        if kind is LoRARITE:  # both factors move in each step
            squares.append(passed_on(a.grad.mT, b))
    factor = 1e-3 / torch.stack(squares).sum().sqrt()
    (factor * (smaller.loss(0) + (heads[1] * torch.arange(3)).sum())).backward()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(heads[0].grad, heads[1].grad)
    for one, other in zip(*(o.state_dict()["state"].values() for o in optimizers), strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=0)  # LoFT's norm is damped


def passed_on(gradient, partner):
    """||g R^+||^2 for the QR decomposition U R of the partner: what a factor passes on of the full gradient."""
    return (gradient @ torch.linalg.pinv(torch.linalg.qr(partner.detach())[1])).square().sum()


KINDS = [LoRAPlus, LoRARITE, LoFT]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(kind, stop, tmp_path):
    settings = {"escape": True} if kind is LoRARITE else {}
    whole = Pairs(*SIZES, zero=True)
    path = train(whole, kind(whole.groups(), lr=0.01, **settings), range(9))
    half = Pairs(*SIZES, zero=True)
    optimizer = kind(half.groups(), lr=0.01, **settings)
    train(half, optimizer, range(stop))
    torch.save({"optimizer": optimizer.state_dict(), "model": half.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = Pairs(*SIZES, seed=7)
    again.load_state_dict(saved["model"])
    again.targets, again.scales = whole.targets, whole.scales
    resumed = kind(again.groups(), lr=0.5)
    resumed.load_state_dict(saved["optimizer"])
    rest = train(again, resumed, range(stop, 9))
    assert all(
        torch.equal(x, y) for got, want in zip(rest, path[stop:], strict=True) for x, y in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_runs_first_and_with_gradients(kind):
    plain, closed = Pairs(*SIZES), Pairs(*SIZES)
    path = train(plain, kind(plain.groups(), lr=0.01), range(2))
    optimizer = kind(closed.groups(), lr=0.01)
    for step in range(2):

        def closure(step=step):
            optimizer.zero_grad()
            value = closed.loss(step)
            value.backward()
            return value

        with torch.no_grad():
            want = closed.loss(step)
        assert torch.equal(optimizer.step(closure).detach(), want)
    assert all(torch.equal(x, y) for x, y in zip(path[-1], closed.weights(), strict=True))


@pytest.mark.parametrize("kind", [LoRARITE, LoFT])
def test_factors_in_bfloat16_have_states_in_float32_that_loading_keeps(kind):
    pairs = Pairs((8, 6, 2)).to(torch.bfloat16)
    pairs.targets = [t.to(torch.bfloat16) for t in pairs.targets]
    optimizer = kind(pairs.groups(), lr=0.1)
    before = pairs.b[0].detach().clone()
    train(pairs, optimizer, range(2))
    assert not torch.equal(before, pairs.b[0])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kinds = {value.dtype for state in optimizer.state.values() for value in state.values()}
    assert kinds == {torch.float32}


def test_a_decomposition_of_values_that_are_not_finite_gives_a_clear_error():
    pairs = Pairs((8, 6, 2))
    pairs.a[0].data.fill_(float("nan"))
    with pytest.raises(la.errors.NotFiniteError, match="is not finite"):
        train(pairs, LoRARITE(pairs.groups()), range(2))


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_of_a_model_learn(kind):
    model = Net()
    la.attach(model, [la.DoRA(rank=2, targets=["fc1"]), la.LoRAN(rank=2, targets=["fc2"]), la.NoRA(rank=2)], ["head"])
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.01, pairs=True)
    optimizer = kind(groups, lr=1e-2)
    x, labels = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), labels)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.95 * losses[0]
    after = dict(model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []


DAMAGE = [
    lambda entry: entry.popitem(),
    lambda entry: entry.update(other=torch.zeros(2)),
    lambda entry: entry.update({name: value[..., None] for name, value in entry.items()}),
    lambda entry: entry.update(step=3),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=["missing", "more", "shapes", "number"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_is_refused(kind, damage):
    model = Pairs(*SIZES, zero=True)
    optimizer = kind(model.groups(), lr=0.01)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    kind(model.groups(), lr=0.01).load_state_dict(state)
    damage(state["state"][0])
    with pytest.raises(AdapterError, match=f"the state of {kind.__name__} for parameter 0 holds .* must hold tensors"):
        kind(model.groups(), lr=0.01).load_state_dict(state)
