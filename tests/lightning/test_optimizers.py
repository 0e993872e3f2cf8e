"""Optimiser and schedule from YAML sections: what trains, at which rate, and when the rate ends."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from lit_adapters.lightning.optimizers import build_optimizers
from tests.lightning.tiny_task import Task, fit, loader, tensorboard, trainer

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "weight_decay": 0.01}}


def schedule(name, **arguments):
    return {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": arguments}


class Sectioned(Task):
    """Its optimiser comes from sections, as the command line makes it."""

    def __init__(self, optimizer=ADAMW, lr_scheduler=None, lr_scale=None, **arguments):
        super().__init__(**arguments)
        self.sections = optimizer, lr_scheduler, lr_scale

    def configure_optimizers(self):
        return build_optimizers(self, *self.sections)


class Rates(Callback):
    """The rate of each group in each optimiser step, and what the schedule left behind."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({g["name"]: g["lr"] for g in optimizer.param_groups})

    def on_train_end(self, trainer, pl_module):
        self.left = trainer.optimizers[0].param_groups[0]["lr"]


def rates(tmp_path, *sections, **changes):
    recorded = Rates()
    fit(tmp_path, Sectioned(*sections), AdapterCallback(), recorded, **changes)
    return recorded


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 2}, 12),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "limit_train_batches": 0.5, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": -1, "max_steps": 5}, 5),
    ],
)
def test_a_schedule_ends_with_the_last_optimiser_step(tmp_path, settings, steps):
    onecycle = [s["head"] for s in rates(tmp_path, ADAMW, schedule("OneCycleLR", max_lr=0.1), **settings).steps]
    assert len(onecycle) == steps
    assert onecycle[0] == pytest.approx(0.1 / 25)
    assert onecycle[-1] == pytest.approx(0.1 / 25 / 1e4)
    cosine = rates(tmp_path, ADAMW, schedule("CosineAnnealingLR"), **settings)
    curve = [0.05 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
    assert [s["head"] for s in cosine.steps] == pytest.approx(curve)
    assert cosine.left == pytest.approx(0.0, abs=1e-9)
    linear = rates(tmp_path, ADAMW, schedule("LinearLR", start_factor=1.0, end_factor=0.1), **settings)
    assert [s["head"] for s in linear.steps] == pytest.approx([0.1 * (1 - 0.9 * i / steps) for i in range(steps)])
    assert linear.left == pytest.approx(0.01)


def test_schedules_without_a_length_step_with_the_optimiser_too(tmp_path):
    curve = [s["head"] for s in rates(tmp_path, ADAMW, schedule("ExponentialLR", gamma=0.5)).steps]
    assert curve == pytest.approx([0.1 * 0.5**i for i in range(6)])


def test_plateau_waits_for_its_metric(tmp_path):
    """A metric that only grows: the first epoch is the best, and the end of the second halves the rate."""
    arguments = {"monitor": "epoch_number", "patience": 0, "mode": "min", "factor": 0.5}
    section = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": arguments}

    class Counting(Sectioned):
        def on_train_epoch_end(self):
            self.log("epoch_number", float(self.current_epoch))

    recorded = Rates()
    fit(tmp_path, Counting(ADAMW, section), AdapterCallback(), recorded, max_epochs=3)
    assert [s["head"] for s in recorded.steps] == [0.1] * 12 + [0.05] * 6


def test_groups_have_their_scales(tmp_path):
    scale = {"nora": 3.0, "lora": 0.5}
    plain = rates(tmp_path, ADAMW, None, scale).steps
    assert plain[0] == pytest.approx({"nora": 0.3, "lora": 0.05, "head": 0.1})
    for section in (
        schedule("OneCycleLR", max_lr=0.1),
        schedule("CyclicLR", base_lr=0.1, max_lr=0.2, step_size_up=2, cycle_momentum=False),
        schedule("CosineAnnealingLR"),
    ):
        for step in rates(tmp_path, ADAMW, section, scale).steps:
            assert step["nora"] == pytest.approx(3 * step["head"], rel=1e-4, abs=1e-6)
            assert step["lora"] == pytest.approx(0.5 * step["head"], rel=1e-4, abs=1e-6)


def test_every_group_has_its_own_highest_rate(tmp_path):
    """Also the parts of a method that do not decay, and what a regular expression chooses."""
    scale = {"dora": 3.0, "head": 0.5, r"blocks\.1\..*": 7.0}
    task = Sectioned(ADAMW, schedule("OneCycleLR", max_lr=0.2), scale, methods=la.DoRA(rank=2))
    groups = {g["name"]: g for g in fit(tmp_path, task).optimizers[0].param_groups}
    factors = {"dora": 3.0, "dora/no_decay": 3.0, "head": 0.5, r"blocks\.1\..*": 7.0, r"blocks\.1\..*/no_decay": 7.0}
    assert {name: group["max_lr"] for name, group in groups.items()} == {n: 0.2 * f for n, f in factors.items()}


def test_the_rate_of_each_group_is_logged(tmp_path):
    class Headed(Sectioned):
        def get_classifier(self):
            return self.net.head

    task = Headed(ADAMW, None, {"head": 300.0, r"norm\.weight": 2.0}, methods=[], train=".*")
    shown = tensorboard(tmp_path, task, LearningRateMonitor())
    rates = {tag: shown.Scalars(tag)[0].value for tag in shown.Tags()["scalars"] if tag.startswith("lr-")}
    assert rates == pytest.approx({"lr-AdamW/base": 0.1, "lr-AdamW/head": 30.0, r"lr-AdamW/norm\.weight": 0.2})


def test_only_what_trains_is_given_and_rational_coefficients_never_decay(tmp_path):
    task = Sectioned()
    running = fit(tmp_path, task)
    groups = running.optimizers[0].param_groups
    given = [id(p) for g in groups for p in g["params"]]
    assert sorted(given) == sorted(id(p) for p in task.parameters() if p.requires_grad)
    own = {id(p) for _, a in la.adapters(task) if a.method == "nora" for p in a.adapter_parameters().values()}
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert not own & decayed
    assert decayed == set(given) - own


def sections_fail(tmp_path, message, *sections, **changes):
    with pytest.raises(AdapterError, match=message):
        fit(tmp_path, Sectioned(*sections), **changes)


def test_an_unknown_group(tmp_path):
    sections_fail(
        tmp_path, r"lr_scale names 'lorra'; the trainable groups are head, lora, nora", ADAMW, None, {"lorra": 1.0}
    )


def test_nothing_trains(tmp_path):
    with pytest.raises(AdapterError, match="nothing trains"):
        fit(tmp_path, Sectioned(methods=[], train=[]))


class Rateless(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0.0):
        super().__init__(params, lr=lr, momentum=momentum)


def test_an_optimiser_without_a_default_rate(tmp_path):
    path = f"{Rateless.__module__}.Rateless"
    sections_fail(tmp_path, "Rateless has no default learning rate: set lr", {"class_path": path})
    fit(tmp_path, Sectioned({"class_path": path, "init_args": {"lr": 0.1}}))


def test_a_default_rate_is_used(tmp_path):
    assert rates(tmp_path, {"class_path": "torch.optim.AdamW"}).steps[0]["head"] == 1e-3


@pytest.mark.parametrize(
    ("optimizer", "lr_scheduler", "message"),
    [
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": -1.0}}, None, "SGD does not work with"),
        (ADAMW, schedule("OneCycleLR", max_lr=0.1, pct_start=2.0), r"OneCycleLR .*pct_start=2\.0"),
        (ADAMW, schedule("CosineAnnealingLR", T_0=3), "CosineAnnealingLR .*T_0"),
    ],
)
def test_arguments_that_a_class_refuses(tmp_path, optimizer, lr_scheduler, message):
    sections_fail(tmp_path, message, optimizer, lr_scheduler, limit_train_batches=4)


def of_rates(**changes):
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1} | changes}


