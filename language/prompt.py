"""The tokens of one prompt, framed as in training."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from language.data.formats import FORMATS, FormatName, Record
from language.data.rows import check_characters
from language.data.templates import Example, Renderer
from language.data.tokenise import Encoder


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, name: FormatName | None, chat: bool, room: int
) -> list[int]:
    """The tokens of a prompt, framed as `language.data` frames it in training; at most `room`.

    Args:
        tokenizer: The model's own.
        prompt: An instruction, question, message or text, whatever the format asks for.
        name: Format of the training; None takes the prompt as it is, control tokens that it spells included.
        chat: Whether to frame by the tokenizer's chat template; format chat always does.
        room: Most tokens that the prompt may have.

    Raises:
        DataError: The prompt has more tokens, or a chat template is needed and missing.
    """
    check_characters(prompt, "the prompt")
    end: Any = tokenizer.eos_token
    end_id: Any = tokenizer.eos_token_id
    if name is None and not chat:
        return Encoder(tokenizer, end_id, room, True, plain=True).prompt(Example(prompt, "", "--prompt"))
    prompt = prompt.replace("\r\n", "\n").strip()  # as the prompts of rows
    renderer = Renderer(tokenizer, end, name or "chat", chat=chat)
    if name in FORMATS:
        record = Record({FORMATS[name].fields[0]: prompt, FORMATS[name].optional: ""}, origin="--prompt")
    else:
        record = Record(messages=(("user", prompt), ("assistant", "")), origin="--prompt")
    return Encoder(tokenizer, end_id, room, True, plain=not renderer.chat).prompt(renderer.example(record))
