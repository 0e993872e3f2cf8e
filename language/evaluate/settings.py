"""How tasks are asked, and where their data are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from language.data.formats import FormatName
from language.data.sources import is_address
from lit_adapters.errors import DataError
from lit_adapters.files.meaning import check_same

PREFIX = "lm_eval:"  # before the name of a task of lm-evaluation-harness


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


DEFAULTS = EvalSettings()
