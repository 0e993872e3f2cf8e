"""Optimiser and schedule from YAML sections: what trains, at which rate, and when the rate ends."""

import math

import pytest
import torch
from lightning.pytorch import Callback

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from lit_adapters.lightning.optimizers import build_optimizers
from tests.lightning.tiny_task import Task, fit, loader, trainer

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
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": -1.0}}, None, "SGD does not work with lr=-1.0"),
        (
            ADAMW,
            schedule("OneCycleLR", max_lr=0.1, pct_start=0.25),
            r"OneCycleLR .*total_steps=4.*change its init_args",
        ),
        (ADAMW, schedule("OneCycleLR", max_lr=0.1, pct_start=2.0), r"OneCycleLR .*pct_start=2\.0"),
        (ADAMW, schedule("CosineAnnealingLR", T_0=3), "CosineAnnealingLR .*T_0"),
    ],
)
def test_arguments_that_a_class_refuses(tmp_path, optimizer, lr_scheduler, message):
    sections_fail(tmp_path, message, optimizer, lr_scheduler, limit_train_batches=4)


def test_a_trainer_without_an_end(tmp_path):
    running = trainer(tmp_path, AdapterCallback(), max_epochs=-1)
    with pytest.raises(AdapterError, match=r"OneCycleLR needs to know the last step: set trainer\.max_steps"):
        running.fit(Sectioned(ADAMW, schedule("OneCycleLR", max_lr=0.1)), loader())
