"""Evaluation files as questions: common-sense reasoning, classification and summarisation, in the training's prompts.

`language.data.sources` reads the rows and `language.data.templates` writes them, so that a model is asked in the words
that it was tuned with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info

from language.data.formats import FormatName, Record, parse
from language.data.rows import Row, clean, names_of, shown
from language.data.sources import read_rows
from language.data.splits import subset
from language.data.templates import Renderer
from language.evaluate.prompts import Prompt
from language.evaluate.settings import DEFAULTS, EvalSettings
from lit_adapters.errors import DataError

# The eight tasks of LLM-Adapters (arXiv 2304.01933).
COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
LEAD_IN = "the correct answer is"

_OPTIONS = re.compile(r"Answer format:\s*(\S+)\s*$")
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt with its right answer.

    Attributes:
        prompt: What the model reads.
        answer: The right one of the choices, or a text that a good answer resembles.
        choices: Continuations of the prompt; none if a text is to be written.
        group: Subject or task.
        category: Of the subject.
    """

    prompt: Prompt
    answer: str
    choices: tuple[str, ...] = ()
    group: str = ""
    category: str = ""

    @property
    def right(self) -> int:
        """Index of the right choice."""
        return self.choices.index(self.answer)


def make_renderer(
    tokenizer: Any, name: FormatName, settings: EvalSettings, meaning: Mapping[str, Any] | None = None
) -> Renderer:
    """Prompts of a format, plain or in a chat template, with the templates of the training if there are.

    Args:
        tokenizer: The model's own.
        name: The format.
        settings: `chat` counts.
        meaning: What the model was trained with, see `language.data.InstructionDataModule.meaning`.

    Raises:
        DataError: A chat template is needed and missing.
    """
    meaning = meaning or {}
    template = meaning.get("prompt_template") if meaning.get("format") == name else None
    folded, chat_template = meaning.get("system_in_user", False), meaning.get("chat_template")
    return Renderer(tokenizer, tokenizer.eos_token or "", name, template, bool(settings.chat), chat_template, folded)


def read_commonsense(
    root: str | Path,
    name: str,
    tokenizer: Any,
    settings: EvalSettings = DEFAULTS,
    meaning: Mapping[str, Any] | None = None,
) -> list[Question]:
    """Questions of one of the eight tasks, from `root/NAME.test.jsonl` with instruction, output and answer.

    The prompt is the instruction in the Alpaca template, and the beginning of the answer, "the correct answer is";
    the choices are those that the instruction names in its "Answer format: a/b".

    Args:
        root: Folder of the files.
        name: One of `COMMONSENSE`.
        tokenizer: The model's own.
        settings: `limit`, `seed` and `chat` count.
        meaning: What the model was trained with: its templates are used.

    Raises:
        DataError: The task is unknown, or a row is bad (file and line).
    """
    if name not in COMMONSENSE:
        raise DataError(f"common-sense task {name!r} is unknown: use {', '.join(COMMONSENSE)}")
    renderer = make_renderer(tokenizer, "alpaca", settings, meaning)
    rows = read_rows(str(Path(root) / f"{name}.test.jsonl"), "test")
    questions = []
    for row in subset(rows, settings.limit, "questions", name, settings.seed):
        (record,), _ = parse([row], "alpaca")
        found = _OPTIONS.search(record.fields["instruction"])
        if not found:
            raise DataError(f"{row.origin}: the instruction must end in 'Answer format: a/b/...'; correct the row")
        options, answer = found[1].split("/"), field_of(row, "answer", str)
        if answer not in options:
            raise DataError(f"{row.origin}: answer {answer!r} is not one of {', '.join(options)}; correct the row")
        prompt = Prompt(renderer.example(record).stretches, LEAD_IN, renderer.chat)
        questions.append(Question(prompt, f" {answer}", tuple(f" {option}" for option in options), name))
    return questions


def read_classification(
    path: str | Path,
    tokenizer: Any,
    settings: EvalSettings = DEFAULTS,
    meaning: Mapping[str, Any] | None = None,
) -> list[Question]:
    """Texts with their class; the choices are the names of all classes in the file, with the end of an answer.

    Args:
        path: A file, or a folder with a test file; rows have `text` and `label_name`, or `label`.
        tokenizer: The model's own.
        settings: `limit`, `seed` and `chat` count.
        meaning: What the model was trained with: its templates and classes are used.

    Raises:
        DataError: A row is bad (file and line), or there is a single class.
    """
    rows = read_rows(str(path), "test")
    records, _ = parse(rows, "classification", {"label": "label_name"} if "label_name" in rows[0].values else None)
    labels = sorted({record.answer for record in records})
    trained = meaning.get("classes") if meaning and meaning.get("format") == "classification" else None
    if trained:
        if unknown := [record for record in records if record.answer not in trained]:
            raise DataError(
                f"{unknown[0].origin}: class {unknown[0].answer!r} is none of those that the model was trained with: "
                f"{', '.join(trained[:20])}"
            )
        labels = list(trained)
    if len(labels) < 2:
        raise DataError(f"{path} has a single class, {labels[0]!r}: nothing to choose from")
    renderer = make_renderer(tokenizer, "classification", settings, meaning)
    # A class ends as in training: without its end, one that begins another would always be the likelier of the two.
    end_token = (meaning or {}).get("end_token")
    end_id = tokenizer.eos_token_id if end_token is None else tokenizer.convert_tokens_to_ids(end_token)
    ending = renderer.ending(records[0])

    def question(record: Record) -> Question:
        prompt = Prompt(renderer.example(record).stretches, "", renderer.chat, ending, end_id)
        return Question(prompt, record.answer, tuple(labels))

    return [question(r) for r in subset(records, settings.limit, "questions", "classification", settings.seed)]


def read_summaries(
    path: str | Path,
    tokenizer: Any,
    settings: EvalSettings = DEFAULTS,
    meaning: Mapping[str, Any] | None = None,
) -> list[Question]:
    """Dialogues with their summaries. Empty rows are dropped, and counted in one line.

    Args:
        path: A file, or a folder with a test file; rows have `dialogue` and `summary`.
        tokenizer: The model's own.
        settings: `limit`, `seed` and `chat` count.
        meaning: What the model was trained with: its templates are used.

    Raises:
        DataError: A row is bad (file and line).
    """
    records, dropped = parse(read_rows(str(path), "test"), "summarisation", drop_empty=True)
    if dropped:
        rank_zero_info(f"Data: {dropped} empty rows of {path} dropped.")
    renderer = make_renderer(tokenizer, "summarisation", settings, meaning)
    examples = [
        renderer.example(record)
        for record in subset(records, settings.limit, "questions", "summarisation", settings.seed)
    ]
    return [Question(Prompt(e.stretches, chat=renderer.chat), e.response) for e in examples]


def field_of(row: Row, name: str, kind: type[T]) -> T:
    """A field of the row, checked to be there and of its kind.

    Raises:
        DataError: The field is missing or of another type; the message names file, line and field.
    """
    value = row.values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(
            f"{row.origin}: field {name!r} must be of type {kind.__name__}, got {shown(value)} "
            f"(the row has {names_of(row.values)}); correct the row"
        )
    if isinstance(value, str):
        clean(value, f"{row.origin}: field {name!r}")
    return value
