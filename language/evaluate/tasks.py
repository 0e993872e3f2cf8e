"""The questions and held-out rows of an evaluation's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from language.data.module import InstructionDataModule
from language.data.sources import read_rows
from language.evaluate.mmlu import read_mmlu
from language.evaluate.questions import Question, read_classification, read_commonsense, read_summaries
from language.evaluate.settings import EvalSettings
from language.models import context_length
from lit_adapters.files.meaning import meaning_of

_DEFAULT_LENGTH = 2048  # tokens, for models that name no context


def read_questions(
    name: str, tokenizer: Any, root: str | Path | None, s: EvalSettings, meaning: Mapping[str, Any] | None = None
) -> list[Question]:
    """The questions of a task: mmlu, classification, summarisation or a common-sense one.

    Raises:
        DataError: The task is unknown, or its data are missing or bad (file and line).
    """
    if name == "mmlu":
        return read_mmlu(s.place(name, root), tokenizer, s)
    if name == "classification":
        return read_classification(s.place(name, root), tokenizer, s, meaning)
    if name == "summarisation":
        return read_summaries(s.place(name, root), tokenizer, s, meaning)
    return read_commonsense(s.place("commonsense", root), name, tokenizer, s, meaning)


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
        chat_template=meaning.get("chat_template") if s.chat or s.perplexity_format == "chat" else None,
        seed=s.seed,
    )
    data.setup("test")
    return data
