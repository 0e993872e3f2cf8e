"""Rank allocation in a Trainer: AdaLoRA as peft's own model does it, resumed, saved, and refused where it cannot be."""

import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch.utils.data import DataLoader, IterableDataset

import lit_adapters as la
from lit_adapters.training.rank_allocation import RankAllocation
from tests.lightning.tiny_task import Net, Task, assert_equal_bits, fit, loader, state, tensorboard

INITIAL, TARGET, LAYERS = 4, 2, 4
QUIET = {"statistics": (), "figures": False}


def adalora(**changes) -> la.Peft:
    config = {"peft_type": "ADALORA", "init_r": INITIAL, "target_r": TARGET, "target_modules": ["fc1", "fc2"]}
    return la.Peft(config | {"tinit": 1, "tfinal": 2, "orth_reg_weight": 0.5} | changes)


def lora2() -> la.LoRA2:
    settings = {"prune_from": 0.1, "prune_until": 0.8, "prune_every": 2, "targets": ["fc1", "fc2"]}
    return la.LoRA2(width=3, rank=INITIAL, target_rank=TARGET, **settings)


def directions(model) -> int:
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n or "directions" in n)


class Steps(Callback):
    """Counts the directions after each optimiser step."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.kept[trainer.global_step] = directions(pl_module)


def budget(step: int, total: int, first: int = 1, last: int = 2) -> int:
    """Directions of all layers after a step, by the cubic schedule of the paper."""
    left = 1 - (min(step, total - last) - first) / (total - last - first)
    return int(LAYERS * (TARGET + (INITIAL - TARGET) * min(left, 1) ** 3))


@pytest.mark.parametrize("epochs", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_training_equals_that_of_pefts_own_model_bit_for_bit(tmp_path, epochs):
    schedule = {"total_step": 6 * epochs, "tinit": epochs // 2, "tfinal": epochs, "deltaT": 1 + epochs // 5}
    task = Task(adalora(**schedule, orth_reg_weight=0.0), train=())
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(init_r=INITIAL, target_r=TARGET, target_modules=["fc1", "fc2"], **schedule)
    model = peft.get_peft_model(Net(), config)
    own = dict(task.net.named_parameters())
    with torch.no_grad():
        for name, parameter in model.base_model.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name])
    fit(tmp_path, task, la.AdapterCallback(**QUIET), max_epochs=epochs)

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = [batch for _ in range(epochs) for batch in loader()]
    for step, (x, y) in enumerate(batches, start=1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    theirs = {n: p for n, p in model.base_model.model.named_parameters() if p.requires_grad}
    assert len(theirs) == 3 * LAYERS
    assert_equal_bits({n: p.detach() for n, p in theirs.items()}, {n: own[n].detach() for n in theirs})
    pattern = {n: a.kept_directions() for n, a in la.adapters(task.net)}
    assert {f"{n}.lora_E.default": kept for n, kept in pattern.items()} == config.rank_pattern
    assert sum(map(sum, pattern.values())) == LAYERS * TARGET


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),
        pytest.param({"max_steps": 10}, 10, marks=pytest.mark.slow),
    ],
    ids=["accumulation", "max_steps"],
)
def test_the_budget_follows_the_optimiser_steps(tmp_path, settings, total):
    task, steps = Task(adalora(), train=()), Steps()
    fit(tmp_path, task, la.AdapterCallback(**QUIET), steps, **{"max_epochs": -1} | settings)
    steps.kept.pop(0, None)  # half of an accumulated step
    assert steps.kept == {step: budget(step, total) for step in range(1, total + 1)}
    assert steps.kept[1] == LAYERS * INITIAL
    assert steps.kept[total] == LAYERS * TARGET
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    task.eval()
    before = task.net(x)
    assert len(la.merge(task.net).merged) == LAYERS
    torch.testing.assert_close(task.net(x), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [adalora(deltaT=2), lora2()], ids=["adalora", "lora2"])
@pytest.mark.parametrize(
    ("step", "epochs"), [(3, 1), *(pytest.param(s, 2, marks=pytest.mark.slow) for s in (9, 10, 11))]
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, method, step, epochs):
    # In the midst, at the final ranks, and after them.
    def run(name, ckpt=None):
        task = Task(method, train=())
        saver = ModelCheckpoint(tmp_path / name, every_n_train_steps=step, save_top_k=-1)
        callback = la.AdapterCallback(**QUIET)
        fit(tmp_path, task, callback, saver, max_epochs=epochs, ckpt=ckpt)
        return task, callback.state_dict()["allocation"]

    whole, allocated = run("whole")
    (path,) = (tmp_path / "whole").glob(f"*step={step}.ckpt")
    task, again = run("resumed", path)
    assert_equal_bits(state(whole), state(task))
    assert directions(task) == LAYERS * TARGET
    assert json.dumps(again, default=torch.Tensor.tolist) == json.dumps(allocated, default=torch.Tensor.tolist)


def test_the_penalty_has_the_gradient_that_autograd_finds():
    model = Net().double()
    la.attach(model, adalora(orth_reg_weight=0.3))
    factors = [factor for _, a in la.adapters(model) for factor in a.orthogonal_factors()]
    assert len(factors) == 2 * LAYERS
    terms = [torch.linalg.norm((p @ p.T if rows else p.T @ p) - torch.eye(INITIAL)) for p, rows in factors]
    expected = torch.autograd.grad(0.3 * sum(terms) / len(terms), [p for p, _ in factors])
    for parameter, _ in factors:
        parameter.grad = torch.ones_like(parameter)
    RankAllocation(model).add_orthogonality()
    for (parameter, _), gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(parameter.grad - 1, gradient, rtol=1e-4, atol=1e-6)
    # Factors that are orthogonal already are left alone.
    (a, _), (b, _) = factors[:2]
    with torch.no_grad():
        a.copy_(torch.eye(*a.shape))
        b.copy_(torch.eye(*b.shape))
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    RankAllocation(model).add_orthogonality()
    assert not a.grad.any()
    assert not b.grad.any()


def test_a_trainer_adds_the_penalty_before_it_clips(tmp_path):
    norms = []

    class Look(Task):
        def on_before_optimizer_step(self, optimizer):
            norms.append(float(torch.linalg.norm(dict(la.adapters(self))["net.blocks.0.fc1"].lora_A["default"].grad)))

        def optimizer_step(self, *args):
            super().optimizer_step(*args)
            norms.append(float(torch.linalg.norm(dict(la.adapters(self))["net.blocks.0.fc1"].lora_A["default"].grad)))

    fit(tmp_path, Look(adalora(), train=()), la.AdapterCallback(**QUIET), gradient_clip_val=1e-3)
    assert norms[0] > 2e-3  # at the start E is 0, and with it the gradient of the loss for A
    assert norms[1] < 1e-3


def test_a_step_without_gradients_counts_as_none(tmp_path):
    class Skipping(Task):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.global_step in (3, 10) else super().training_step(batch, batch_idx)

    task, steps = Skipping(adalora(), train=()), Steps()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training_step.* returned .None.")
        fit(tmp_path, task, la.AdapterCallback(**QUIET), steps, max_epochs=2)
    assert steps.kept[4] == steps.kept[3]
    assert steps.kept[12] == LAYERS * TARGET


def test_manual_optimisation_that_clears_its_gradients(tmp_path):
    class Manual(Task):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()

    task, steps = Manual(adalora(), train=()), Steps()
    fit(tmp_path, task, la.AdapterCallback(**QUIET), steps, max_epochs=2)
    assert steps.kept == {step: budget(step, 12) for step in range(1, 13)}


def test_ranks_are_in_the_file_the_report_and_tensorboard(tmp_path):
    task = Task(adalora(), train=())
    board = tensorboard(tmp_path / "logs", task, la.AdapterCallback(log_every_n_steps=1, figures=False))
    names = [name for name, _ in la.adapters(task.net)]
    last = {name: board.Scalars(f"adapter/peft/{name}/rank")[-1].value for name in names}
    ranks = {name: sum(a.kept_directions()) for name, a in la.adapters(task.net)}
    assert last == ranks
    means = [e.value for e in board.Scalars("adapter/summary/rank")]
    assert means == [INITIAL, *(budget(step, 6) / LAYERS for step in range(1, 7))]

    la.save_adapters(task.net, tmp_path / "saved")
    header = json.loads((tmp_path / "saved" / "lit_adapter.json").read_text())
    pattern = header["methods"][0]["init_args"]["config"]["rank_pattern"]
    assert {name: sum(pattern[f"{name}.lora_E"]) for name in names} == ranks
    loaded = Net()
    report = la.load_adapters(loaded, tmp_path / "saved")
    assert report.ranks == ranks
    assert f"ranks         4 modules         2.00 on average, {min(ranks.values())} to {max(ranks.values())}" in str(
        report
    )
    assert_equal_bits(task.net.state_dict(), loaded.state_dict())
    assert {n: sum(a.kept_directions()) for n, a in la.adapters(copy.deepcopy(loaded))} == ranks
    assert dict(la.adapters(loaded))[names[0]].summary().note == f"rank {ranks[names[0]]} of {INITIAL}"
    # Trained again, it begins anew: the file's ranks are no obstacle.
    allocation = RankAllocation(loaded)
    allocation.start(0, 6)
    for parameter in allocation.parameters():
        parameter.grad = torch.ones_like(parameter)
    allocation.update(1)
    assert dict(la.adapters(loaded))[names[0]].statistics() == {
        "rank": sum(a != 0 for a in loaded.blocks[0].fc1.lora_E["default"]).item()
    }
    # A checkpoint holds no pattern in its record, and tells the ranks by its values.
    other = Net()
    la.attach(other, adalora())
    other.load_state_dict(task.net.state_dict())
    la.save_adapters(other, tmp_path / "other")
    assert la.load_adapters(Net(), tmp_path / "other").ranks == ranks


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"init_r": 4, "target_r": 4}, {}, "target_r=4 of ADALORA is not below init_r=4"),
        ({"total_step": 13}, {"max_epochs": 2}, "total_step=13 of ADALORA is more than the 12 optimiser steps"),
        ({"tinit": 4}, {}, "tinit=4 and tfinal=2 of ADALORA leave no step of 6"),
        ({}, {"max_epochs": -1}, "no end that is known"),
        ({"deltaT": 0}, {}, "deltaT of ADALORA 0 must be a whole number"),
    ],
)
def test_schedules_that_cannot_be_followed_are_refused(tmp_path, changes, settings, message):
    with pytest.raises(la.AdapterError, match=message):
        fit(tmp_path, Task(adalora(**changes), train=()), la.AdapterCallback(**QUIET), **settings)


@pytest.mark.slow
def test_without_a_known_end_the_configuration_may_give_the_steps(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            yield from (row for _ in range(3) for row in loader().dataset)

    task, data = Task(adalora(total_step=8), train=()), DataLoader(Endless(), batch_size=4)
    fit(tmp_path, task, la.AdapterCallback(**QUIET), data=data, max_epochs=1)
    assert directions(task) == LAYERS * TARGET


def test_adamss_that_drops_subspaces_is_refused_in_training(tmp_path):
    pytest.importorskip("sklearn")
    config = {"peft_type": "ADAMSS", "r": 4, "use_asa": True, "target_modules": ["fc1", "fc2"]}
    with pytest.warns(UserWarning, match="ADAMSS trains all subspaces here"):
        task = Task(la.Peft(config), train=())
    with pytest.raises(la.AdapterError, match=r"use_asa=True of ADAMSS .* set use_asa=false"):
        fit(tmp_path, task, la.AdapterCallback(**QUIET))


def test_no_other_type_of_peft_asks_for_a_call_after_each_step():
    asking = {kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if hasattr(tuner, "update_and_allocate")}
    assert asking == {"ADALORA", "ADAMSS"}


def test_an_early_end_and_a_training_without_allocation_are_told(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 4

    with pytest.warns(UserWarning, match="training ended at step 4 of 6, before rank allocation did"):
        fit(tmp_path, Task(adalora(tfinal=0), train=()), la.AdapterCallback(**QUIET), Stop())
    task = Task(adalora(), train=())
    with torch.no_grad():
        for parameter in task.net.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    with pytest.warns(UserWarning, match="holds 4 layers that keep all their ranks"):
        la.save_adapters(task.net, tmp_path / "saved")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    saver = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
    fit(folder, Task(adalora(), train=()), la.AdapterCallback(**QUIET), saver)
    (path,) = folder.glob("*step=3.ckpt")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("allocation"), "holds nothing of the allocation"),
        (lambda state: state["allocation"][0].update(pattern={"x": [True]}), "belong to other layers"),
        (lambda state: state["allocation"][0]["sensitivity"].popitem(), "belong to other layers"),
        (lambda state: state.update(allocation=[{}]), "must be the state of a rank allocation"),
    ],
    ids=["without", "ranks", "sensitivities", "form"],
)
def test_a_checkpoint_of_another_allocation_is_refused(tmp_path, checkpoint, damage, message):
    damaged = copy.deepcopy(checkpoint)
    (own,) = (value for key, value in damaged["callbacks"].items() if key.startswith("AdapterCallback"))
    damage(own)
    torch.save(damaged, tmp_path / "damaged.ckpt")
    with pytest.raises(la.AdapterError, match=message):
        fit(tmp_path, Task(adalora(), train=()), la.AdapterCallback(**QUIET), ckpt=tmp_path / "damaged.ckpt")
