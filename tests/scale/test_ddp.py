"""Two processes on half a batch each learn what one learns on the whole, and stop together."""

import re
from typing import Any

import pytest
import torch

from tests.callback.tiny_task import events
from tests.scale import applications
from tests.scale.processes import run_in_two
from tests.scale.tasks import CASES, fit

pytestmark = pytest.mark.slow
NAMES = [f"{model}-{method}" for model, method in CASES if method != "calibrated"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    first, second = run_in_two("tests.scale.ddp_run", folder)
    return folder, first, second


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, {
        f"{name}-{method}": fit(folder, name, method, 1) for name, method in CASES if method != "calibrated"
    }


def scalars(folder, name) -> dict[str, list[tuple[int, float]]]:
    board: Any = events(folder.joinpath(*name.split("-", 1)) / "run")
    tags = [tag for tag in board.Tags()["scalars"] if tag != "epoch"]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process_with_the_whole_batch(one, two, name):
    alone, (_, together, second) = one[1][name], two
    assert torch.tensor(together[name]["losses"]) == pytest.approx(torch.tensor(alone["losses"]), rel=1e-5)
    assert together[name]["losses"] == second[name]["losses"]
    assert together[name]["state"].keys() == alone["state"].keys()
    for key, value in alone["state"].items():
        assert torch.equal(together[name]["state"][key], second[name]["state"][key]), key
        torch.testing.assert_close(together[name]["state"][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_logs_once_what_one_process_logs(one, two, name):
    alone, together = scalars(one[0], name), scalars(two[0], name)
    assert alone.keys() == together.keys()
    assert any(tag.startswith("adapter/summary/") for tag in alone)
    for tag, records in alone.items():
        assert [step for step, _ in together[tag]] == [step for step, _ in records], tag
        values = [value for _, value in records]
        assert [value for _, value in together[tag]] == pytest.approx(values, rel=1e-3, abs=1e-6), tag


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("applied")
    return folder, {name: applications.fit(folder, name, 1) for name in applications.APPLICATIONS}


def samples(batch) -> list[Any]:
    """The rows of a batch, without padding, so that they compare however they were put together."""
    if isinstance(batch, dict):
        masks = batch["attention_mask"].bool()
        return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    return [(image.sum().item(), label.item()) for image, label in zip(*batch, strict=True)]


@pytest.mark.parametrize("name", applications.APPLICATIONS)
def test_both_applications_share_out_the_order_of_one_process(applied, two, name):
    _, first, second = two
    for alone, a, b in zip(applied[1][name]["batches"], first[name]["batches"], second[name]["batches"], strict=True):
        taken_in_turns = [sample for pair in zip(samples(a), samples(b), strict=True) for sample in pair]
        assert taken_in_turns == samples(alone)


@pytest.mark.parametrize("name", applications.APPLICATIONS)
def test_both_applications_learn_and_log_the_same(applied, two, name):
    alone, (_, first, second) = applied[1][name], two
    assert first[name]["losses"] == second[name]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first[name]["metrics"] == second[name]["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
    for key, value in alone["state"].items():
        torch.testing.assert_close(first[name]["state"][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_learned_tokens_survive_another_number_of_processes(applied, two, tmp_path):
    """Two processes counted what one counts; one goes on from there, whoever saved."""
    counted = applied[1]["language"]["metrics"]["train/learned_tokens"]
    both, alone = two[0] / "language" / "last.ckpt", applied[0] / "language" / "last.ckpt"
    assert all(torch.load(path, weights_only=True)["learned_tokens"] == counted for path in (both, alone))
    goes_on = applications.fit(tmp_path, "language", 1, ckpt=both, max_epochs=2)["metrics"]["train/learned_tokens"]
    assert goes_on == applications.fit(tmp_path, "language", 1, max_epochs=2)["metrics"]["train/learned_tokens"]


def test_adaptive_annealing_has_moved_alike(one, two):
    betas = [run["vit-adaptive"]["state"]["net.blocks.0.mlp.fc1.beta"].item() for run in (one[1], *two[1:])]
    assert betas[0] == betas[1] == betas[2] < 1


def test_calibration_is_the_first_processes(two):
    folder, first, second = two
    for key, value in first["vit-calibrated"]["state"].items():
        assert torch.equal(value, second["vit-calibrated"]["state"][key]), key
    state = first["vit-calibrated"]["state"]
    assert all(state[f"net.blocks.{i}.mlp.act.calibrated"] for i in (0, 1))
    assert state["net.blocks.0.mlp.act.fit_range"].tolist() != [-6.0, 6.0]
    assert first["vit-calibrated"]["losses"] == second["vit-calibrated"]["losses"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("inf", r"^the loss is inf at step 1: every layer's output is finite, so it came up in the loss\."),
        ("bypassed", r"^1 of 2 adapters did not run: blocks\.0\.mlp\.act\. "),
        ("uncalibrated", r"Uncallable\.predict_step, which failed \(RuntimeError: no such column\)"),
    ],
)
def test_what_stops_one_process_stops_both(two, run, message):
    _, first, second = two
    assert first[run] == second[run]
    assert re.search(message, first[run]), first[run]
