"""LoRA^2: values and gradients against its formula and peft's AdaLoRA, pruning against peft's allocator, and counts."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft.tuners.adalora.layer import RankAllocator, SVDLinear
from torch import Tensor, nn

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.methods.allocation import deviation
from lit_adapters.methods.lora2 import LoRA2Adapter
from lit_adapters.methods.sensitivity import RankSchedule, SensitivityAllocator
from lit_adapters.training.rank_allocation import RankAllocation
from tests.lightning.tiny_task import Task, fit
from tests.matrix import move

DOUBLE = torch.float64


def layer(inputs: int = 12, outputs: int = 9, **settings) -> LoRA2Adapter:
    """One layer with LoRA^2 off its start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    la.attach(model, la.LoRA2(**{"width": 3, "rank": 5, "alpha": 4.0} | settings))
    move(model)
    (adapter,) = (adapter for _, adapter in la.adapters(model))
    return adapter


def in_double(adapter: LoRA2Adapter) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in adapter.adapter_parameters().items()}


@pytest.mark.parametrize("rank", [2, 5])
def test_values_and_gradients_are_those_of_the_formula(rank):
    adapter = layer(rank=rank).double()
    own, x = in_double(adapter), torch.randn(4, 12, dtype=DOUBLE)
    a, b, e, c, d = own.values()
    expected = adapter.base(x) + 4.0 / (rank + 1e-5) * x @ a.T @ b.T @ torch.diag(e) @ c.T @ d.T
    output = torch.func.functional_call(adapter, own, (x,))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(4, 9, dtype=DOUBLE)
    gradients = [torch.autograd.grad((y * weights).sum(), list(own.values())) for y in (output, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_with_identities_inside_it_is_adalora():
    """Width and rank equal, B and C the identity: the outer pair and E are AdaLoRA's Q, P and E."""
    adapter = layer(width=4, rank=4)
    with torch.no_grad():
        adapter.inner_down.copy_(torch.eye(4))
        adapter.inner_up.copy_(torch.eye(4))
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, init_lora_weights=False)
    theirs = SVDLinear(copy.deepcopy(adapter.base_copy()), "default", config=config, r=4, lora_alpha=4.0)
    with torch.no_grad():
        theirs.lora_A["default"].copy_(adapter.outer_down)
        theirs.lora_E["default"].copy_(adapter.directions[:, None])
        theirs.lora_B["default"].copy_(adapter.outer_up)
    torch.testing.assert_close(adapter.delta_weight(), theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-8)
    x = torch.randn(3, 12)
    torch.testing.assert_close(adapter(x), theirs(x))


def test_a_direction_of_zero_is_one_that_is_not_there():
    adapter = layer()
    with torch.no_grad():
        adapter.directions[[1, 3]] = 0.0
    kept = [0, 2, 4]
    smaller = layer(rank=3)
    smaller.scaling = adapter.scaling
    with torch.no_grad():
        smaller.outer_down.copy_(adapter.outer_down)
        smaller.inner_down.copy_(adapter.inner_down[kept])
        smaller.directions.copy_(adapter.directions[kept])
        smaller.inner_up.copy_(adapter.inner_up[:, kept])
        smaller.outer_up.copy_(adapter.outer_up)
    torch.testing.assert_close(adapter.delta_weight(DOUBLE), smaller.delta_weight(DOUBLE), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("rank", "zeros", "bound"), [(5, 0, 3), (5, 3, 2), (2, 0, 2)])
def test_the_rank_is_bounded_by_the_width_and_the_directions(rank, zeros, bound):
    adapter = layer(rank=rank)
    with torch.no_grad():
        adapter.directions[:zeros] = 0.0
    assert torch.linalg.matrix_rank(adapter.delta_weight(DOUBLE)) == bound
    values = adapter.low_rank_update().spectrum()[1]
    torch.testing.assert_close(
        values[:bound], torch.linalg.svdvals(adapter.delta_weight(DOUBLE))[:bound], rtol=1e-5, atol=0
    )


def test_the_budgets_of_the_paper():
    """DeBERTaV3-base: q, k, v, o, up and down of 12 layers; 0.72% of 184 million, and 0.17 million."""
    with torch.device("meta"):
        block = [nn.Linear(768, 768) for _ in range(4)] + [nn.Linear(768, 3072), nn.Linear(3072, 768)]
        model = nn.ModuleList(nn.ModuleList(copy.deepcopy(block)) for _ in range(12))
    count = la.attach(copy.deepcopy(model), la.LoRA2(width=8, rank=4)).adapter_parameters
    assert count == 8 * 12 * (8 * 768 + 2 * 3840) + 72 * (2 * 4 * 8 + 4)
    assert round(count / 1e6, 2) == 1.33
    assert la.attach(model, la.LoRA2(width=1, rank=8)).adapter_parameters == pytest.approx(0.17e6, rel=0.02)


@pytest.mark.parametrize(("width", "rank"), [(3, 5), (3, 2), (3, 3)])
def test_every_factor_of_the_penalty_can_be_orthonormal(width, rank):
    """The released penalty cannot fall below sqrt(width - rank) for B and C."""
    adapter = layer(width=width, rank=rank)
    for parameter, rows in adapter.orthogonal_factors():
        nn.init.orthogonal_(parameter)
        assert deviation(parameter, rows)[1] < 1e-5
        parameter.grad = torch.zeros_like(parameter)
    assert len(adapter.orthogonal_factors()) == 4


SCHEDULE = RankSchedule(start=0.1, end=0.75, interval=3)


def test_the_schedule_is_that_of_peft():
    config = SimpleNamespace(tinit=4, tfinal=10, total_step=40, deltaT=3)
    theirs = SimpleNamespace(peft_config=config, init_bgt=60, target_bgt=24)
    for step in range(1, 41):
        budget, due = RankAllocator.budget_schedule(theirs, step)
        due = due or step == 30  # where peft's model forces it
        assert SCHEDULE.budget(step, 40, 60, 24) == (budget if due else None)


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.7), (0.95, 1.0), (0.0, 0.01)])
@pytest.mark.parametrize("total", [2, 3, 10, 1000])
def test_a_schedule_ends_within_the_training(start, end, total):
    schedule = RankSchedule(start, end, interval=4)
    first, last = schedule.steps(total)
    assert 0 <= first < last <= total
    assert last >= 2  # the scores come from the steps before
    assert schedule.budget(total, total, 60, 24) == 24


