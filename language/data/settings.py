"""Checks of the settings of a data module, before any file is read."""

from __future__ import annotations

from typing import Any

from language.data.formats import FORMATS, check_columns, check_template, field_names
from language.data.rows import check_characters, shown
from lit_adapters.errors import DataError


def check_settings(data: Any) -> None:
    """Check the settings of an `InstructionDataModule`.

    Raises:
        DataError: A value is out of range, or has no meaning for the format; the message names the fix.
    """
    numbers = ["batch_size", "max_length", "num_workers", "val_fraction", "test_fraction"]
    for name in (*numbers, "seed", "order_seed", "subset_index"):
        value = getattr(data, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DataError(f"{name}={shown(value)} must be a number")
    subsets = {f"{split}_subset": size for split, size in data.subsets.items()}
    for name, value in {"batch_size": data.batch_size, **subsets}.items():
        if value is not None and value < 1:
            raise DataError(f"{name}={value} must be at least 1")
    if data.subset_index < 0:
        raise DataError(f"subset_index={data.subset_index} must be at least 0")
    if data.subset_index and data.subsets["train"] is None:
        raise DataError(f"subset_index={data.subset_index} needs train_subset, the size of the subset")
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
    for name, seed in {"seed": data.seed, "order_seed": data.order_seed}.items():
        if abs(seed) >= 2**63:
            raise DataError(f"{name}={shown(seed)} must be below 2^63")
    if data.on_disk:
        if data.cache_dir is None:
            raise DataError("on_disk leaves tokens in cache_dir, which is not set: name a folder")
        if data.subsets["train"] is not None:
            raise DataError(
                f"train_subset={data.subsets['train']} would choose rows, which on_disk cannot do: leave it out"
            )
    _check_texts(data)


def _check_texts(data: Any) -> None:
    """Check the settings that are text: paths, names of columns, templates.

    Raises:
        DataError: As `check_settings`.
    """
    texts = {"end_token": data.end_token, "chat_template": data.chat_template, "cache_dir": data.cache_dir}
    paths = {"path": data.path, "val_path": data.paths["val"], "test_path": data.paths["test"]}
    for name, value in {**texts, **paths}.items():
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not text:
                raise DataError(f"{name} is empty: give it a value, or leave it out")
            check_characters(text or "", name)
    check_columns(data.columns or {}, field_names(data.format), f"format {data.format}")
    if data.format == "chat" and data.prompt_template is not None:
        raise DataError("prompt_template has no meaning for format=chat: set chat_template")
    if data.prompt_template is not None:
        check_template(data.prompt_template, FORMATS[data.format], data.format)
    if data.format != "chat" and not data.use_chat_template:
        given = {"chat_template": data.chat_template is not None, "system_in_user": data.system_in_user}
        for name in (name for name, is_given in given.items() if is_given):
            raise DataError(f"{name} has no meaning for format={data.format} in plain prompts: set use_chat_template")
