"""What is recorded of adapters, calibration and checkpoints, without a trainer."""

import math

import pytest
import torch

import lit_adapters as la
from lit_adapters.files.adapters import RECORD
from lit_adapters.training.calibration import awaits_calibration, calibrate_together
from lit_adapters.training.checkpoint import check_model, check_recipe, record, redundant_keys
from lit_adapters.training.recording import Recorder
from tests.lightning.tiny_task import Net, both, nora


def adapted(methods=None):
    net = Net()
    la.attach(net, methods or both(), train=["head"])
    return net


def test_the_scalars_of_a_step():
    net = adapted()
    recorder = Recorder(net, ["functions", "weights"])
    scalars = recorder.record(0, beta=None)
    for name, adapter in la.adapters(net):
        for statistic, value in adapter.statistics().items():
            assert scalars[f"adapter/{adapter.method}/{name}/{statistic}"] == pytest.approx(value)
    assert recorder.record(0, None) == {}  # once
    assert recorder.step == 0
    assert recorder.record(1, beta=0.25)["adapter/beta"] == 0.25


def test_only_what_was_chosen():
    tags = Recorder(adapted(), ["weights"]).record(0, None)
    assert {tag.split("/")[1] for tag in tags} == {"lora", "summary"}
    assert Recorder(adapted(), []).record(0, None) == {}


def test_a_resumed_recorder_knows_its_last_step():
    recorder = Recorder(adapted(), ["functions", "subspace"])
    recorder.record(3, None)
    again = Recorder(adapted(), ["functions", "subspace"], recorder.state_dict())
    assert again.step == 3
    assert again.record(3, None) == {}


class Board:
    """Counts what is drawn."""

    def __init__(self):
        self.figures = []

    def figure(self, tag, figure, step):
        self.figures.append((tag, step))

    def values(self, *args):
        pass


def test_figures_wait_until_they_are_worth_their_time_except_the_last():
    board, recorder = Board(), Recorder(adapted(la.LoRA(rank=2)), ["weights"])
    recorder.draw([board], 1)
    assert board.figures == []
    recorder.draw([board], 2, last=True)
    recorder.draw([board], 2, last=True)  # once
    assert board.figures == [("adapter/norm_map", 2)]


def test_calibration_by_any_call():
    net, seen = adapted(nora(fit_range="calibrate")), []

    def run(batch):
        seen.append(batch["step"])
        net(batch["x"])

    assert awaits_calibration(net)
    calibrate_together(net, [{"x": torch.randn(16, 8), "step": i} for i in range(2)], run)
    assert not awaits_calibration(net)
    assert seen == [0, 1]


def test_the_record_names_the_run_and_refuses_others():
    net = adapted()
    checkpoint = {RECORD: record(net)}
    check_model(checkpoint, adapted(), "own.ckpt")
    with pytest.raises(la.AdapterError, match=r"'own.ckpt' was trained with NoRA and LoRA, the model has LoRA"):
        check_model(checkpoint, adapted(la.LoRA(rank=2)), "own.ckpt")
    check_recipe(checkpoint, Net, [method.to_config() for method in both()], "own.ckpt")
    check_recipe(checkpoint, None, None, "own.ckpt")
    with pytest.raises(la.AdapterError, match=r"the model is a .*Linear"):
        check_recipe(checkpoint, torch.nn.Linear, None, "own.ckpt")
    with pytest.raises(la.AdapterError, match="was not written by a run with"):
        check_model({}, net, "own.ckpt")


def test_a_schedule_of_version_0_1_is_the_same_setting():
    """Its record lacks `monitor`; a monitor makes it another setting."""

    def model(**changes):
        return adapted(la.AFALoRA(rank=2, schedule=la.schedules.Adaptive(**changes)))

    written = record(model())
    arguments = written["models"][""]["methods"][0]["init_args"]["schedule"]["init_args"]
    assert arguments == {"start": 0.0, "duration": 0.3, "end": 0.8, "window": 50}
    check_model({RECORD: written}, model(), "own.ckpt")
    with pytest.raises(la.AdapterError, match=r"schedule=Adaptive\(monitor='train/reward'\)"):
        check_model({RECORD: written}, model(monitor="train/reward"), "own.ckpt")


def test_frozen_parameters_need_not_be_saved():
    net = adapted()
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert redundant_keys(net) == frozen
    assert {f"inner.{name}" for name in frozen} == redundant_keys(torch.nn.ModuleDict({"inner": net}))


GROWN = {
    "nora": (nora, 1e30),
    "anchored": (lambda: nora(base="anchored"), 1e30),
    "direct": (lambda: nora(rank=None), 3e38),
    "lora": (lambda: la.LoRA(rank=2), 3e38),
    "dora": (lambda: la.DoRA(rank=2), 3e38),
    "afa": (lambda: la.AFALoRA(rank=2), 3e38),
}


@pytest.mark.parametrize("size", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("method", GROWN)
def test_adapters_beyond_all_bounds(method, size):
    make, largest = GROWN[method]
    net = adapted(make())
    recorder = Recorder(net, ("functions", "weights", "subspace"))
    recorder.record(0, None)
    for _, adapter in la.adapters(net):
        for parameter in adapter.adapter_parameters().values():
            parameter.data.normal_().mul_(largest * size)
    with pytest.raises(la.AdapterError, match=r"grown beyond all bounds at step 7 .*Lower the learning rate"):
        recorder.record(7, None)
