"""The script for a GPU runs to its end: each question on a processor with tiny shapes, Triton under its interpreter."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import time
import types

import pytest
import torch

from benchmarks import tables
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import asking, rational_speed
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.asking import ask
from benchmarks.gpu.environment import gpu_environment
from benchmarks.gpu.models import MODELS, sharing, with_arm
from benchmarks.gpu.questions import QUESTIONS, Question
from benchmarks.gpu.setting import Setting, attempt
from benchmarks.gpu.steps import arms
from lit_adapters.ops import rational, set_rational_backend
from tests.gpu_questions import answers, dies, fails, never_ends

TINY = Setting("cpu", "tiny")


def asked(*functions, share=1.0):
    return [Question(f.__name__, f"tests.gpu_questions:{f.__name__}", share) for f in functions]


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_a_question_is_answered_and_shown(question, tmp_path):
    if question.name == "whole fine-tuning":
        pytest.importorskip("trl")
    (record,) = ask([question], TINY, 60, tmp_path / "gpu.json")
    assert record["status"] == "answered", record.get("error")
    assert record["results"]
    assert not [r for r in record["results"] if "error" in r or not r.get("right", True)]
    assert json.loads((tmp_path / "gpu.json").read_text()) == [record]
    assert record["environment"]["torch"] == torch.__version__.partition("+")[0]
    ((heading, (header, rows)),) = gpu_tables.sections([record | {"device": "cuda"}])
    assert heading.lower().startswith(f"**{question.name.lower()}**")
    assert rows
    assert all(len(row) == len(header) for row in rows)


@pytest.mark.slow
def test_a_failing_question_is_recorded_and_the_others_are_asked(tmp_path):
    records = ask(asked(fails, dies, answers), TINY, 10, tmp_path / "gpu.json")
    assert [r["status"] for r in records] == ["failed", "failed", "answered"]
    assert records[0]["results"] == [{"part": 1}]
    assert "ValueError: no such kernel" in records[0]["error"]
    assert "code 3" in records[1]["error"]
    assert "out of luck" in records[1]["error"]
    assert records[2]["results"] == [{"device": "cpu"}]
    assert json.loads((tmp_path / "gpu.json").read_text()) == records


@pytest.mark.slow
def test_the_budget_is_kept(tmp_path):
    begin = time.monotonic()
    records = ask(asked(never_ends, never_ends, answers, share=0.6), TINY, 3 / 60, tmp_path / "gpu.json")
    assert time.monotonic() - begin < 3 + 5
    assert [r["status"] for r in records] == ["stopped", "stopped", "not run"]
    assert [r["seconds"] for r in records] == [pytest.approx(s, abs=1) for s in (1.8, 1.2, 0)]


def test_what_a_stopped_question_has_yielded_is_kept(tmp_path, monkeypatch):
    def stopped(arguments, settings, seconds, log):
        with open(arguments[-1], "w") as lines:
            print(json.dumps({"environment": {"torch": "2"}}), json.dumps({"result": {"a": 1}}), sep="\n", file=lines)

    monkeypatch.setattr(asking, "_run", stopped)
    (record,) = ask(asked(answers), TINY, 1, tmp_path / "gpu.json")
    assert (record["status"], record["results"], record["environment"]) == ("stopped", [{"a": 1}], {"torch": "2"})


def test_one_thing_among_several_may_fail():
    assert attempt({"arm": "a"}, lambda: {"seconds": 1}) == {"arm": "a", "seconds": 1}
    assert attempt({"arm": "a"}, lambda: {}["b"]) == {"arm": "a", "error": "KeyError: 'b'"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), [("llama", 1_235_814_400), ("vit", 86_567_656)])
def test_the_full_models_have_their_shape_and_take_every_arm(name, parameters):
    base = MODELS[name](Setting("meta", "full"))
    assert sum(p.numel() for p in base.parameters()) == parameters
    of_arms = {}
    for arm, library in arms(name):
        model = with_arm(sharing(base.requires_grad_(False)), name, arm, library)
        trained = [p for p in model.parameters() if p.requires_grad]
        of_arms[arm, library] = sum(p.numel() for p in trained)
        assert arm == "full" or {p.dtype for p in trained} == {torch.float32}
    for arm in ("lora", "dora"):
        assert of_arms[arm, "ours"] == of_arms[arm, "peft"] > 1_000_000
    assert {("full", "ours"), ("frozen", "ours"), ("nora", "ours"), ("loran", "ours")} < set(of_arms)


def test_the_device_is_asked_for_time_and_memory(monkeypatch):
    called = []
    for name, value in {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 * 2**20,
        "max_memory_reserved": 4 * 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: called.append(name) or value)
    setting = Setting("cuda", "tiny")
    setting.forget_peak()
    assert setting.peak() == {"allocated_mib": 3, "reserved_mib": 4}
    assert setting.now() > 0
    times = setting.in_turns({"a": lambda: called.append("call")}, rounds=2, calls=3)
    assert len(times["a"]) == 2
    assert called[-4:] == ["call"] * 3 + ["synchronize"]
    assert called[:4] == ["empty_cache", "reset_peak_memory_stats", "synchronize", "max_memory_allocated"]


def test_the_environment_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    properties = types.SimpleNamespace(total_memory=5 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = gpu_environment()
    assert (found["device"], found["gpu_memory_mib"]) == ("a GPU", 5)
    assert {"driver", "cuda", "torch", "triton", "peft", "trl"} <= set(found)


def test_without_a_gpu_the_script_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="finds no GPU"):
        script.main()


def test_the_script_names_what_was_not_answered(monkeypatch, tmp_path):
    records = [{"question": "a", "status": "answered"}, {"question": "b", "status": "not run"}]
    monkeypatch.setattr(script, "ask", lambda *_: records)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match=r"not answered: b \(not run\)"):
        script.main()


@pytest.mark.slow
def test_flashkats_function_is_measured_where_its_package_is_installed(monkeypatch):
    pytest.importorskip("triton")

    class Theirs:
        apply = staticmethod(lambda x, a, b: rational(x, a, b, "sum-of-abs"))

    names = ("rational_kat", "rational_kat.kernels", "rational_kat.kernels.flash_rational_triton")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    modules[names[2]].FlashRationalTriton1DGroup = Theirs
    set_rational_backend("triton")
    try:
        functions, left_out = rational_speed.variants(TINY, torch.randn(1, 2, 48))
    finally:
        set_rational_backend("auto")
    assert not left_out
    assert {"FlashKAT", "sum-of-abs", "compiled GELU"} < set(functions)


def test_pages_show_the_latest_results_of_each_question(tmp_path, monkeypatch):
    def record(question, status, results, device="cuda", **more):
        environment = {"device": "a GPU", "torch": "2.14", "driver": "580", "date": "2026-12-01"}
        return (
            {"question": question, "status": status, "results": results, "device": device}
            | more
            | {"environment": environment if results else None}
        )

    base = {"arm": "base", "library": "none", "merged": False, "seconds": {"median": 1.0, "quartiles": [1.0, 1.0]}}
    base |= {"over_base": {"median": 1.0, "quartiles": [1.0, 1.0]}, "tokens_a_second": 50.0}
    failed = {"arm": "lora", "library": "peft", "merged": True, "error": "ValueError: bad"}
    records = [
        record("generation", "stopped", [base, failed]),
        record("generation", "not run", []),
        record("rational speed", "not run", []),
        record("whole fine-tuning", "failed", [], error="Traceback\nValueError: no file\n"),
        record("rational errors", "answered", [{"form": "of a processor"}], device="cpu"),
    ]
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("<!-- gpu -->\n<!-- /gpu -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "load", lambda path: records)
    tables.gpu()
    text = page.read_text()
    assert "**Generation**, on a GPU (driver 580, torch 2.14), 2026-12-01. Stopped when its time was up." in text
    assert "Failed: lora peft merged: ValueError: bad." in text
    assert "| base | 1.00 (1.00\N{EN DASH}1.00) | 50.0 |" in text
    assert "**Rational speed**: not run, as the time was up." in text
    assert "**Whole fine-tuning**: failed (ValueError: no file)." in text
    assert "processor" not in text
    monkeypatch.setattr(tables, "load", lambda path: [])
    tables.gpu()
    assert gpu_tables.NOT_RUN in page.read_text()
