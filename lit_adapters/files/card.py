"""The model card beside an adapter directory: README.md, with the fields that a hub reads at its head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_adapters.errors import AdapterError

CARD = "README.md"
# A card with this line may be replaced; others are the user's own.
_MARK = "<!-- written by lit-adapters, and written again at the next save: delete this line to keep your changes -->"
_BUILD = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def card(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    repository: str = "DIRECTORY",
    license: str | None = None,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    picture: str | None = None,
) -> str:
    """The text of a card.

    Args:
        header: Of the adapter directory.
        tensors: What it holds, by name.
        repository: What `load_adapters` is given.
        license: Of the adapters, as the hub calls it ("apache-2.0").
        data: What they were trained on, in a sentence.
        metrics: Results by name.
        picture: The file with the learned functions.

    Raises:
        AdapterError: `license` is not one word.
    """
    if license is not None and (not license or not all(c.isalnum() or c in ".-+" for c in license)):
        raise AdapterError(f"license {license!r} must be an identifier of the hub, such as 'apache-2.0'")
    base = header["base"]
    name, methods = base.get("name"), sorted(set(header["adapters"].values()))
    fields = {"base_model": name, "base_model_relation": "adapter" if name else None, "license": license}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None)]
    lines += ["library_name: lit-adapters", "tags:", *(f"- {json.dumps(tag)}" for tag in ["lit-adapters", *methods])]
    lines += ["---", _MARK, "", f"# {', '.join(methods) or 'Trained modules'}", ""]
    of_base = f" for [{name}](https://huggingface.co/{name})" if name else ""
    at = f", revision `{base['revision']}`" if "revision" in base else ""
    count = sum(t.numel() for t in tensors.values())
    lines += [f"{len(header['adapters'])} adapters{of_base}{at}: {count:,} values in {len(tensors)} tensors.", ""]
    if data:
        lines += ["Trained on:", "", _plain(data), ""]
    if metrics:
        lines += ["| metric | value |", "|---|---:|", *(f"| {_plain(k)} | {v:g} |" for k, v in metrics.items()), ""]
    if picture:
        lines += [f"![size, rank and spectrum of what was learned, by layer]({picture})", ""]
    lines += ["## How to load them", "", "```python", "import lit_adapters as la"]
    build = _BUILD.get(base.get("task", ""))
    if name and build:
        revision = f", revision={base['revision']!r}" if "revision" in base else ""
        lines += [f"from transformers import {build}", "", f"model = {build}.from_pretrained({name!r}{revision})"]
    else:
        lines += ["", "model = ...  # the base model, with the weights that the adapters were trained on"]
    lines += [f"la.load_adapters(model, {repository!r})", "```", ""]
    lines += ["`load_adapters` warns if the base has other weights.", "", "## Settings", "", "```json"]
    settings = {"methods": header["methods"], "train": header["train"], "lit_adapters": header["lit_adapters"]}
    return "\n".join([*lines, json.dumps(settings, indent=2), "```", ""])


def may_write_card(directory: Path) -> bool:
    """Whether the directory has no card, or one that was written here."""
    path = directory / CARD
    if not path.is_file():
        return not path.exists()
    with path.open(encoding="utf-8", errors="replace") as file:
        return is_generated(file.read(10_000))


def is_generated(text: str) -> bool:
    """Whether a card was written here, and not changed into the user's own."""
    return _MARK in text


def _plain(text: str) -> str:
    """Text in one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
