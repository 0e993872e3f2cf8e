"""What travels with the weights of a language model: format, templates, end token, classes; and putting it to use.

`InstructionDataModule.meaning` says it, `lit_adapters.files.meaning` carries it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_adapters.errors import AdapterError
from lit_adapters.files.meaning import meaning_of

_TEXTS = ("format", "prompt_template", "chat_template", "end_token")
_FLAGS = ("use_chat_template", "system_in_user")


def check_meaning(meaning: Mapping[str, Any], origin: str) -> None:
    """Check the types of what a file says.

    Args:
        meaning: As `lit_adapters.files.meaning` returns it.
        origin: The file, for messages.

    Raises:
        AdapterError: A value is of another type than the data module writes.
    """
    wrong = [name for name in _TEXTS if not isinstance(meaning.get(name), str | None)]
    wrong += [name for name in _FLAGS if not isinstance(meaning.get(name, False), bool)]
    classes, ends = meaning.get("classes", []), meaning.get("end_token_ids", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        wrong.append("classes")
    if not isinstance(ends, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ends):
        wrong.append("end_token_ids")
    if wrong:
        value = repr(meaning[wrong[0]])[:60]
        raise AdapterError(f"{origin}: its meaning gives {wrong[0]} as {value}; save it again with this version")


def apply_meaning(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end at the end token of the training, and the tokenizer use its chat template and end token.

    Args:
        model: A transformers causal language model.
        tokenizer: The model's own.

    Raises:
        AdapterError: As `check_meaning`, or the tokenizer does not have the end token.
    """
    meaning = meaning_of(model)
    check_meaning(meaning, "the model")
    if template := meaning.get("chat_template"):
        tokenizer.chat_template = template
    end = meaning.get("end_token")
    if end is None:
        return
    index = tokenizer.get_vocab().get(end)
    if index is None:
        raise AdapterError(
            f"the model was trained with the end token {end!r}, which its tokenizer does not have: use "
            "the tokenizer of the training"
        )
    if end in {token.content for token in tokenizer.added_tokens_decoder.values()}:
        tokenizer.eos_token = end  # any other token would be split off from text that holds it
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        own = settings.eos_token_id
        listed = [] if own is None else [own] if isinstance(own, int) else list(own)
        if index not in listed:
            settings.eos_token_id = [index, *listed] if listed else index


def trained_end(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that ended answers in training; None where the model does not say."""
    end = meaning_of(model).get("end_token")
    return tokenizer.get_vocab().get(end) if isinstance(end, str) else None
