"""The tokens of one prompt, framed as in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from language.data.formats import FORMATS, FormatName, Record
from language.data.rows import check_characters
from language.data.templates import Example, Renderer
from language.data.tokenise import Encoder
from lit_adapters.errors import DataError
from lit_adapters.files.meaning import check_same


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    name: FormatName | None,
    chat: bool | None,
    room: int,
    meaning: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of a prompt, framed as `language.data` frames it in training; at most `room`.

    Args:
        tokenizer: The model's own.
        prompt: An instruction, question, message or text, whatever the format asks for.
        name: Format of the training; by default what the model says. Without either the prompt is taken as it is,
            control tokens that it spells included.
        chat: Whether to frame by the chat template; by default what the model says. Format chat always does.
        room: Most tokens that the prompt may have.
        meaning: What the model was trained with, see `language.data.InstructionDataModule.meaning`.

    Raises:
        AdapterError: The format or `chat` contradicts what the model was trained with.
        DataError: The prompt is empty or has more tokens, or a chat template is needed and missing.
    """
    meaning = meaning or {}
    asked = {"format": name, "use_chat_template": True if name == "chat" else chat}
    check_same(meaning, {key: value for key, value in asked.items() if value is not None}, "the model")
    trained = meaning.get("format")
    name = trained if trained in (*FORMATS, "chat") else name
    chat = bool(meaning.get("use_chat_template", chat))
    check_characters(prompt, "the prompt")
    if not prompt.strip():
        raise DataError("a prompt has no tokens; give it a text")
    end: Any = tokenizer.eos_token
    end_id: Any = tokenizer.eos_token_id
    if name is None and not chat:
        return Encoder(tokenizer, end_id, room, True, plain=True).prompt(Example(prompt, "", "--prompt"))
    prompt = prompt.replace("\r\n", "\n").strip()  # as the prompts of rows
    renderer = Renderer(
        tokenizer,
        end,
        name or "chat",
        meaning.get("prompt_template"),
        chat,
        meaning.get("chat_template"),
        meaning.get("system_in_user", False),
    )
    if name in FORMATS:
        record = Record({FORMATS[name].fields[0]: prompt, FORMATS[name].optional: ""}, origin="--prompt")
    else:
        record = Record(messages=(("user", prompt), ("assistant", "")), origin="--prompt")
    return Encoder(tokenizer, end_id, room, True, plain=not renderer.chat).prompt(renderer.example(record))
