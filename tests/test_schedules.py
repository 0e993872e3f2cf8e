"""Schedules against their closed forms, their ends, and their configuration."""

import itertools
import json
import math

import pytest

import lit_adapters as la
from lit_adapters import schedules
from lit_adapters.schedules import (
    Adaptive,
    Cosine,
    Exponential,
    Hold,
    Linear,
    Polynomial,
    Schedule,
    Step,
    monitor_mode,
    to_schedule,
)

RAMPS = [Linear, Cosine, Exponential, Polynomial, Step]
ALL = [
    *(kind(start=0.1, end=0.6) for kind in RAMPS),
    Hold(0.4),
    Adaptive(start=0.1, duration=0.3, end=0.7),
]


@pytest.mark.parametrize("kind", RAMPS)
def test_ramps_are_one_before_and_exactly_zero_after(kind):
    schedule = kind(start=0.1, end=0.7)
    assert [schedule(p) for p in (0.0, 0.05, 0.1)] == [1.0, 1.0, 1.0]
    assert [schedule(p) for p in (0.7, 0.8, 1.0)] == [0.0, 0.0, 0.0]
    values = [schedule(p / 1000) for p in range(1001)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert {0.0 <= v <= 1.0 for v in values} == {True}
    assert kind(start=0.0, end=1.0)(1.0) == 0.0


@pytest.mark.parametrize("t", [0.1, 0.25, 0.5, 0.9])
def test_shapes(t):
    p = 0.2 + 0.6 * t
    ends = {"start": 0.2, "end": 0.8}
    assert Linear(**ends)(p) == pytest.approx(1 - t)
    assert Cosine(**ends)(p) == pytest.approx(math.cos(math.pi * t / 2) ** 2)
    assert Polynomial(**ends, power=3.0)(p) == pytest.approx((1 - t) ** 3)
    assert Exponential(**ends, rate=4.0)(p) == pytest.approx(
        math.expm1(-4 * (1 - t)) / math.expm1(-4) * math.exp(-4 * t)
    )
    assert Step(**ends, steps=4)(p) == {0.1: 1.0, 0.25: 0.75, 0.5: 0.5, 0.9: 0.25}[t]


def test_hold_never_moves():
    assert {Hold(0.3)(p / 10) for p in range(11)} == {0.3}


def test_adaptive_falls_while_the_loss_does_not_rise_and_meets_its_deadline():
    schedule, steps = Adaptive(start=0.1, duration=0.2, end=0.8), 100

    def run(rising) -> list[float]:
        betas = [1.0]
        for step in range(1, steps + 1):
            betas.append(schedule.advance(betas[-1], step / steps, 1 / steps, rising(step)))
        return betas

    willing = run(lambda step: False)
    assert willing[10] == 1.0
    assert willing[20] == pytest.approx(0.5)
    assert willing[29] > 0 == willing[31]
    never = run(lambda step: True)
    assert never[60] == 1.0  # the deadline's own ramp begins here
    assert never[70] == pytest.approx(0.5)
    assert never[80] == 0.0
    half = run(lambda step: step > 20 and step < 50)
    assert half[20] == half[49] == pytest.approx(0.5)
    assert half[55] == pytest.approx(0.2)
    assert all(a >= b for run_ in (willing, never, half) for a, b in itertools.pairwise(run_))
    assert [schedule(p) for p in (0.0, 0.6, 0.8, 1.0)] == [1.0, pytest.approx(1.0), 0.0, 0.0]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_configuration_round_trip(schedule):
    config = json.loads(json.dumps(schedule.to_config()))
    assert config["class_path"].startswith("lit_adapters.schedules.")
    assert to_schedule(config) == schedule
    method = la.AFALoRA(schedule=config)
    assert method == la.AFALoRA(schedule=schedule)
    assert method.to_config()["init_args"]["schedule"] == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(start=0.5, end=0.5), r"start 0.5 and end 0.5 must be 0 <= start < end <= 1"),
        (lambda: Cosine(end=1.2), "end 1.2"),
        (lambda: Polynomial(power=0.0), "power 0.0 must be positive"),
        (lambda: Exponential(rate=-1.0), "rate -1.0 must lie in"),
        (lambda: Step(steps=0), "steps 0 must be a whole number"),
        (lambda: Step(steps=2.5), "steps 2.5 must be a whole number"),
        (lambda: Hold(value=1.5), r"value 1.5 must lie in \[0, 1\]"),
        (lambda: Adaptive(duration=0.9), "duration 0.9"),
        (lambda: Adaptive(window=2), "window 2"),
        (lambda: Adaptive(monitor="train/kl"), "monitor 'train/kl' does not tell whether low or high values are good"),
        (lambda: Adaptive(mode="max"), "mode 'max' belongs to a monitor"),
        (lambda: Adaptive(monitor="train/kl", mode="low"), "mode 'low' must be 'min' or 'max'"),
        (lambda: to_schedule("linear"), "'linear' is no schedule"),
        (lambda: to_schedule({"class_path": "lit_adapters.schedules.Missing"}), "no schedule"),
        (lambda: to_schedule({"class_path": "lit_adapters.LoRA"}), "is no schedule"),
        (lambda: to_schedule({"class_path": "lit_adapters.schedules.Linear", "init_args": {"stop": 1}}), "stop"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(la.AdapterError, match=message):
        make()


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [
        ("train/loss", None, "min"),
        ("train/reward", None, "max"),
        ("reward_accuracy", None, "max"),
        ("train/loss", "max", "max"),
        ("train/kl", "min", "min"),
    ],
)
def test_the_name_of_a_monitor_tells_its_mode(monitor, mode, expected):
    assert monitor_mode(monitor, mode) == expected


def test_files_hold_a_monitor_only_where_there_is_one():
    """Files of version 0.1 have none, and are to equal those that are written now."""
    assert Adaptive().to_config()["init_args"].keys() == {"start", "duration", "end", "window"}
    named = Adaptive(monitor="train/reward")
    assert named.to_config()["init_args"]["monitor"] == "train/reward"
    assert to_schedule(named.to_config()) == named


def test_every_schedule_is_covered():
    kinds = {v for v in vars(schedules).values() if isinstance(v, type) and issubclass(v, Schedule)}
    assert kinds - {Schedule, schedules.Ramp} == {type(s) for s in ALL}
