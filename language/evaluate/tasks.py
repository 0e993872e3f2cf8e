"""What to ask: the settings of an evaluation, and the questions that its files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from language.data.formats import FormatName
from language.data.module import InstructionDataModule
from language.data.sources import is_address, read_rows
from language.evaluate.mmlu import read_mmlu
from language.evaluate.questions import Question, read_classification, read_commonsense, read_summaries
from language.models import context_length
from lit_adapters.errors import DataError
from lit_adapters.files.meaning import check_same, meaning_of

PREFIX = "lm_eval:"  # before the name of a task of lm-evaluation-harness
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
        chat: Ask in the model's chat template; default as in training where the model tells it, else not. MMLU and
            tasks of the harness are always plain.
        answers: Whether common-sense and classification answers are chosen by log-likelihood or looked for in
            generated text. Other tasks do not follow it.
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


def read_questions(
    name: str, tokenizer: Any, root: str | Path | None, s: EvalSettings, meaning: Mapping[str, Any] | None = None
) -> list[Question]:
    """The questions of a task: mmlu, classification, summarisation or a common-sense one.

    Raises:
        DataError: The task is unknown, or its data are missing or bad (file and line).
    """
    chosen: dict[str, Any] = {"chat": bool(s.chat), "limit": s.limit, "seed": s.seed, "meaning": meaning}
    if name == "mmlu":
        return read_mmlu(s.place(name, root), tokenizer, s.shots, s.per_subject, s.seed)
    if name == "classification":
        return read_classification(s.place(name, root), tokenizer, **chosen)
    if name == "summarisation":
        return read_summaries(s.place(name, root), tokenizer, **chosen)
    return read_commonsense(s.place("commonsense", root), name, tokenizer, **chosen)


def held_out_rows(path: str, model: PreTrainedModel, tokenizer: Any, s: EvalSettings) -> InstructionDataModule:
    """Held-out rows in the format and templates of the model's training.

    Args:
        path: A file, or a folder with a test file.
        model: The model, whose training and context count.
        tokenizer: The model's own.
        s: As `as_trained` returns them.

    Raises:
        DataError: A row is bad (file and line).
    """
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
