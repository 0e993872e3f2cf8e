"""Readers: the prompts word for word, choices, subsets, averages, and errors with file and line."""

from __future__ import annotations

import json

import pytest

from language.evaluate.mmlu import CATEGORIES, read_mmlu
from language.evaluate.questions import COMMONSENSE, read_classification, read_commonsense, read_summaries
from language.evaluate.settings import EvalSettings
from language.models import create_tokenizer
from lit_adapters.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return create_tokenizer("tiny_llama")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mmlu_row(subject, number, answer, **more):
    choices = [f"{number}{letter}" for letter in "wxyz"]
    return {"subject": subject, "question": f"What is {number}? ", "choices": choices, "answer": answer} | more


@pytest.fixture
def mmlu(tmp_path):
    counts = {"astronomy": 8, "anatomy": 4, "world_religions": 4, "sociology": 4}
    write(tmp_path / "dev.jsonl", [mmlu_row(s, i, i % 4) for s in counts for i in range(5)])
    write(tmp_path / "test.jsonl", [mmlu_row(s, 10 + i, i % 4) for s, n in counts.items() for i in range(n)])
    return tmp_path


def test_mmlu_prompt(mmlu, tokenizer):
    questions = read_mmlu(mmlu, tokenizer, EvalSettings(shots=2))
    assert len(questions) == 20
    question = questions[-3]
    assert question.prompt.text == (
        "The following are multiple choice questions (with answers) about sociology.\n\n"
        "What is 0?\nA. 0w\nB. 0x\nC. 0y\nD. 0z\nAnswer: A\n\n"
        "What is 1?\nA. 1w\nB. 1x\nC. 1y\nD. 1z\nAnswer: B\n\n"
        "What is 11?\nA. 11w\nB. 11x\nC. 11y\nD. 11z\nAnswer:"
    )
    assert question.choices == (" A", " B", " C", " D")
    assert (question.right, question.group, question.category) == (1, "sociology", "Social Sciences")
    assert "about world religions." in read_mmlu(mmlu, tokenizer, EvalSettings(shots=0))[-5].prompt.text


def test_mmlu_categories(mmlu, tokenizer):
    expected = {"astronomy": "STEM", "anatomy": "Other", "world_religions": "Humanities"}
    questions = read_mmlu(mmlu, tokenizer)
    assert {q.group: q.category for q in questions} == expected | {"sociology": "Social Sciences"}
    # The row's own field comes first, in any spelling.
    write(mmlu / "test.jsonl", [mmlu_row("made_up", 1, 0, category="social sciences")])
    assert read_mmlu(mmlu, tokenizer, EvalSettings(shots=0))[0].category == "Social Sciences"
    write(mmlu / "test.jsonl", [mmlu_row("made_up", 1, 0)])
    with pytest.raises(DataError, match=r"test\.jsonl line 1: category None of subject 'made_up'"):
        read_mmlu(mmlu, tokenizer, EvalSettings(shots=0))


def test_mmlu_table_has_57_subjects():
    from language.evaluate import mmlu

    assert len(mmlu._CATEGORY) == 57
    assert {name: len(subjects.split()) for name, subjects in mmlu._SUBJECTS.items()} == dict(
        zip(CATEGORIES, (18, 13, 12, 14), strict=True)
    )


def test_mmlu_subsets(mmlu, tokenizer):
    def chosen(n, seed=0):
        return {(q.group, q.prompt.text) for q in read_mmlu(mmlu, tokenizer, EvalSettings(per_subject=n, seed=seed))}

    assert len(chosen(3)) == 12
    assert chosen(2) < chosen(3) == chosen(3)
    assert chosen(3, seed=1) != chosen(3)
    assert len(chosen(6)) == 6 + 4 + 4 + 4
    with pytest.raises(DataError, match="per_subject=0 must be at least 1"):
        chosen(0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mmlu_row("anatomy", 1, 4), "answer 4 must be 0 to 3"),
        (mmlu_row("anatomy", 1, "B"), "field 'answer' must be of type int, got 'B'"),
        (mmlu_row("anatomy", 1, 0, choices=["a", "b"]), "choices must be 4 texts"),
        (mmlu_row("anatomy", 1, 0, question=None), "field 'question' must be of type str"),
        (mmlu_row("anatomy ", 1, 0), "subject 'anatomy ' is empty or has white space around it"),
        (mmlu_row("", 1, 0), "subject '' is empty"),
    ],
)
def test_mmlu_errors(mmlu, tokenizer, row, message):
    write(mmlu / "test.jsonl", [mmlu_row("anatomy", 0, 0), row])
    with pytest.raises(DataError, match=rf"test\.jsonl line 2: {message}"):
        read_mmlu(mmlu, tokenizer)


