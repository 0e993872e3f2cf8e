"""Evaluation from files to JSON: every task on a tiny model, the command line, and its errors."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from lightning.pytorch import Trainer

import lit_adapters as la
from language.evaluate.__main__ import main
from language.evaluate.likelihood import likeliest, score_tokens
from language.evaluate.metrics import Estimate
from language.evaluate.mmlu import CATEGORIES, read_mmlu
from language.evaluate.prompts import PromptEncoder
from language.evaluate.questions import COMMONSENSE
from language.evaluate.results import as_plain, table, write_json
from language.evaluate.run import evaluate, load, task_names
from language.evaluate.settings import EvalSettings
from language.models import create_model, create_tokenizer
from language.module import CausalLMTuner
from lit_adapters.errors import AdapterError, DataError

SUBJECTS = ("astronomy", "anatomy", "sociology")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path):
    def mmlu(n):
        return [
            {"subject": s, "question": f"{s} {i}?", "choices": ["a", "b", "c", f"{i}"], "answer": i % 4}
            for s in SUBJECTS
            for i in range(n)
        ]

    write(tmp_path / "mmlu" / "dev.jsonl", mmlu(2))
    write(tmp_path / "mmlu" / "test.jsonl", mmlu(4))

    def yes_no(i):
        answer = ("true", "false")[i % 2]
        instruction = f"Is it {i}?\n\nAnswer format: true/false"
        return {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}

    for name in COMMONSENSE:
        write(tmp_path / "commonsense" / f"{name}.test.jsonl", [yes_no(i) for i in range(3)])
    write(tmp_path / "newsgroups20" / "test.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(4)])
    write(tmp_path / "samsum" / "test.jsonl", [{"dialogue": f"A: {i}", "summary": f"say {i}"} for i in range(3)])
    write(
        tmp_path / "held_out" / "test.jsonl", [{"instruction": f"say {i}", "output": "x" * (i + 1)} for i in range(5)]
    )
    return tmp_path


@pytest.fixture
def model():
    return create_model("tiny_llama")


@pytest.fixture(scope="module")
def tokenizer():
    return create_tokenizer("tiny_llama")


def moved(model):
    """The model with weights that answer differently from question to question."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_mmlu(root, model, tokenizer):
    """Subjects of different sizes, whose rows alternate: each answer belongs to its question, micro counts each
    question once, macro each subject."""
    sizes = {"astronomy": 9, "anatomy": 5, "college_biology": 3}
    rows = [
        {"subject": s, "question": f"{s} {i}?", "choices": ["a", "b", "c", f"{i}"], "answer": (i + len(s)) % 4}
        for i in range(9)
        for s, n in sizes.items()
        if i < n
    ]
    write(root / "mmlu" / "test.jsonl", rows)
    moved(model)
    result = evaluate(model, tokenizer, "mmlu", root, EvalSettings(shots=0, batch_size=5))["results"]["mmlu"]
    questions = read_mmlu(root / "mmlu", tokenizer, EvalSettings(shots=0))
    encoder = PromptEncoder(tokenizer, None)
    scores = [score_tokens(model, [encoder.question(q.prompt, q.choices)])[0] for q in questions]
    answers = [q.choices[likeliest(row)] for q, row in zip(questions, scores, strict=True)]
    assert len(set(answers)) > 1
    assert result["answers"] == answers
    assert result["right"] == [q.answer for q in questions]

    right = {s: [a == q.answer for a, q in zip(answers, questions, strict=True) if q.group == s] for s in sizes}
    means = {s: sum(values) / len(values) for s, values in right.items()}
    assert len(set(means.values())) > 1
    assert {s: e.value for s, e in result["subjects"].items()} == pytest.approx(means)
    assert result["metrics"]["micro"].value == pytest.approx(sum(map(sum, right.values())) / 17)
    assert result["metrics"]["macro"].value == pytest.approx(sum(means.values()) / 3)
    assert result["metrics"]["micro"].n == 17
    assert set(result["categories"]) == {"STEM", "Other"} < set(CATEGORIES)
    stem = result["categories"]["STEM"]
    assert stem["micro"].value == pytest.approx((9 * means["astronomy"] + 3 * means["college_biology"]) / 12)
    assert stem["macro"].value == pytest.approx((means["astronomy"] + means["college_biology"]) / 2)
    errors = [math.sqrt(means[s] * (1 - means[s]) / (n - 1)) for s, n in sizes.items()]
    assert [e.stderr for e in result["subjects"].values()] == pytest.approx(errors)
    assert result["metrics"]["macro"].stderr == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 3)


def test_mmlu_subsets(root, model, tokenizer):
    few = evaluate(model, tokenizer, "mmlu", root, EvalSettings(shots=1, per_subject=2))["results"]["mmlu"]
    assert few["metrics"]["micro"].n == 6
    one = evaluate(model, tokenizer, "mmlu", root, EvalSettings(shots=1, per_subject=1))["results"]["mmlu"]
    assert math.isnan(one["metrics"]["macro"].stderr)