NAN, INF = math.nan, math.inf
REFUSED = [
    *((of_rates(lr=value), None, None, f"lr {value!r} must be") for value in (-1.0, 0, 0.0, NAN, INF, -INF)),
    *((of_rates(weight_decay=v), None, None, f"weight_decay {v!r} must be") for v in (-1, -1e-9, NAN, INF)),
    *((ADAMW, None, {"lora": v}, f"lr_scale of 'lora' {v!r} must be") for v in (-1, NAN, INF)),
    *(
        (ADAMW, schedule("OneCycleLR", max_lr=v), None, f"max_lr {v!r} must be")
        for v in (-1, 0, 0.0, NAN, INF, [0.1, 0])
    ),
    *((ADAMW, schedule("CosineAnnealingLR", eta_min=v), None, f"eta_min {v!r} must be") for v in (-1, NAN, INF)),
    (ADAMW, schedule("CyclicLR", base_lr=-1, max_lr=1, cycle_momentum=False), None, "base_lr -1 must be"),
    (ADAMW, schedule("CyclicLR", base_lr=0.1, max_lr=1, step_size_up=0, cycle_momentum=False), None, "step_size_up=0"),
    (ADAMW, schedule("OneCycleLR", max_lr=0.1, div_factor=0), None, "div_factor=0"),
    (ADAMW, schedule("StepLR", step_size=0), None, "StepLR does not work with step_size=0: .*modulo by zero"),
    (ADAMW, schedule("StepLR", step_size=1, gamma=-1.0), None, "gives the learning rate -0.1 in step 1"),
    (ADAMW, schedule("ExponentialLR", gamma=NAN), None, "gives the learning rate nan in step 1"),
    (ADAMW, schedule("ExponentialLR", gamma=1e300), None, "ExponentialLR .*gamma=1e[+]300"),
    (ADAMW, schedule("MultiStepLR", milestones=[2], gamma=-0.5), None, "gives the learning rate -0.05 in step 2"),
    (ADAMW, schedule("LinearLR", start_factor=0.0), None, "LinearLR does not work with"),
]


