"""Studies that really run: a user's own program, killed studies that go on, failures, and divergence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_adapters.errors import AdapterError
from lit_adapters.study.planning import Plan
from lit_adapters.study.records import Results
from lit_adapters.study.running import run_study
from tests.study.studies import STUDY, write_study

ROOT = Path(__file__).parents[2]
RATE = "optimizer.init_args.lr"
pytestmark = pytest.mark.slow


def outcomes(results):
    return {r.id: (r.status, r.metrics, {n: v.tolist() for n, v in results.items(r).items()}) for r in results.records}


def test_a_killed_study_goes_on_and_runs_nothing_twice(tmp_path):
    study = write_study(tmp_path, run={"workers": 2})
    whole = outcomes(run_study(study, tmp_path / "whole"))
    line = [
        sys.executable,
        "-m",
        "lit_adapters.cli",
        "study",
        "run",
        str(study.path),
        "--out",
        str(tmp_path / "killed"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    records = tmp_path / "killed" / "runs"
    while not (found := list(records.glob("*/record.json"))):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)
    kept = {path: path.stat().st_mtime_ns for path in found}
    assert len(kept) < len(whole)
    results = run_study(study, tmp_path / "killed")
    assert outcomes(results) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # The packed files alone are enough: nothing is due, and nothing is lost.
    for path in records.glob("*/record.json"):
        path.unlink()
    again = Results.load(tmp_path / "killed")
    assert outcomes(again) == whole
    assert Plan(study).due(again) == []


def test_what_a_run_leaves(tmp_path):
    arms = {"wide": {"set": {"model.width": 3}, "rates": {RATE: 0.1}}}
    study = write_study(tmp_path, arms=arms, contrasts=None, search=None)
    results = run_study(study, tmp_path / "out")
    record = results.records[0]
    assert record.parameters == {"trainable": 6, "without_head": 6}
    assert [point["step"] for point in record.curve if "train/loss" in point] == [1, 2, 3, 4]
    assert [point["step"] for point in record.curve if "val/loss" in point] == [2, 4]  # where the validations were
    errors = results.items(record)["error"]
    assert errors.shape == (8,)
    assert errors.astype(float).mean() == pytest.approx(record.metrics["test/loss"], rel=1e-3)
    assert not list((tmp_path / "out").rglob("*.ckpt"))
    assert record.environment["torch"]
    first, second = results.records
    assert first.metrics != second.metrics  # another training set


def test_a_run_that_fails_stops_the_study_and_is_named(tmp_path):
    arms = {"broken": {"set": {"model.broken": True}, "rates": {RATE: 0.1}}, "good": {"rates": {RATE: 0.1}}}
    study = write_study(tmp_path, arms=arms, contrasts=None, search=None)
    with pytest.raises(AdapterError, match=r"the run broken-final-0-0-\w+ failed: .*broken on purpose.*log\.txt"):
        run_study(study, tmp_path / "out")
    assert Results.load(tmp_path / "out").records == []


def test_a_run_that_diverges_has_an_outcome(tmp_path):
    search = {**STUDY["search"], "grid": [0.1, 1e30], "extensions": 0}
    study = write_study(tmp_path, search=search)
    results = run_study(study, tmp_path / "out")
    diverged = [record for record in results.records if record.status == "diverged"]
    assert [(r.stage, r.rates[RATE]) for r in diverged] == [("search", 1e30)]
    assert Plan(study).chosen(results, "narrow").rates == {RATE: 0.1}


def test_the_search_never_reads_the_test_split(tmp_path):
    from tests.study.studies import PROGRAM

    program = PROGRAM.replace("return self.loader(20_000)", "raise ValueError('the test split was read')")
    study = write_study(tmp_path, program=program)
    with pytest.raises(AdapterError, match="the test split was read"):
        run_study(study, tmp_path / "out")
    assert {record.stage for record in Results.load(tmp_path / "out").records} == {"search"}


def test_two_processes_do_not_run_one_study(tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AdapterError, match="another process runs the study"):
            run_study(write_study(tmp_path), tmp_path / "out")


def test_a_run_trains_on_several_devices_and_is_evaluated_on_one(tmp_path):
    arms = {"wide": {"set": {"model.width": 3}, "rates": {RATE: 0.1}}}
    several = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    study = write_study(tmp_path, arms=arms, contrasts=None, search=None, set=several)
    results = run_study(study, tmp_path / "out")
    for record in results.records:
        assert max(point["step"] for point in record.curve) == 2  # two processes share eight items
        errors = results.items(record)["error"]
        assert errors.shape == (8,)
        assert errors.astype(float).mean() == pytest.approx(record.metrics["test/loss"], rel=1e-3)