def test_pruning_is_that_of_pefts_allocator_on_the_inner_triple():
    """B and C are to it what A and B of AdaLoRA are, so peft's scores are those of LoRA^2."""
    layers = {name: layer(rank=6, target_rank=3) for name in ("first", "second")}
    twins = copy.deepcopy(layers)

    def named_parameters():
        for name, twin in twins.items():
            for key, parameter in (("E", twin.directions), ("A", twin.inner_down), ("B", twin.inner_up)):
                yield f"{name}.lora_{key}.default", parameter

    config = peft.AdaLoraConfig(init_r=6, target_r=3, tinit=4, tfinal=10, total_step=40, deltaT=3)
    model = SimpleNamespace(named_parameters=named_parameters)
    for twin in twins.values():  # peft's is (r, 1)
        twin.directions = nn.Parameter(twin.directions.detach()[:, None])
    theirs = RankAllocator(model, config, "default")
    ours = SensitivityAllocator(layers, 3, SCHEDULE)
    ours.start(40)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 36):
        if step == 17:  # a resumed run
            state, ours = ours.state_dict(), SensitivityAllocator(layers, 3, SCHEDULE)
            ours.start(40)
            ours.load_state_dict(state)
        for own, twin in zip(layers.values(), twins.values(), strict=True):
            for key in ("directions", "inner_down", "inner_up"):
                mine, other = getattr(own, key), getattr(twin, key)
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad.reshape(other.shape)
                with torch.no_grad():
                    mine.sub_(0.1 * mine.grad)
                    other.sub_(0.1 * other.grad)
        ours.update(step)
        if step <= 30:
            _, pattern = theirs.update_and_allocate(model, step, force_mask=step == 30)
        else:
            theirs.mask_using_rank_pattern(model, pattern)
        for name, own in layers.items():
            assert torch.equal(own.directions, twins[name].directions.flatten()), step
    assert ours.finished
    assert sum(sum(own.kept_directions()) for own in layers.values()) == 6


def test_ranks_are_saved_and_inspected(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    base = copy.deepcopy(model)
    la.attach(model, la.LoRA2(width=2, rank=4, target_rank=1, prune_every=1))
    allocation = RankAllocation(model)
    allocation.start(0, 8)
    optimizer = torch.optim.SGD(allocation.parameters(), lr=0.5)
    for step in range(1, 9):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().sum().backward()
        allocation.add_orthogonality()
        optimizer.step()
        allocation.update(step)
    assert not allocation.unfinished()
    la.save_adapters(model, tmp_path)
    report = la.load_adapters(base, tmp_path)
    assert sum(report.ranks.values()) == 2
    notes = [saved.adapter.summary().note for saved in read_saved(tmp_path).layers.values()]
    assert notes == [f"rank {n} of 4" if n else "" for n in report.ranks.values()]
    (first, _) = dict(la.adapters(base)).values()
    assert first.statistics()["relative_norm"] == pytest.approx(
        (first.delta_weight().norm() / first.base_matrix().norm()).item(), rel=1e-5
    )


def test_a_checkpoint_tells_the_sizes(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, Task(la.LoRA2(width=2, rank=3)), la.AdapterCallback(statistics=(), figures=False), saver)
    saved = read_saved(tmp_path / "last.ckpt").layers
    assert [s.adapter.summary().size for s in saved.values()] == ["16 x 8, r = 2", "8 x 16, r = 2"] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width 0 must be a whole number"),
        ({"rank": 4, "target_rank": 4}, "target_rank 4 is not below rank 4"),
        ({"target_rank": 0}, "target_rank 0 must be a whole number, at least 1, or None"),
        ({"orthogonality": -1.0}, "orthogonality -1.0 must be a finite number from 0"),
        ({"prune_from": 0.7}, r"prune_from 0\.7 must be below prune_until 0\.7"),
        ({"prune_every": 0}, "prune_every 0 must be a whole number"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(la.AdapterError, match=message):
        la.LoRA2(**settings)


def test_layers_that_are_too_small_and_convolutions_in_groups_are_refused():
    with pytest.raises(la.AdapterError, match=r"width 8 exceeds the size of '0' \(4 x 12\); lower width"):
        la.attach(nn.Sequential(nn.Linear(12, 4)), la.LoRA2())
    with pytest.raises(la.AdapterError, match="'0' is a convolution in groups"):
        la.attach(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), la.LoRA2(width=2, targets=["0"]))
