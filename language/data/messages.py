"""The messages of a conversation: roles, contents, and the fields that say which answers are not to be learned."""

from __future__ import annotations

from typing import Any

from language.data.rows import Row, clean, names_of, shown
from lit_adapters.errors import DataError

Message = tuple[str, str]  # role and content

ROLES = ("system", "user", "assistant")
LEARN = ("weight", "loss_weight", "train", "training", "trainable", "learn", "loss")  # false or 0: do not learn
MASK = ("mask", "masked")  # true or 1: do not learn
_HARMLESS = ("name", "id")  # who spoke, and a number: not part of what a model reads
# Fields beside the messages that a chat template would have to write; without them the conversation has another sense.
_BESIDE = ("tools", "functions", "documents", "system", "system_prompt", "chat_template_kwargs")


class EmptyFieldError(Exception):
    """A row has an empty prompt or answer."""


def read_message(turn: Any, origin: str) -> tuple[str, str, bool]:
    """Role, content and whether the message may be learned. The content keeps its white space.

    Args:
        turn: The message, an object with role and content.
        origin: Where it stands, for messages.

    Raises:
        DataError: Role or content is missing or not text, the role or another field is unknown, or a field that says
            whether to learn is neither true, false, 0 nor 1.
    """
    if not isinstance(turn, dict):
        raise DataError(
            f"{origin}: expected a role ({', '.join(ROLES)}) and a content, got {shown(turn)}; correct the row"
        )
    for name in ("role", "content"):
        if name not in turn:
            raise DataError(f"{origin}: field {name!r} is missing (the message has {names_of(turn)}); add it")
    role, content = turn["role"], turn["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{origin}: role {shown(role)} is unknown; use {', '.join(ROLES)}")
    known = ("role", "content", *LEARN, *MASK, *_HARMLESS)
    if unknown := [name for name, value in turn.items() if name not in known and not _is_empty(value)]:
        raise DataError(
            f"{origin}: field {shown(unknown[0])} of a message is unknown; use role and content, and {LEARN[0]} or "
            f"{LEARN[2]} to leave an answer unlearned; remove other fields"
        )
    if content is not None and not isinstance(content, str):
        raise DataError(f"{origin}: field 'content' must be text, got {shown(content)}; correct the row")
    learns = [(name, flag) for name in (*LEARN, *MASK) if (flag := _flag(turn, name, origin)) is not None]
    if role != "assistant" and (asked := [name for name, flag in learns if flag]):
        raise DataError(
            f"{origin}: field {asked[0]!r} asks to learn a message of role {role!r}; only the assistant's are learned"
        )
    return role, clean(content or "", f"{origin}: field 'content'"), all(flag for _, flag in learns)


def read_messages(row: Row, column: str) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    """The messages of a conversation, and the places of the assistant's messages that are not to be learned.

    Answers keep their white space; other messages lose what surrounds them.

    Args:
        row: The row.
        column: The name of the field that holds the list of messages.

    Raises:
        DataError: A message is badly formed or in a place where it cannot be, or the row has tools or a system prompt
            beside its messages.
        EmptyFieldError: A message is empty, or there is no answer to learn.
    """
    turns = row.values.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"{row.origin}: field {column!r} must be a list of messages with role and content "
            f"(the row has {names_of(row.values)}); check format=chat"
        )
    if beside := [name for name in _BESIDE if name != column and not _is_empty(row.values.get(name))]:
        raise DataError(
            f"{row.origin}: field {beside[0]!r} beside the messages would be lost: write it into a system message, or "
            "remove it"
        )
    messages: list[Message] = []
    unlearned: list[int] = []
    for number, turn in enumerate(turns, 1):
        origin = f"{row.origin}, message {number}"
        role, content, learns = read_message(turn, origin)
        if role == "system" and number > 1:
            raise DataError(f"{origin}: a system message must come first; move it")
        if not content.strip():
            raise EmptyFieldError(f"message {number}: field 'content' is empty")
        if role == "assistant" and not learns:
            unlearned.append(number - 1)
        messages.append((role, content if role == "assistant" else content.strip()))
    roles = [role for role, _ in messages]
    if not roles or roles[-1] != "assistant":
        raise EmptyFieldError("the conversation does not end with an assistant's message, so there is no answer")
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(f"{row.origin}: the assistant speaks before any user; put a user message first")
    if len(unlearned) == roles.count("assistant"):
        raise EmptyFieldError("no message of the assistant is to be learned")
    return tuple(messages), tuple(unlearned)


def says_unlearned(values: dict[str, Any], columns: set[str]) -> bool:
    """Whether a row of fields says that it is not to be learned: `weight: 0`, `train: false`, `mask: true`.

    Args:
        values: The row's fields.
        columns: Names of fields with a meaning of their own.
    """
    off = [values[n] for n in LEARN if n in values and n not in columns and not isinstance(values[n], str)]
    on = [values[name] for name in MASK if name in values and name not in columns]
    return any(value is False or _is_number(value, 0) for value in off) or any(value is True for value in on)


def _flag(turn: dict[str, Any], name: str, origin: str) -> bool | None:
    """Whether a field says to learn the message; None where it is absent or null."""
    value = turn.get(name)
    if value is None:
        return None
    if not (isinstance(value, bool) or _is_number(value, 0) or _is_number(value, 1)):
        raise DataError(f"{origin}: field {name!r} must be true, false, 0 or 1, got {shown(value)}; correct the row")
    return bool(value) != (name in MASK)


def _is_number(value: Any, number: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == number


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})
