"""lm-evaluation-harness and our scorer agree, question by question."""

import importlib.util
import sys

import pytest
import torch

import lit_adapters as la
from language.evaluate.harness import run_harness, write_task
from language.evaluate.likelihood import score_choices
from language.evaluate.questions import Question
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
    result = run_harness(model, tokenizer, ["numbers"], tmp_path, batch_size=4)
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
        run_harness(model, tokenizer, ["letters"], tmp_path)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    with pytest.raises(DataError, match=r"pip install 'lit-adapters\[eval\]'"):
        run_harness(model, tokenizer, ["mmlu"])
