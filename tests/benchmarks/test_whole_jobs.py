"""Whole jobs at tiny size, each side as a process of its own: both do the same, tell their times and save adapters."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import performance_tables
from benchmarks.jobs.comparison import check, check_counts, in_turns, summary
from benchmarks.jobs.job import Data, Job
from benchmarks.jobs.process import Side, run
from benchmarks.jobs.report import Report, stage_seconds, steady_seconds
from benchmarks.whole_jobs import JOBS

SAVING = {"sft_padded", "sft_packed", "dpo", "grpo", "vit", "vit_trainer"}
COUNTS = {"tokens": 90, "learned": 20, "steps": 4, "trained": 100}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_both_sides_of_a_job_do_the_same(name, work):
    pytest.importorskip("trl")
    job = JOBS[name]("tiny", Data(), work)
    ours, theirs = (run(side, threads=1) for side in (job.ours, job.theirs))
    check(job, ours, theirs)
    assert ours["answers"] == theirs["answers"]
    for side, found in ((job.ours, ours), (job.theirs, theirs)):
        assert found["counts"][job.unit] > 0
        assert sum(found["stages"].values()) == pytest.approx(found["seconds"], rel=0.05)
        assert min(found["stages"].values()) >= 0
        assert 100 < found["peak_mib"] < 20_000
        if name != "mmlu":
            assert 0 < found["steady_seconds"] < found["seconds"]
        if name in SAVING:
            assert found["counts"]["trained"] > 0
            assert any(file.stat().st_size > 0 for file in side.out.rglob(side.saves))


def made(unit="tokens"):
    side = Side("none", [], Path("nowhere"))
    return Job("sft", "TRL", unit, {}, side, replace(side, module="other"))


def result(seconds, **counts):
    return {
        "seconds": seconds,
        "steady_seconds": seconds / 10,
        "peak_mib": 100.0 * seconds,
        "stages": {"start-up": 1.0, "steps": seconds - 1.0},
        "counts": COUNTS | counts,
        "answers": [],
    }


def test_sides_that_differ_are_no_comparison():
    check_counts(made(), COUNTS, COUNTS | {"tokens": 90.5})
    for name, value in {"tokens": 92, "learned": 21, "steps": 5, "trained": 101}.items():
        with pytest.raises(SystemExit, match=rf"ours has {COUNTS[name]} {name}, TRL {value}"):
            check_counts(made(), COUNTS, COUNTS | {name: value})
    with pytest.raises(SystemExit, match="counts no images"):
        check_counts(made(unit="images"), COUNTS, COUNTS)
    check(made(), result(3) | {"first_loss": 2.0}, result(3) | {"first_loss": 2.1})
    same = replace(made(), same_first_batch=True)
    check(same, result(3) | {"first_loss": 2.0}, result(3) | {"first_loss": 2.001})
    with pytest.raises(SystemExit, match=r"sft begins with the loss 2\.0 in ours and 2\.1 in TRL"):
        check(same, result(3) | {"first_loss": 2.0}, result(3) | {"first_loss": 2.1})


def test_sides_take_turns_and_ratios_are_those_of_rounds(capsys):
    called = []
    seconds = {"none": iter([9, 2, 4, 6]), "other": iter([9, 4, 4, 4])}

    def fake(side):
        called.append(side.module)
        return result(next(seconds[side.module]))

    runs = in_turns(made(), 3, fake)
    assert called == ["none", "other", "none", "other", "other", "none", "none", "other"]
    found = summary(made(), runs)
    assert found["over_peer"]["seconds"] == {"median": 1.0, "quartiles": [0.5, 1.5]}
    assert found["ours"]["per_second"] == 90 / 4
    assert found["theirs"]["stages"]["steps"]["median"] == 3.0
    (row,) = performance_tables.whole_job_rows([found])
    assert row[:3] == ["sft, beside TRL", "4 / 4", "**1.00 (0.50\N{EN DASH}1.50)**"]
    assert row[4:] == ["22 / 22 tokens", "1.00 (0.50\N{EN DASH}1.50)"]
    assert performance_tables.whole_job_stages([found])[1] == ["sft, TRL", "start-up 1.0, steps 3.0"]
    stages = {"start-up": 1.0, "data": 2.0, "first step": 0.5, "other steps": 4.0, "exit": 0.1}
    found["theirs"]["stages"] = {name: {"median": seconds} for name, seconds in stages.items()}
    expected = "until the end of the first step 3.5, other steps 4.0, exit 0.1"
    assert performance_tables.whole_job_stages([found])[1] == ["sft, TRL", expected]
    with pytest.raises(SystemExit, match="1 rounds have no quartiles"):
        in_turns(made(), 1, fake)


def test_a_report_counts_text_without_its_padding(tmp_path):
    report = Report(tmp_path / "report.json")
    learned = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1]]).bool()
    report.count_text(torch.zeros(2, 6), learned)
    assert report.counts == {"read": 12, "tokens": 10, "learned": 5}


def test_stages_and_steady_steps():
    report = {"stages": {"data": 3.0, "start-up": 2.0, "saving": 16.0}, "steps": [8.0, 12.0, 13.0, 15.0]}
    expected = {"start-up": 1.0, "data": 1.0, "first step": 5.0, "other steps": 7.0, "saving": 1.0, "exit": 4.0}
    assert stage_seconds(report, started=1.0, seconds=19.0) == expected
    assert steady_seconds(report["steps"]) == 1.5  # two steps in three seconds
    with pytest.raises(SystemExit, match="2 steps have no steady time"):
        steady_seconds([1.0, 2.0])


def test_a_side_that_fails_says_why(tmp_path):
    with pytest.raises(SystemExit, match=re.compile(r"no_such_module failed.*No module named", re.DOTALL)):
        run(Side("no_such_module", [], tmp_path / "side"), threads=1)


def test_real_sizes_need_data(work):
    with pytest.raises(SystemExit, match="needs --images"):
        JOBS["vit"]("real", Data(), work)