def test_a_question_that_occurs_twice(root, model, tokenizer):
    """With another right answer the second time."""
    rows = [{"text": "same", "label": label} for label in ("a", "b")] + [{"text": "other", "label": "c"}]
    write(root / "newsgroups20" / "test.jsonl", rows)
    result = evaluate(moved(model), tokenizer, "classification", root)["results"]["classification"]
    assert result["right"] == ["a", "b", "c"]
    assert result["answers"][0] == result["answers"][1]
    right = sum(a == r for a, r in zip(result["answers"], result["right"], strict=True))
    assert result["metrics"]["acc"].value == pytest.approx(right / 3)


def test_truncated_prompts_are_counted(root, model, tokenizer):
    write(root / "newsgroups20" / "test.jsonl", [{"text": "x" * n, "label": n} for n in (3, 300, 301)])
    settings = EvalSettings(max_length=64)
    result = evaluate(model, tokenizer, "classification", root, settings)["results"]
    assert result["classification"]["truncated"] == 2
    assert "2 prompts were longer than the context" in table(result)
    with pytest.raises(DataError, match="max_new_tokens=64 leaves no room for a prompt in the 64 tokens"):
        evaluate(model, tokenizer, "summarisation", root, settings)


def test_the_model_and_its_tokenizer_stay_as_they_were(root, tokenizer):
    """Also a head that was untied by hand, which the harness would tie again."""
    model = create_model("tiny_llama").train()
    model.config.tie_word_embeddings = True
    model._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert not torch.equal(before["lm_head.weight"], before["model.embed_tokens.weight"])
    without = create_tokenizer("tiny_llama")
    without.pad_token = None
    evaluate(model, without, "classification", root)
    assert without.pad_token is None
    assert all(module.training for module in model.modules())
    assert "tie_weights" not in vars(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_commonsense(root, model, tokenizer):
    results = evaluate(model, tokenizer, ["commonsense"], root, EvalSettings(limit=2))["results"]
    assert list(results) == [*COMMONSENSE, "commonsense"]
    values = [results[name]["metrics"]["acc"].value for name in COMMONSENSE]
    assert results["commonsense"]["metrics"]["acc"].value == pytest.approx(sum(values) / 8)
    assert results["boolq"]["metrics"]["acc_bytes"].n == 2


def test_by_generation(root, model, tokenizer):
    """A model that has learned to answer "1" to everything."""
    train_to_say(model, tokenizer, "1")
    settings = EvalSettings(answers="generation", max_new_tokens=2)
    result = evaluate(model, tokenizer, "classification", root, settings)["results"]["classification"]
    assert result["answers"] == ["1", "1", "1", "1"]
    assert {name: e.value for name, e in result["metrics"].items()} == {
        "acc": 0.5,
        "exact_match": 0.5,
        "answered": 1.0,
    }
    by_choice = evaluate(model, tokenizer, "classification", root)["results"]["classification"]
    assert by_choice["answers"] == ["1", "1", "1", "1"]
    summaries = evaluate(model, tokenizer, "summarisation", root, settings)["results"]["summarisation"]
    assert summaries["answers"] == ["1", "1", "1"]
    # One of the two words of "say 1" was found, and none of the others.
    assert summaries["metrics"]["rouge1"].value == pytest.approx(2 / 3 / 3)


def train_to_say(model, tokenizer, text):
    """Set the weights by hand: after any token comes `text`, of one token, and after that the end."""
    (said,) = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[said] = torch.eye(32)[1]
        model.lm_head.weight[said, 0] = 9
        model.lm_head.weight[tokenizer.eos_token_id, 1] = 9


def test_perplexity(root, model, tokenizer):
    metrics = evaluate(model, tokenizer, "perplexity", root)["results"]["perplexity"]["metrics"]
    total, count = 0.0, 0
    for i in range(5):
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\nsay {i}\n\n### Response:\n"
        )
        context = tokenizer(prompt).input_ids
        answer = [*tokenizer("x" * (i + 1), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
        total -= sum(log_probabilities[len(context) - 1 + j, t].item() for j, t in enumerate(answer))
        count += len(answer)
    assert metrics["loss"].n == count
    assert metrics["loss"].value == pytest.approx(total / count, abs=1e-6)
    assert metrics["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-6)
    limited = evaluate(model, tokenizer, "perplexity", root, EvalSettings(limit=9))["results"]["perplexity"]["metrics"]
    assert limited["loss"] == metrics["loss"]


def test_command_line_with_adapters(root, tmp_path, capsys):
    torch.manual_seed(3)
    base = create_model("tiny_llama")
    base.save_pretrained(tmp_path / "base")
    create_tokenizer("tiny_llama").save_pretrained(tmp_path / "base")
    la.attach(base, la.LoRAN(rank=2))
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    la.save_adapters(base, tmp_path / "adapters")
    tokenizer = create_tokenizer("tiny_llama")
    out = tmp_path / "results" / "out.json"
    common = ["--model", str(tmp_path / "base"), "--root", str(root), "--out", str(out)]
    common += ["--tasks", "mmlu,perplexity", "--shots", "1", "--per_subject", "2", "--seed", "4"]
    main(common)
    plain = json.loads(out.read_text())
    main([*common, "--adapters", str(tmp_path / "adapters")])
    adapted = json.loads(out.read_text())
    assert [p.name for p in out.parent.iterdir()] == ["out.json"]
    assert adapted["adapters"] == str(tmp_path / "adapters")
    assert adapted["settings"]["seed"] == 4
    assert torch.__version__.startswith(adapted["versions"]["torch"])
    expected = evaluate(base.eval(), tokenizer, "perplexity", root)["results"]["perplexity"]["metrics"]["loss"]
    assert adapted["results"]["perplexity"]["metrics"]["loss"]["value"] == pytest.approx(expected.value, rel=1e-6)
    assert plain["results"]["perplexity"]["metrics"]["loss"]["value"] != pytest.approx(expected.value, rel=1e-3)
    assert adapted["results"]["mmlu"]["metrics"]["micro"]["n"] == 6
    shown = capsys.readouterr().out
    assert f"{expected.value:.4f}" in shown
    assert "Social Sciences (macro)" in shown


def test_any_file_by_itself(tmp_path, capsys, monkeypatch):
    """No root, and no file to write."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(4)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    before = sorted(tmp_path.iterdir())
    results = []
    for path in ("rows.csv", str(tmp_path / "rows.csv")):
        torch.manual_seed(0)  # the model is a random one
        results.append(main(["--model", "tiny_llama", "--tasks", "perplexity", "--perplexity", path])["results"])
    assert results[0] == results[1]
    assert "perplexity" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(DataError, match=r"task perplexity finds no data at held_out: give --perplexity a file"):
        main(["--model", "tiny_llama", "--tasks", "perplexity"])
    with pytest.raises(DataError, match=r"task boolq finds no data at \S+: give --commonsense a file"):
        main(["--model", "tiny_llama", "--tasks", "boolq", "--commonsense", "nowhere"])


def test_checkpoint(root, tmp_path):
    tuner = CausalLMTuner("tiny_llama", la.LoRA(rank=2), init_seed=5)
    trainer = Trainer(logger=False, barebones=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(tuner)
    tuner.configure_model()
    with torch.no_grad():
        for parameter in tuner.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    for other in ({"dtype": "float16"}, {"quantization": "nf4"}):
        with pytest.raises(DataError, match="beside a checkpoint, whose weights stay as they were trained"):
            load(None, ckpt=str(tmp_path / "tuned.ckpt"), **other)
    model, tokenizer = load(None, ckpt=str(tmp_path / "tuned.ckpt"))
    loaded = evaluate(model, tokenizer, "perplexity", root)["results"]["perplexity"]["metrics"]
    assert loaded == evaluate(tuner.model, tokenizer, "perplexity", root)["results"]["perplexity"]["metrics"]


def test_errors(root, model, tokenizer, tmp_path):
    assert task_names("mmlu, boolq,mmlu") == ["mmlu", "boolq"]
    for name in ("mmul", "lm_eval:"):
        with pytest.raises(DataError, match=f"task '{name}' is unknown: use mmlu"):
            task_names(name)
    with pytest.raises(DataError, match="give a model, perhaps with adapters, or a checkpoint"):
        load(None)
    with pytest.raises(AdapterError, match=r"none\.ckpt' does not exist"):
        load(None, ckpt=str(tmp_path / "none.ckpt"))
    with pytest.raises(DataError, match="root nowhere is not a folder: give the one with the data"):
        main(["--model", "tiny_llama", "--root", "nowhere", "--out", "o.json", "--tasks", "mmlu"])
    # Every file is read before the first question is asked.
    (root / "samsum" / "test.jsonl").unlink()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(DataError, match="samsum"):
        evaluate(model, tokenizer, "mmlu,summarisation", root, EvalSettings(shots=1))
    with pytest.raises(AdapterError, match="is not a number"):
        evaluate(model, tokenizer, "mmlu", root, EvalSettings(shots=1))


def test_written_results(tmp_path):
    result = {"a": Estimate(0.5, math.nan, 3), "b": [1, None, (2.0,)]}
    assert as_plain(result) == {"a": {"value": 0.5, "stderr": None, "n": 3}, "b": [1, None, [2.0]]}
    path = tmp_path / "out.json"
    write_json(path, result)
    assert json.loads(path.read_text()) == as_plain(result)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == as_plain(result)
    lines = table({"t": {"metrics": {"loss": Estimate(0.5, 0.01, 3000)}, "truncated": 2}}).split("\n")
    assert lines[1].split() == ["t", "loss", "0.5000", "0.0100", "3,000"]
    assert "2 prompts" in lines[2]
