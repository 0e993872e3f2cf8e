"""The tasks: each reads its questions first, and asks a model later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from transformers import PreTrainedModel

from language.data.control import ControlTokens
from language.data.formats import FormatName
from language.data.module import InstructionDataModule
from language.data.sources import is_address, read_rows
from language.evaluate.likelihood import score_choices
from language.evaluate.metrics import Estimate, exact_match, find_option, held_out_loss, proportion, rouge, row_losses
from language.evaluate.mmlu import read_mmlu, summarise_mmlu
from language.evaluate.prompts import FramedPrompt, PromptEncoder
from language.evaluate.questions import Question, WritingTask, read_classification, read_commonsense, read_summaries
from language.generate import generate
from language.models import context_length
from lit_adapters.errors import DataError
from lit_adapters.files.meaning import check_same, meaning_of

_DEFAULT_LENGTH = 2048  # tokens, for models that name no context


@dataclass(frozen=True)
class EvalSettings:
    """How the tasks are asked, and where their data are.

    Data are a file, a folder, a `package://` address or `hub:NAME`, as for `InstructionDataModule`. Paths are relative
    to the root, but for `harness_tasks`.

    Args:
        mmlu: Folder with MMLU's dev and test files.
        commonsense: Folder with boolq.test.jsonl and the others.
        classification: Data with text and label_name (or label); of a folder the test file.
        summarisation: Data with dialogue and summary; of a folder the test file.
        perplexity: Held-out data for training; of a folder the test file.
        perplexity_format: Format of the held-out data; default that of the training where the model tells it, else
            alpaca.
        shots: Examples in an MMLU prompt.
        per_subject: MMLU questions of each subject, chosen by seed; default all.
        limit: Questions of each other task, chosen by seed; default all.
        seed: Seeds the choice of questions and the bootstrap.
        chat: Ask in the model's chat template; default as in training where the model tells it, else not. MMLU is
            always plain.
        answers: Whether common-sense and classification answers are chosen by log-likelihood or looked for in
            generated text.
        max_new_tokens: Longest generated answer.
        batch_size: Prompts in a pass.
        max_length: Tokens that the model may read at once; default its context.
        harness_tasks: Folder with task files of lm-evaluation-harness, for tasks lm_eval:NAME; default the harness's
            own tasks, which fetch their data from the hub.
    """

    mmlu: str = "mmlu"
    commonsense: str = "commonsense"
    classification: str = "newsgroups20"
    summarisation: str = "samsum"
    perplexity: str = "held_out"
    perplexity_format: FormatName | None = None
    shots: int = 5
    per_subject: int | None = None
    limit: int | None = None
    seed: int = 0
    chat: bool | None = None
    answers: Literal["choice", "generation"] = "choice"
    max_new_tokens: int = 64
    batch_size: int = 8
    max_length: int | None = None
    harness_tasks: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers before any data are read.

        Raises:
            DataError: A number is out of range.
        """
        least = {"shots": 0, "per_subject": 1, "limit": 1, "max_new_tokens": 1, "batch_size": 1, "max_length": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise DataError(f"{name}={value} must be at least {lowest}")

    def place(self, name: str, root: str | Path | None) -> str:
        """Where the data of a setting are.

        Args:
            name: Such as "perplexity".
            root: The folder that paths are in; None is the working directory.
        """
        path: str = getattr(self, name)
        return path if is_address(path) or root is None else str(Path(root) / Path(path).expanduser())


def as_trained(settings: EvalSettings, meaning: Mapping[str, Any]) -> EvalSettings:
    """The settings with what they leave open taken from the training of the model.

    Args:
        settings: How to ask.
        meaning: What the model was trained with, see `language.data.InstructionDataModule.meaning`.

    Raises:
        AdapterError: `chat` contradicts it.
    """
    if settings.chat is not None:
        check_same(meaning, {"use_chat_template": settings.chat}, "the model")
    return replace(
        settings,
        chat=bool(meaning.get("use_chat_template", settings.chat)),
        perplexity_format=settings.perplexity_format or meaning.get("format") or "alpaca",
    )


Task = Callable[[], dict[str, Any]]


def plan(name: str, model: PreTrainedModel, tokenizer: Any, root: str | Path | None, s: EvalSettings) -> Task:
    """Read a task's data, and return the function that asks the model and gives the task's results.

    Raises:
        DataError: Data are missing or bad (file and line).
    """
    if name == "perplexity":
        return partial(_perplexity, model, _held_out(s.place(name, root), model, tokenizer, s))
    if name == "summarisation":
        tasks, skipped = read_summaries(
            s.place(name, root), tokenizer, bool(s.chat), s.limit, s.seed, meaning_of(model)
        )
        return partial(_summaries, model, tokenizer, tasks, skipped, s)
    questions = read_questions(name, tokenizer, root, s, meaning_of(model))
    if name == "mmlu":
        return partial(_mmlu, model, tokenizer, questions, s)
    return partial(_choose if s.answers == "choice" else _generate, name, model, tokenizer, questions, s)


def read_questions(
    name: str, tokenizer: Any, root: str | Path | None, s: EvalSettings, meaning: Mapping[str, Any] | None = None
) -> list[Question]:
    """The questions of a multiple-choice task: mmlu, classification or a common-sense one.

    Raises:
        DataError: The task is unknown, or its data are missing or bad (file and line).
    """
    chosen: dict[str, Any] = {"chat": bool(s.chat), "limit": s.limit, "seed": s.seed, "meaning": meaning}
    if name == "mmlu":
        return _guarded(read_mmlu(s.place(name, root), s.shots, s.per_subject, s.seed), tokenizer)
    if name == "classification":
        return read_classification(s.place(name, root), tokenizer, **chosen)
    return read_commonsense(s.place("commonsense", root), name, tokenizer, **chosen)


def _guarded(questions: list[Question], tokenizer: Any) -> list[Question]:
    """The questions; framed where the text spells a control token, which is to stay text."""
    control = ControlTokens(tokenizer, tokenizer.eos_token)
    guarded = [control.guard(q.prompt) for q in questions]
    return [
        q if text == q.prompt else replace(q, framed=FramedPrompt((text,)))
        for q, text in zip(questions, guarded, strict=True)
    ]


def _mmlu(model: PreTrainedModel, tokenizer: Any, questions: list[Question], s: EvalSettings) -> dict[str, Any]:
    result = _choose("mmlu", model, tokenizer, questions, s)
    pairs = zip(result["predictions"], result["answers"], strict=True)
    summary = summarise_mmlu(questions, [prediction == answer for prediction, answer in pairs])
    metrics = {"micro": summary.pop("micro"), "macro": summary.pop("macro")}
    return {**result, "metrics": metrics, **summary}


def _choose(
    name: str, model: PreTrainedModel, tokenizer: Any, questions: list[Question], s: EvalSettings
) -> dict[str, Any]:
    prompts, choices = [q.framed or q.prompt for q in questions], [q.choices for q in questions]
    scores = score_choices(model, tokenizer, prompts, choices, s.batch_size, s.max_length, name)
    answers = [q.answer for q in questions]
    by_sum, by_byte = scores.predictions(), scores.predictions(per_byte=True)
    metrics = {"accuracy": _accuracy(by_sum, answers), "accuracy per byte": _accuracy(by_byte, answers)}
    return {"metrics": metrics, "truncated": scores.truncated, "predictions": by_sum, "answers": answers}


def _generate(
    name: str, model: PreTrainedModel, tokenizer: Any, questions: list[Question], s: EvalSettings
) -> dict[str, Any]:
    texts, truncated = _write(model, tokenizer, [q.framed or q.prompt for q in questions], s, name)
    predictions = [find_option(text, q.options) for text, q in zip(texts, questions, strict=True)]
    answers = [q.answer for q in questions]
    metrics = {
        "accuracy": _accuracy(predictions, answers),
        "exact match": exact_match(texts, [q.options[q.answer] for q in questions]),
        "answered": proportion([prediction is not None for prediction in predictions]),
    }
    return {"metrics": metrics, "truncated": truncated, "predictions": predictions, "answers": answers}


def _accuracy(predictions: Sequence[int | None], answers: Sequence[int]) -> Estimate:
    return proportion([prediction == answer for prediction, answer in zip(predictions, answers, strict=True)])


def _summaries(
    model: PreTrainedModel, tokenizer: Any, tasks: list[WritingTask], skipped: int, s: EvalSettings
) -> dict[str, Any]:
    texts, truncated = _write(model, tokenizer, [task.framed or task.prompt for task in tasks], s, "summarisation")
    metrics = rouge(texts, [task.reference for task in tasks], s.seed)
    return {"metrics": metrics, "truncated": truncated, "skipped": skipped, "texts": texts}


def _write(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str | FramedPrompt], s: EvalSettings, name: str
) -> tuple[list[str], int]:
    """Greedy continuations of prompts, and how many prompts were truncated."""
    encoder = PromptEncoder(tokenizer, s.max_length or context_length(model))
    rows = [encoder.prompt(prompt, room=s.max_new_tokens + 1) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    texts = [""] * len(rows)
    for start in tqdm(range(0, len(order), s.batch_size), desc=name, leave=False):
        batch = order[start : start + s.batch_size]
        answers = generate(model, tokenizer, [rows[i] for i in batch], max_new_tokens=s.max_new_tokens)
        for index, answer in zip(batch, answers, strict=True):
            texts[index] = answer.strip()
    return texts, encoder.truncated


def _held_out(path: str, model: PreTrainedModel, tokenizer: Any, s: EvalSettings) -> InstructionDataModule:
    assert s.perplexity_format is not None
    meaning = meaning_of(model)
    same = meaning.get("format") == s.perplexity_format
    data = InstructionDataModule(
        path=path,
        test_path=path,
        tokenizer=tokenizer,
        format=s.perplexity_format,
        prompt_template=meaning.get("prompt_template") if same else None,
        system_in_user=bool(s.chat) and meaning.get("system_in_user", False),
        end_token=meaning.get("end_token"),
        max_length=s.max_length or context_length(model) or _DEFAULT_LENGTH,
        batch_size=s.batch_size,
        test_subset=s.limit and min(s.limit, len(read_rows(path, "test"))),
        use_chat_template=bool(s.chat),
        seed=s.seed,
    )
    data.setup("test")
    return data


def _perplexity(model: PreTrainedModel, data: InstructionDataModule) -> dict[str, Any]:
    return {"metrics": held_out_loss(row_losses(model, data.test_dataloader()))}
