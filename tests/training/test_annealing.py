"""Annealing by step numbers and values alone, without a trainer."""

import pytest

import lit_adapters as la
from lit_adapters.schedules import Adaptive, Linear
from lit_adapters.training.annealing import LOSS, Annealer, Watched
from tests.lightning.tiny_task import Net

REWARD = Watched("train/reward", None)


def adapted(*schedules):
    net = Net()
    la.attach(
        net,
        [
            la.AFALoRA(rank=2, activation="silu", schedule=schedule, targets=[f"blocks.{i}.fc1"])
            for i, schedule in enumerate(schedules)
        ],
    )
    return net


def betas(net):
    return [adapter.beta.item() for _, adapter in la.adapters(net)]


def test_betas_follow_the_steps():
    net = adapted(Linear(end=0.5), Linear(end=1.0))
    annealer = Annealer(net)
    annealer.start(0, 10)
    assert betas(net) == [1.0, 1.0]
    annealer.advance(1)
    annealer.advance(3)
    assert betas(net) == pytest.approx([0.4, 0.7])
    assert annealer.beta == pytest.approx(0.7)
    assert annealer.nonlinear() == ["blocks.0.fc1", "blocks.1.fc1"]
    annealer.advance(10)
    assert betas(net) == [0.0, 0.0]
    assert annealer.nonlinear() == []


def test_nothing_moves_between_steps():
    net = adapted(Linear())
    annealer = Annealer(net)
    annealer.start(0, 10)
    annealer.advance(0)
    assert betas(net) == [1.0]


def test_without_schedules_there_is_nothing_to_know():
    annealer = Annealer(Net())
    annealer.start(0, float("inf"))
    assert annealer.beta is None
    assert annealer.state_dict() == {"betas": [], "loss": 0.0, "batches": 0, "means": {}}


def test_a_step_of_fewer_batches_counts_as_any_other():
    """The last step of an epoch may have fewer batches. Its loss is their mean, not their sum."""
    nets = adapted(Adaptive(duration=0.5, window=5)), adapted(Adaptive(duration=0.5, window=5))
    even, uneven = (Annealer(net) for net in nets)
    for annealer, sizes in ((even, [4, 4, 4]), (uneven, [4, 4, 1])):
        annealer.start(0, 30)
        for step in range(1, 31):
            for _ in range(sizes[step % 3]):
                annealer.observe(LOSS, 2.0)
            annealer.advance(step)
            if step == 10:
                assert annealer.beta == pytest.approx(1 - 10 / 15)
    assert betas(nets[0]) == betas(nets[1])


@pytest.mark.parametrize("total", [float("inf"), -1])
def test_an_unknown_end_is_refused(total):
    with pytest.raises(la.AdapterError, match="no end that is known; set max_steps"):
        Annealer(adapted(Linear())).start(0, total)


@pytest.mark.parametrize(("schedule", "step"), [(Linear(end=0.5), 11), (Adaptive(end=0.8), 17), (Linear(), 7)])
def test_where_an_early_end_is_linear(schedule, step):
    annealer = Annealer(adapted(schedule))
    annealer.start(0, 20)
    assert annealer.linear_from() == step


ADAPTIVE = {"duration": 0.5, "end": 1.0, "window": 5}


def run(annealer, steps, values):
    for step in steps:
        for watched, value in values(step).items():
            annealer.observe(watched, value)
        annealer.advance(step + 1)


def test_two_schedules_look_at_two_values():
    """The loss falls and the reward falls, too: the first goes on, the second waits for its deadline."""
    net = adapted(Adaptive(**ADAPTIVE), Adaptive(monitor="train/reward", **ADAPTIVE))
    annealer = Annealer(net)
    annealer.start(0, 20)
    assert annealer.watched == {LOSS, REWARD}
    run(annealer, range(6), lambda step: {LOSS: -step, REWARD: step})
    by_loss, by_reward = betas(net)
    assert by_loss == pytest.approx(1 - 6 / 10)
    assert by_reward == pytest.approx(1 - 1 / 10)  # the first step knew of no fall yet


def test_a_resumed_annealer_goes_on_bit_for_bit():
    def values(step):
        return {LOSS: [0.3, 0.1, 0.7][step % 3], REWARD: [0.2, 0.5][step % 2]}

    def fresh(state=None):
        net = adapted(Adaptive(**ADAPTIVE), Adaptive(monitor="train/reward", **ADAPTIVE))
        return net, Annealer(net, state)

    whole, annealer = fresh()
    annealer.start(0, 20)
    run(annealer, range(9), values)
    state = annealer.state_dict()
    assert state.keys() == {"betas", "loss", "batches", "means", "monitors"}
    run(annealer, range(9, 13), values)
    resumed, again = fresh(state)
    again.start(9, 20)
    run(again, range(9, 13), values)
    assert again.state_dict() == annealer.state_dict()
    assert betas(resumed) == betas(whole)


def test_a_state_of_version_0_1_is_taken_up():
    """It knew one value, whatever that was."""
    net = adapted(Adaptive(**ADAPTIVE))
    annealer = Annealer(net, {"betas": [0.625], "loss": 0.0, "means": {"5": [2.0, 1.0]}})
    annealer.start(5, 20)
    assert betas(net) == [0.625]
    annealer.observe(LOSS, 9.0)
    annealer.advance(6)
    assert betas(net) == [0.625]  # still rising, by means of then


def test_batches_whose_values_sum_to_zero_are_counted():
    """As rewards may; half of the step's batches are seen after the resume."""
    net = adapted(Adaptive(**ADAPTIVE))
    whole, stopped = Annealer(net), Annealer(net)
    for annealer in (whole, stopped):
        annealer.start(0, 20)
        annealer.observe(LOSS, 1.0)
        annealer.observe(LOSS, -1.0)
    resumed = Annealer(net, stopped.state_dict())
    resumed.start(0, 20)
    for annealer in (whole, resumed):
        annealer.observe(LOSS, 3.0)
        annealer.advance(1)
    assert resumed.state_dict()["means"] == whole.state_dict()["means"] == {"5": [1.0, 1.0]}


def test_of_the_batches_of_one_step_the_mean_counts():
    net = adapted(Adaptive(**ADAPTIVE))
    annealer = Annealer(net)
    annealer.start(0, 20)
    annealer.observe(LOSS, 1.0)
    annealer.observe(LOSS, 2.0)
    assert (annealer.state_dict()["loss"], annealer.state_dict()["batches"]) == (3.0, 2)
    annealer.advance(1)
    assert annealer.state_dict() == {"betas": [0.9], "loss": 0.0, "batches": 0, "means": {"5": [1.5, 1.5]}}
