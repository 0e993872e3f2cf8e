"""Evaluation asks in the tokens of training, for tokenizers of every kind."""

from __future__ import annotations

import json

import pytest

from language.data.module import InstructionDataModule
from language.evaluate.prompts import PromptEncoder
from language.evaluate.questions import read_classification, read_commonsense, read_summaries
from language.evaluate.settings import EvalSettings
from language.evaluate.tasks import read_questions
from language.evaluate.validation import choice_questions
from lit_adapters.errors import DataError
from tests.language.data.test_tokenizers import KINDS, made

TRUE = "the correct answer is true"


@pytest.fixture
def write(tmp_path):
    def jsonl(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return jsonl


def trained(path, tokenizer, name, chat):
    """The tokens of each training row."""
    data = InstructionDataModule(path, tokenizer, name, val_fraction=0, use_chat_template=chat, max_length=999)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    return data, [ids.tolist() for ((ids, _),) in (dataset[i] for i in range(len(dataset)))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_questions_have_the_tokens_of_training(write, tmp_path, kind, chat):
    tokenizer = made(kind)
    path = write("c.jsonl", [{"text": "the </s> fox", "label": "what"}, {"text": "dog", "label": "jumps over"}])
    data, rows = trained(path, tokenizer, "classification", chat)
    encoder = PromptEncoder(tokenizer, None)
    for question, row in zip(read_classification(path, tokenizer, EvalSettings(chat=chat)), rows, strict=True):
        asked = encoder.question(question.prompt, question.choices)
        assert asked.context + asked.continuations[question.right] == row
        assert row[: len(encoder.prompt(question.prompt))] == encoder.prompt(question.prompt)
    data.paths["val"] = path
    for question, answer, row in zip(*choice_questions(data, "val"), rows, strict=True):
        assert [*question.context, *question.continuations[answer]] == row

    row = {"instruction": "Is it? Answer format: true/false", "input": "", "output": TRUE, "answer": "true"}
    _, (row_ids,) = trained(write("boolq.test.jsonl", [row]), tokenizer, "alpaca", chat)
    (question,) = read_commonsense(tmp_path, "boolq", tokenizer, EvalSettings(chat=chat))
    asked = encoder.question(question.prompt, question.choices)
    assert asked.context + asked.continuations[0] == row_ids[:-1]

    path = write("s.jsonl", [{"dialogue": "what is it", "summary": "a fox"}])
    _, (row_ids,) = trained(path, tokenizer, "summarisation", chat)
    (question,) = read_summaries(path, tokenizer, EvalSettings(chat=chat))
    prompt = encoder.prompt(question.prompt)
    assert row_ids[: len(prompt)] == prompt


def test_questions_of_mmlu_that_spell_a_control_token(tmp_path, write):
    row = {"subject": "anatomy", "question": "What is </s>?", "choices": ["<s>", "b", "c", "d"], "answer": 0}
    write("test.jsonl", [row, row | {"question": "What?", "choices": ["a", "b", "c", "d"]}])
    tokenizer = made("bytes")
    spelled, plain = read_questions("mmlu", tokenizer, tmp_path, EvalSettings(mmlu=".", shots=0))
    for question in (spelled, plain):
        asked = PromptEncoder(tokenizer, None).question(question.prompt, question.choices)
        assert not {0, 1} & set(asked.context)
        assert tokenizer.decode(asked.context) == question.prompt.text
    assert "</s>" in spelled.prompt.text


@pytest.mark.parametrize(
    "setting",
    [{"shots": -1}, {"limit": 0}, {"per_subject": 0}, {"max_new_tokens": -5}, {"batch_size": 0}, {"max_length": 0}],
)
def test_numbers_that_no_one_can_mean(setting):
    with pytest.raises(DataError, match=next(iter(setting))):
        EvalSettings(**setting)
