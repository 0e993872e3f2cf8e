"""Choice accuracy while training, against the likelihood of each whole row, and where it is logged."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lit_adapters as la
from language.evaluate.likelihood import likeliest, score_tokens
from language.evaluate.prompts import PromptEncoder
from language.evaluate.run import evaluate
from language.evaluate.settings import EvalSettings
from language.evaluate.validation import ChoiceValidation, choice_questions
from language.loss import token_losses
from lit_adapters.files.meaning import set_meaning
from tests.language.tiny import batch, built, data, moved, trainer, tuner

COLOURS = {"red": "cherry", "redder": "a ripe tomato", "green": "grass", "blue": "sky"}
ROWS = [{"text": f"{thing} number {i}", "label": label} for i in range(6) for label, thing in COLOURS.items()]


@pytest.fixture
def colours(write):
    def make(**changes):
        settings = {"path": write(ROWS), "format": "classification", "prompt_template": "{text} is"}
        return data(**settings | {"val_path": write(ROWS[:9], "val.jsonl")} | changes)

    return make


ANOTHER_END = """{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '#end\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


@pytest.mark.parametrize("settings", [{}, {"use_chat_template": True}, {"chat_template": ANOTHER_END}])
def test_rows_are_asked_in_the_tokens_of_training(colours, settings):
    """The score of the right class, with the end of its answer, is minus the loss of the row."""
    given = colours(**settings, **({"use_chat_template": True} if "chat_template" in settings else {}))
    given.setup("fit")
    module = moved(built()).eval()
    questions, answers = choice_questions(given, "val")
    assert [given.classes[a] for a in answers] == [row["label"] for row in ROWS[:9]]
    scores = score_tokens(module.model, questions)
    with torch.no_grad():
        for scored, answer, row in zip(scores, answers, given.val_dataloader().dataset, strict=True):
            ((ids, labels),) = row
            losses, _ = token_losses(module.model, {"input_ids": ids[None], "labels": labels[None]})
            assert scored[answer].log_likelihood == pytest.approx(-losses.sum().item(), abs=1e-4)


def test_long_texts_lose_their_beginning(colours):
    whole, _ = choice_questions(colours(max_answer_length=10), "val")
    given = colours(max_length=20, max_answer_length=8)
    short, answers = choice_questions(given, "val")
    given.setup("fit")
    for full, cut, answer, row in zip(whole, short, answers, given.val_dataloader().dataset, strict=True):
        assert len(cut.context) == 12 < len(full.context)
        assert full.context[-12:] == cut.context
        assert row[0][0].tolist() == cut.context + cut.continuations[answer]


def test_a_class_that_is_the_beginning_of_another_can_lose(colours):
    """Without the end token log p(red) >= log p(redder) whatever the model."""
    given = colours()
    given.setup("fit")
    questions, _ = choice_questions(given, "val")
    short, long = (questions[0].continuations[given.classes.index(name)] for name in ("red", "redder"))
    assert long[: len(short) - 1] == short[:-1]
    assert short[-1] == long[-1] == given.encoder.end_id


@pytest.mark.slow
def test_training_raises_the_accuracy_and_logs_it(tmp_path, colours):
    module, given = tuner(adapters=None, train=".*"), colours(max_length=64)
    choices = ChoiceValidation()
    keep = ModelCheckpoint(tmp_path, filename="best", monitor="val/classification_accuracy", mode="max")
    run = trainer(tmp_path, callbacks=[choices, keep], max_epochs=20)
    before = trainer(tmp_path, callbacks=[choices]).validate(module, datamodule=given, verbose=False)[0]
    run.fit(module, datamodule=given)
    after = run.callback_metrics["val/classification_accuracy"].item()
    assert before["val/classification_accuracy"] < after
    assert after > 0.7
    assert keep.best_model_score.item() >= after
    questions, answers = choice_questions(given, "val")
    scores = score_tokens(module.model, questions)
    assert after == pytest.approx(
        sum(likeliest(row) == a for row, a in zip(scores, answers, strict=True)) / len(answers)
    )
    assert module.training


class Items(Callback):
    """What `test_step` returns and callbacks before this one add."""

    def __init__(self):
        self.values = []

    def on_test_batch_end(self, trainer, pl_module, outputs, *rest):
        self.values += outputs["classification_accuracy"].tolist()


def test_a_test_asks_every_row(tmp_path, colours, write):
    """In the order of the test split, and as `choice_questions` asks, whatever the batches are."""
    given = colours(test_path=write(ROWS, "test.jsonl"), max_length=20, max_answer_length=8, batch_size=7)
    module, items = moved(built()), Items()
    run = trainer(tmp_path, callbacks=[ChoiceValidation(limit=2), items])
    measured = run.test(module, datamodule=given, verbose=False)[0]
    questions, answers = choice_questions(given, "test")
    scores = score_tokens(module.model, questions)
    right = [likeliest(row) == answer for row, answer in zip(scores, answers, strict=True)]
    assert items.values == right
    assert 0 < sum(right) < len(right) == 24
    assert measured["test/classification_accuracy"] == pytest.approx(sum(right) / 24)


def test_a_test_of_answers_with_another_end(tmp_path, colours, write):
    given = colours(test_path=write(ROWS, "test.jsonl"), use_chat_template=True, chat_template=ANOTHER_END)
    items = Items()
    trainer(tmp_path, callbacks=[ChoiceValidation(), items]).test(moved(built()), datamodule=given, verbose=False)
    assert len(items.values) == 24


@pytest.mark.parametrize("changes", [{"packing": "packed"}, {"mask_prompt": False}])
def test_rows_whose_class_cannot_be_told_apart_are_not_tested(tmp_path, colours, write, changes):
    given = colours(test_path=write(ROWS, "test.jsonl"), max_length=64, **changes)
    with pytest.raises(la.DataError, match="ChoiceValidation asks for the class of each test row"):
        trainer(tmp_path, callbacks=[ChoiceValidation()]).test(tuner(), datamodule=given, verbose=False)


def test_questions_of_a_benchmark(tmp_path, write):
    rows = [
        {
            "subject": "virology",
            "question": f"Which is {i}?",
            "choices": ["one", "two", "three", "four"],
            "answer": i % 4,
        }
        for i in range(8)
    ]
    root = write(rows, "mmlu/test.jsonl").removesuffix("mmlu/test.jsonl")
    module = moved(built())
    run = trainer(tmp_path, callbacks=[ChoiceValidation("mmlu", root=root, limit=5)])
    measured = run.validate(module, datamodule=data(), verbose=False)[0]
    expected = evaluate(module.model, module.tokenizer, "mmlu", root, EvalSettings(shots=0, per_subject=5))
    assert measured["val/mmlu_accuracy"] == pytest.approx(expected["results"]["mmlu"]["metrics"]["micro"].value)


def test_questions_are_asked_as_in_training(tmp_path, write):
    """In the prompt template of the data, as an evaluation of the trained model asks them."""
    rows = [
        {"instruction": f"Is it {i}? Answer format: yes/no/perhaps", "output": "x", "answer": ("yes", "no")[i % 2]}
        for i in range(9)
    ]
    root = write(rows, "commonsense/boolq.test.jsonl").removesuffix("commonsense/boolq.test.jsonl")
    module, given = moved(built()), data(prompt_template="{instruction} {input} =")
    callback = ChoiceValidation("boolq", root=root, limit=None)
    measured = trainer(tmp_path, callbacks=[callback]).validate(module, datamodule=given, verbose=False)[0]
    encoder = PromptEncoder(module.tokenizer, None)
    text = "Is it 0? Answer format: yes/no/perhaps  =the correct answer is"
    assert encoder.tokenizer.decode(callback.questions[0].context).endswith(text)
    module.model.eval()
    set_meaning(module.model, given.meaning())
    expected = evaluate(module.model, module.tokenizer, "boolq", root)["results"]["boolq"]["metrics"]["acc"]
    assert measured["val/boolq_accuracy"] == pytest.approx(expected.value)


def test_what_cannot_be_asked(tmp_path, colours, write):
    with pytest.raises(la.DataError, match="task 'summarisation' has no choices to validate: use one of classif"):
        ChoiceValidation("summarisation", root=".")
    with pytest.raises(la.DataError, match="task 'mmlu' needs root"):
        ChoiceValidation("mmlu")
    with pytest.raises(la.DataError, match="format=alpaca has no classes"):
        trainer(tmp_path, callbacks=[ChoiceValidation()]).validate(tuner(), datamodule=data(), verbose=False)
    strange = colours(val_path=write([{"text": "coal", "label": "black"}], "black.jsonl"))
    with pytest.raises(la.DataError, match=r"black.jsonl line 1: class 'black' occurs in no training row"):
        choice_questions(strange, "val")
    with pytest.raises(la.DataError, match=r"a class has 7 tokens, more than the 5 kept .* set max_answer_length to 7"):
        choice_questions(colours(max_length=20), "val")
    rows = DataLoader([batch(5, 4)], batch_size=None)
    with pytest.raises(la.DataError, match="asks the rows of an InstructionDataModule"):
        trainer(tmp_path, callbacks=[ChoiceValidation()]).validate(tuner(), rows, verbose=False)