class Task0(Sectioned):
    """Knows the length of a training without one."""

    trainer = SimpleNamespace(estimated_stepping_batches=6)


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_values_that_nobody_can_mean(case):
    *sections, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message.replace("[0.1, 0]", "0")):
        build_optimizers(Task0(), *sections)


@pytest.mark.parametrize("three_phase", [False, True])
def test_a_cycle_of_any_length(three_phase):
    task = Task0()
    lengths = [(steps, share) for steps in range(1, 13) for share in (0.0, 0.1, 1 / 3, 0.5, 1.0, 1 / steps)]
    for steps, share in lengths:
        task.trainer = SimpleNamespace(estimated_stepping_batches=steps)
        arguments = {"max_lr": 0.1, "pct_start": share, "three_phase": three_phase}
        built = build_optimizers(task, ADAMW, schedule("OneCycleLR", **arguments))
        optimizer, rates = built["optimizer"], built["lr_scheduler"]["scheduler"]
        for step in range(steps):
            assert 0 <= optimizer.param_groups[0]["lr"] <= 0.1 * (1 + 1e-9)
            if step + 1 < steps:
                optimizer.step()
                rates.step()


def test_trying_a_schedule_leaves_no_trace():
    built = build_optimizers(Task0(), ADAMW, schedule("OneCycleLR", max_lr=0.1))
    plain = build_optimizers(Task0(), ADAMW)
    fresh = torch.optim.lr_scheduler.OneCycleLR(plain, [0.1] * len(plain.param_groups), total_steps=6)
    tried = built["lr_scheduler"]["scheduler"]
    values = [{k: v for k, v in g.items() if k != "params"} for g in built["optimizer"].param_groups]
    assert values == [{k: v for k, v in g.items() if k != "params"} for g in plain.param_groups]
    same = tried.state_dict().keys() - {"_anneal_func_type", "anneal_func"}
    assert {k: tried.state_dict()[k] for k in same} == {k: fresh.state_dict()[k] for k in same}


@pytest.mark.parametrize("value", [-1, -1e-9, NAN])
def test_a_negative_clip(tmp_path, value):
    with pytest.raises(AdapterError, match=r"gradient_clip_val .* must be at least 0"):
        fit(tmp_path, Task(), gradient_clip_val=value)


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR"])
def test_more_epochs_than_the_schedule_has(tmp_path, name):
    arguments = {"max_lr": 0.1} if name == "OneCycleLR" else {}
    sections = ADAMW, schedule(name, **arguments)
    running = fit(tmp_path, Sectioned(*sections))
    running.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(AdapterError, match=rf"the {name} of .*end\.ckpt' ends after 6 steps, this run after 12"):
        fit(tmp_path, Sectioned(*sections), ckpt=tmp_path / "end.ckpt", max_epochs=2)


def test_a_trainer_without_an_end(tmp_path):
    running = trainer(tmp_path, AdapterCallback(), max_epochs=-1)
    with pytest.raises(AdapterError, match=r"OneCycleLR needs to know the last step: set trainer\.max_steps"):
        running.fit(Sectioned(ADAMW, schedule("OneCycleLR", max_lr=0.1)), loader())
