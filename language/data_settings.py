"""Settings of the data module that cannot be meant, refused before any file is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from language.formats import FORMATS, check_template
from lit_adapters.errors import DataError

if TYPE_CHECKING:
    from language.data import InstructionDataModule


def check_settings(data: InstructionDataModule) -> None:
    """Raise DataError for a value out of range, or one without a meaning for the format; the message names the fix."""
    subsets = {f"{split}_subset": size for split, size in data.subsets.items()}
    for name, value in {"batch_size": data.batch_size, **subsets}.items():
        if value is not None and value < 1:
            raise DataError(f"{name}={value} must be at least 1")
    if data.max_length < 2:
        raise DataError(f"max_length={data.max_length} must be at least 2: a prompt and an answer")
    if data.max_answer_length is not None and not 0 < data.max_answer_length < data.max_length:
        raise DataError(
            f"max_answer_length={data.max_answer_length} must be at least 1 and below max_length={data.max_length}"
        )
    if data.num_workers < 0:
        raise DataError(f"num_workers={data.num_workers} must be at least 0")
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= getattr(data, name) < 1:
            raise DataError(f"{name}={getattr(data, name)} must be at least 0 and below 1")
    if data.format == "chat" and data.prompt_template is not None:
        raise DataError("prompt_template has no meaning for format=chat: set chat_template")
    if data.prompt_template is not None:
        check_template(data.prompt_template, FORMATS[data.format], data.format)