def test_mmlu_subjects_have_one_category(mmlu, tokenizer):
    write(mmlu / "test.jsonl", [mmlu_row("made_up", i, 0, category=c) for i, c in enumerate(("STEM", "Other"))])
    with pytest.raises(DataError, match="questions of subject 'made_up' name two categories"):
        read_mmlu(mmlu, tokenizer, EvalSettings(shots=0))


def test_mmlu_needs_enough_examples(mmlu, tokenizer):
    with pytest.raises(DataError, match="has 5 dev questions of 'astronomy', not the 6 of shots=6"):
        read_mmlu(mmlu, tokenizer, EvalSettings(shots=6))


INSTRUCTION = "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"


def commonsense_row(answer="answer3", end="Answer format: answer1/answer2/answer3"):
    return {
        "instruction": INSTRUCTION + end,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def test_commonsense(tmp_path, tokenizer):
    write(tmp_path / "openbookqa.test.jsonl", [commonsense_row(), commonsense_row("answer1")])
    question, other = read_commonsense(tmp_path, "openbookqa", tokenizer)
    assert question.prompt.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{INSTRUCTION}Answer format: answer1/answer2/answer3\n\n### Response:\n"
        "the correct answer is"
    )
    assert question.choices == (" answer1", " answer2", " answer3")
    assert (question.right, other.right) == (2, 0)
    assert len(COMMONSENSE) == 8
    chat = read_commonsense(tmp_path, "openbookqa", tokenizer, EvalSettings(chat=True, limit=1))
    assert len(chat) == 1
    assert chat[0].prompt.text.endswith("answer3</s>\n<s>assistant\nthe correct answer is")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (commonsense_row("answer4"), "answer 'answer4' is not one of answer1, answer2, answer3"),
        (commonsense_row(end=""), "the instruction must end in 'Answer format"),
        (commonsense_row() | {"output": 3}, "field 'output' must be text"),
    ],
)
def test_commonsense_errors(tmp_path, tokenizer, row, message):
    write(tmp_path / "piqa.test.jsonl", [commonsense_row(), row])
    with pytest.raises(DataError, match=rf"piqa\.test\.jsonl line 2: {message}"):
        read_commonsense(tmp_path, "piqa", tokenizer)


def test_commonsense_files(tmp_path, tokenizer):
    with pytest.raises(DataError, match="'squad' is unknown: use boolq"):
        read_commonsense(tmp_path, "squad", tokenizer)
    with pytest.raises(DataError, match=r"boolq\.test\.jsonl does not exist"):
        read_commonsense(tmp_path, "boolq", tokenizer)
    (tmp_path / "boolq.test.jsonl").write_text('{"instruction": ')
    with pytest.raises(DataError, match=r"boolq\.test\.jsonl line 1: not valid JSON"):
        read_commonsense(tmp_path, "boolq", tokenizer)


def test_classification(tmp_path, tokenizer):
    rows = [{"text": f"text {i}", "label": i % 3, "label_name": ("sci", "rec", "alt")[i % 3]} for i in range(9)]
    path = write(tmp_path / "groups" / "test.jsonl", rows)
    questions = read_classification(path.parent, tokenizer)
    assert questions[3].prompt.text == "text 3\n\nLabel:\n"
    assert questions[3].choices == ("alt", "rec", "sci")
    assert [q.right for q in questions[:3]] == [2, 1, 0]
    few = read_classification(path, tokenizer, EvalSettings(limit=1))
    assert len(few) == 1
    assert few[0].choices == ("alt", "rec", "sci")
    write(path, [{"text": "a", "label": 1}, {"text": "b", "label": 1}])
    with pytest.raises(DataError, match="single class, '1'"):
        read_classification(path, tokenizer)


def test_summaries(tmp_path, tokenizer, caplog):
    rows = [{"dialogue": "A: hi\r\nB: ho", "summary": "They greet."}, {"dialogue": "", "summary": "Nothing."}]
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        (question,) = read_summaries(write(tmp_path / "test.jsonl", rows), tokenizer)
    assert "Data: 1 empty rows of" in caplog.text
    assert (question.answer, question.choices) == ("They greet.", ())
    assert question.prompt.text == "Summarize this dialogue.\n\nA: hi\nB: ho\n\nSummary:\n"
