"""Tasks of lm-evaluation-harness: numbers of its own model class, and of plain code."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import lit_adapters as la
from language.evaluate.__main__ import main
from language.evaluate.harness import average, estimates, plan_harness
from language.evaluate.lm import SharedPromptLM
from language.evaluate.metrics import Estimate
from language.evaluate.run import evaluate
from language.evaluate.settings import EvalSettings
from language.models import create_model, create_tokenizer
from lit_adapters.errors import DataError


def documents() -> list[dict]:
    head = "The following are multiple choice questions (with answers) about numbers.\n\n"
    head += "What is 0?\nA. no\nB. yes\nAnswer: B\n\n"
    letters = [(f"{head}What is {i}?\nA. {i}\nB. {i + 1}\nAnswer:", [" A", " B"], i % 2) for i in range(6)]
    texts = [(f"Count to {i}:", [f" {i}", " some more", " é"], i % 3) for i in range(6)]
    return [{"prompt": prompt, "choices": choices, "answer": answer} for prompt, choices, answer in letters + texts]


def write_task(folder: Path, name: str = "numbers", **settings) -> None:
    """A task file of the harness, by default of multiple choice; its data are a local file."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents()), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
    }
    if not settings:
        settings = {"doc_to_choice": "{{choices}}", "metrics": {"acc": "mean", "acc_norm": "mean"}}
    metrics = settings.pop("metrics")
    task["metric_list"] = [{"metric": m, "aggregation": a, "higher_is_better": True} for m, a in metrics.items()]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings), encoding="utf-8")


def adapted():
    torch.manual_seed(1)
    model = create_model("tiny_llama")
    la.attach(model, [la.LoRAN(rank=2), la.NoRA(groups=4)])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train(), create_tokenizer("tiny_llama")


def test_gives_the_numbers_of_the_harness(tmp_path):
    """Choices, greedy answers and stretches of one long text, against the harness's own model class."""
    model, tokenizer = adapted()
    write_task(tmp_path)
    last = {"doc_to_target": "{{prompt}}", "target_delimiter": " "}
    write_task(tmp_path, "last", output_type="loglikelihood", metrics={"acc": "mean"}, **last)
    write_task(
        tmp_path,
        "whole",
        output_type="loglikelihood_rolling",
        metrics={"word_perplexity": "weighted_perplexity"},
        **last,
    )
    names = ["numbers", "last", "whole"]
    model.eval()
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    ours = lm_eval.simple_evaluate(SharedPromptLM(model, tokenizer, 4), tasks=names, task_manager=manager)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=names,
        task_manager=manager,
    )

    def answers(result, name):
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        return [response for sample in samples for response in sample["filtered_resps"]]

    for name in ("numbers", "last"):
        pairs = zip(answers(ours, name), answers(theirs, name), strict=True)
        for (mine, mine_greedy), (other, other_greedy) in pairs:
            assert mine == pytest.approx(other, abs=1e-3)
            assert mine_greedy == other_greedy
    assert answers(ours, "whole") == pytest.approx(answers(theirs, "whole"), abs=1e-3)
    assert ours["results"]["numbers"]["acc,none"] == theirs["results"]["numbers"]["acc,none"]
    assert 0 < ours["results"]["numbers"]["acc,none"] < 1
    settings = EvalSettings(harness_tasks=str(tmp_path), batch_size=4)
    model.train()
    result = evaluate(model, tokenizer, "lm_eval:numbers", settings=settings)["results"]["lm_eval:numbers"]
    assert all(module.training for module in model.modules())
    assert result["metrics"]["acc"].value == ours["results"]["numbers"]["acc,none"]
    with pytest.raises(DataError, match=r"lm_eval knows no tasks letters: .* has last, numbers"):
        plan_harness(["lm_eval:letters"], model, tokenizer, settings)


def test_tasks_of_the_harness_say_what_was_truncated(tmp_path):
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    write_task(tmp_path)
    settings = EvalSettings(harness_tasks=str(tmp_path), max_length=32, limit=8)
    result = evaluate(model, tokenizer, "lm_eval:numbers", settings=settings)["results"]["lm_eval:numbers"]
    assert result["truncated"] == 6  # those with an example
    assert result["metrics"]["acc"].n == 8


def test_tasks_of_the_harness_are_loaded_before_anything_is_asked(tmp_path):
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    write_task(tmp_path)
    (tmp_path / "numbers.jsonl").unlink()
    with pytest.raises(DataError, match=r"lm_eval cannot load numbers: FileNotFoundError"):
        plan_harness(["lm_eval:numbers"], model, tokenizer, EvalSettings(harness_tasks=str(tmp_path)))


def test_reads_each_prompt_once():
    """Tokens read: each prompt, and of each choice all but its last token."""
    model, tokenizer = create_model("tiny_llama").eval(), create_tokenizer("tiny_llama")
    lm = SharedPromptLM(model, tokenizer)
    prompt, choices = list(range(5, 45)), [[7], [8, 9, 10]]
    lm._loglikelihood_tokens([(("p", "c"), prompt, c) for c in choices])  # measures the model, once
    read = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    lm._loglikelihood_tokens([(("p", "c"), prompt, c) for c in choices])
    assert read == [(1, 40), (1, 2)]


def test_a_choice_without_tokens():
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    with pytest.raises(DataError, match=r"choice '' after prompt \.\.\.'Q:' has no tokens; give it a text"):
        SharedPromptLM(model, tokenizer)._loglikelihood_tokens([(("Q:", ""), [5, 6], [])])


def test_the_command_line_asks_tasks_of_the_harness(tmp_path, capsys):
    write_task(tmp_path)
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
    values |= {"acc,none": 1, "acc_stderr,none": "N/A", "sample_len": 20}
    metrics = estimates(values)
    assert metrics["exact_match (strict-match)"] == Estimate(0.25, 0.1, 20)
    assert set(metrics) == {"exact_match (strict-match)", "acc"}
    assert metrics["acc"].value == 1.0
    assert math.isnan(metrics["acc"].stderr)


def test_averages():
    parts = [Estimate(0.2, 0.03, 10), Estimate(0.4, 0.04, 30)]
    assert average(parts) == Estimate(pytest.approx(0.3), pytest.approx(0.025), 40)
    assert average(parts, by_size=True).value == pytest.approx(0.35)
    assert math.isnan(average([*parts, Estimate(0.4, math.nan, 1)], by_size=True).stderr)


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for module in ("harness", "lm"):
        monkeypatch.delitem(sys.modules, f"language.evaluate.{module}")
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    with pytest.raises(DataError, match=r"perplexity need pip install 'lit-adapters\[eval\]'"):
        evaluate(model, tokenizer, "lm_eval:arc_easy")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Say 1", "output": "1"}) + "\n")
    result = evaluate(model, tokenizer, "perplexity", settings=EvalSettings(perplexity=str(path)))
    assert result["results"]["perplexity"]["metrics"]["loss"].n > 0
