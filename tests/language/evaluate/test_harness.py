"""lm-evaluation-harness and our scorer agree, question by question."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lit_adapters as la
from language.evaluate.__main__ import main
from language.evaluate.harness import as_results, run_harness
from language.evaluate.likelihood import score_choices
from language.evaluate.metrics import Estimate
from language.evaluate.questions import Question
from language.evaluate.run import evaluate
from language.evaluate.tasks import EvalSettings
from language.models import create_model, create_tokenizer
from lit_adapters.errors import DataError

# Looked for, not imported: importing it takes many seconds, also where slow tests are left out.
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


def questions() -> list[Question]:
    head = "The following are multiple choice questions (with answers) about numbers.\n\n"
    head += "What is 0?\nA. no\nB. yes\nAnswer: B\n\n"
    letters = [Question(f"{head}What is {i}?\nA. {i}\nB. {i + 1}\nAnswer:", (" A", " B"), i % 2) for i in range(6)]
    texts = [Question(f"Count to {i}:", (f" {i}", " some more", " é"), i % 3) for i in range(6)]
    return letters + texts


def write_task(folder: Path, name: str, asked: list[Question]) -> None:
    """Questions as a multiple-choice task of the harness, whose data are a local file."""
    rows = [{"prompt": q.prompt, "choices": list(q.choices), "answer": q.answer} for q in asked]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.mark.slow
@needs_harness
def test_agrees_with_our_scorer(tmp_path):
    torch.manual_seed(1)
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    la.attach(model, [la.LoRAN(rank=2), la.NoRA(groups=4)])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    asked = questions()
    write_task(tmp_path, "numbers", asked)
    settings = EvalSettings(harness_tasks=str(tmp_path), batch_size=4)
    result = run_harness(model, tokenizer, ["numbers"], settings)
    samples = sorted(result["samples"]["numbers"], key=lambda sample: sample["doc_id"])
    theirs = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    ours = score_choices(model, tokenizer, [q.prompt for q in asked], [q.choices for q in asked])
    for mine, other in zip(ours.log_likelihoods, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
    right = [p == q.answer for p, q in zip(ours.predictions(), asked, strict=True)]
    assert [bool(sample["acc"]) for sample in samples] == right
    assert result["results"]["numbers"]["acc,none"] == pytest.approx(sum(right) / 12)
    assert 0 < sum(right) < 12
    with pytest.raises(DataError, match=r"lm_eval knows no tasks letters: .* has numbers"):
        run_harness(model, tokenizer, ["letters"], settings)


@pytest.mark.slow
@needs_harness
def test_the_command_line_asks_tasks_of_the_harness(tmp_path, capsys):
    write_task(tmp_path, "numbers", questions())
    out = tmp_path / "out.json"
    main(["--model=tiny_llama", "--tasks=lm_eval:numbers", f"--harness_tasks={tmp_path}", f"--out={out}", "--limit=9"])
    metrics = json.loads(out.read_text())["results"]["lm_eval:numbers"]["metrics"]
    assert set(metrics) == {"acc", "acc_norm"}
    assert metrics["acc"]["n"] == 9
    assert 0 <= metrics["acc"]["value"] <= 1
    assert metrics["acc"]["stderr"] > 0
    assert f"{metrics['acc']['value']:.4f}" in capsys.readouterr().out


def test_results_of_the_harness_become_ours():
    values = {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1}
    values |= {"acc,none": 1, "acc_stderr,none": "N/A"}
    found = {"results": {"gsm8k": values}, "n-samples": {"gsm8k": {"original": 100, "effective": 20}}}
    metrics = as_results(found)["lm_eval:gsm8k"]["metrics"]
    assert metrics["exact_match (strict-match)"] == Estimate(0.25, 0.1, 20)
    assert set(metrics) == {"exact_match (strict-match)", "acc"}
    assert metrics["acc"].value == 1.0
    assert math.isnan(metrics["acc"].stderr)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    with pytest.raises(DataError, match=r"pip install 'lit-adapters\[eval\]'"):
        evaluate(model, tokenizer, "lm_eval:arc_easy")
