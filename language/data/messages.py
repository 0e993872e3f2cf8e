"""The messages of a conversation: roles, contents, and the fields that say which answers are not to be learned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from language.data.rows import Row, clean, names_of, shown
from lit_adapters.errors import DataError

Message = tuple[str, str]  # role and content

ROLES = ("system", "user", "assistant")
LEARN = ("weight", "loss_weight", "train", "training", "trainable", "learn", "loss")  # false or 0: do not learn
MASK = ("mask", "masked")  # true or 1: do not learn
_HARMLESS = ("name", "id")  # who spoke, and a number: not part of what a model reads
# Fields beside the messages that a chat template would have to write; without them the conversation has another sense.
_BESIDE = ("documents", "chat_template_kwargs")
_SYSTEM = ("system", "system_prompt")  # fields beside the messages that become the first one
_TOOLS = ("tools", "functions")  # fields beside the messages that describe functions; the second is an older form
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")  # of messages
_SHAREGPT = "conversations"  # a list of turns with `from` and `value`
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",  # its value is the call
}


@dataclass(frozen=True)
class Conversation:
    """A conversation as it was read.

    Attributes:
        messages: Role and content of each message.
        unlearned: Places of the assistant's messages that are not to be learned.
        more: Further fields of a message for the chat template, such as `tool_calls`, by its place.
        tools: Descriptions of functions that the model may call, as transformers' chat templates take them.
    """

    messages: tuple[Message, ...]
    unlearned: tuple[int, ...] = ()
    more: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()


class EmptyFieldError(Exception):
    """A row has an empty prompt or answer."""


def read_message(turn: Any, origin: str, roles: Sequence[str] = ROLES) -> tuple[str, str, bool]:
    """Role, content and whether the message may be learned. The content keeps its white space.

    Args:
        turn: The message, an object with role and content: text, or a list of parts of text.
        origin: Where it stands, for messages.
        roles: Those that there may be.

    Raises:
        DataError: Role or content is missing or not text, the role or another field is unknown, or a field that says
            whether to learn is neither true, false, 0 nor 1.
    """
    if not isinstance(turn, dict):
        raise DataError(
            f"{origin}: expected a role ({', '.join(roles)}) and a content, got {shown(turn)}; correct the row"
        )
    for name in ("role", "content"):
        if name not in turn:
            raise DataError(f"{origin}: field {name!r} is missing (the message has {names_of(turn)}); add it")
    role, content = turn["role"], _joined(turn["content"], origin)
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{origin}: role {shown(role)} is unknown; use {', '.join(roles)}")
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


def read_messages(row: Row, column: str) -> Conversation:
    """Read a conversation: a list of messages with role and content, or ShareGPT's list of turns with from and value.

    Answers keep their white space; other messages lose what surrounds them. A field `system` beside the messages
    becomes the first one. `tools` and a message's `tool_calls` are for the chat template.

    Args:
        row: The row.
        column: The name of the field that holds the list of messages.

    Raises:
        DataError: A message is badly formed or in a place where it cannot be, or a field beside the messages would be
            lost.
        EmptyFieldError: A message is empty, or there is no answer to learn.
    """
    turns = _turns(row, column)
    if beside := [name for name in _BESIDE if name != column and not _is_empty(row.values.get(name))]:
        raise DataError(
            f"{row.origin}: field {beside[0]!r} beside the messages would be lost: write it into a system message, or "
            "remove it"
        )
    messages: list[Message] = []
    unlearned: list[int] = []
    more: dict[int, dict[str, Any]] = {}
    for number, turn in enumerate(turns, 1):
        origin = f"{row.origin}, message {number}"
        extra = _tool_fields(turn, origin)
        plain = {"content": None, **{name: value for name, value in turn.items() if name not in _TOOL_FIELDS}}
        role, content, learns = read_message(plain if extra else turn, origin, (*ROLES, "tool"))
        if extra and role not in ("assistant", "tool"):
            raise DataError(f"{origin}: field {min(extra)!r} belongs to the assistant's and tools' messages; remove it")
        if role == "system" and number > 1:
            raise DataError(f"{origin}: a system message must come first; move it")
        if not content.strip() and "tool_calls" not in extra:
            raise EmptyFieldError(f"message {number}: field 'content' is empty")
        if role == "tool" and not _is_empty(turn.get("name")):
            extra["name"] = turn["name"]
        if extra:
            more[len(messages)] = extra
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
    return Conversation(tuple(messages), tuple(unlearned), more, _tools(row, column))


def _turns(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages as objects with role and content, a system message from beside them first."""
    sharegpt = column not in row.values and _SHAREGPT in row.values
    turns = row.values.get(_SHAREGPT if sharegpt else column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"{row.origin}: field {column!r} must be a list of messages with role and content "
            f"(the row has {names_of(row.values)}); check format=chat"
        )
    if sharegpt:
        turns = [_from_sharegpt(turn, f"{row.origin}, message {number}") for number, turn in enumerate(turns, 1)]
    system = [name for name in _SYSTEM if name != column and not _is_empty(row.values.get(name))]
    if not system:
        return turns
    text = row.values[system[0]]
    if len(system) > 1 or not isinstance(text, str) or (turns and turns[0].get("role") == "system"):
        raise DataError(
            f"{row.origin}: field {system[0]!r} beside the messages must be the only system prompt, and text; write it "
            "into a system message"
        )
    return [{"role": "system", "content": text}, *turns]


def _from_sharegpt(turn: dict[str, Any], origin: str) -> dict[str, Any]:
    """A turn of ShareGPT as a message."""
    if "from" not in turn and "role" in turn:
        return turn
    speaker, rest = turn.get("from"), {n: v for n, v in turn.items() if n not in ("from", "value")}
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"{origin}: field 'from' is {shown(speaker)}; use {', '.join(_SPEAKERS)}")
    if "value" not in turn:
        raise DataError(f"{origin}: field 'value' is missing (the turn has {names_of(turn)}); add it")
    if speaker == "function_call":
        return {"role": "assistant", "content": None, "function_call": turn["value"], **rest}
    return {"role": _SPEAKERS[speaker], "content": turn["value"], **rest}


def _joined(content: Any, origin: str) -> Any:
    """The text of a content that is a list of parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        text = isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        if not (isinstance(part, str) or text):
            raise DataError(
                f"{origin}: a part of 'content' is {shown(part)}, and only parts of text are read; correct the row"
            )
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def _tool_fields(turn: dict[str, Any], origin: str) -> dict[str, Any]:
    """The fields of a message that concern tools, as chat templates take them."""
    found = {name: turn[name] for name in _TOOL_FIELDS if not _is_empty(turn.get(name))}
    if "function_call" in found:  # the older form, and that of ShareGPT
        if "tool_calls" in found:
            raise DataError(f"{origin} has both tool_calls and function_call; remove one")
        found["tool_calls"] = [found.pop("function_call")]
    if "tool_calls" in found:
        calls = found["tool_calls"]
        if not isinstance(calls, list):
            raise DataError(f"{origin}: field 'tool_calls' must be a list, got {shown(calls)}; correct the row")
        found["tool_calls"] = [_call(call, origin) for call in calls]
    return found


def _call(call: Any, origin: str) -> dict[str, Any]:
    call = _parsed(call)
    function = _parsed(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{origin}: a call of a tool needs a function with a name, got {shown(call)}; correct the row")
    rest = {name: value for name, value in call.items() if name not in ("function", "name", "arguments")}
    arguments = _parsed(function.get("arguments", {}))
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def _tools(row: Row, column: str) -> tuple[dict[str, Any], ...]:
    """The descriptions of functions beside the messages."""
    names = [name for name in _TOOLS if name != column and not _is_empty(row.values.get(name))]
    if not names:
        return ()
    tools = _parsed(row.values[names[0]])
    if len(names) > 1 or not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{row.origin}: field {names[0]!r} must be the only list of descriptions of functions, got "
            f"{shown(row.values[names[0]])}; correct the row"
        )
    described = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in described:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise DataError(f"{row.origin}: a function in {names[0]!r} has no name: {shown(tool)}; correct the row")
    return tuple(described)


def _parsed(value: Any) -> Any:
    """The value of a text in JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def says_unlearned(values: dict[str, Any], columns: set[str]) -> bool:
    """Whether a row of fields says that it is not to be learned: `weight: 0`, `train: false`, `mask: true`.

    The words and digits may be text, as all values of csv are. Other values say nothing.

    Args:
        values: The row's fields.
        columns: Names of fields with a meaning of their own.
    """

    def says(names: Iterable[str], word: bool) -> bool:
        own = [values[name] for name in names if name in values and name not in columns]
        return any(value is word or _is_number(value, int(word)) for value in map(_told, own))

    return says(LEARN, False) or says(MASK, True)


def _told(value: Any) -> Any:
    """A number or a truth value that is written as text, as all values of csv are; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return value


def weighs(values: dict[str, Any], columns: set[str]) -> str | None:
    """The name of a field that gives a row of fields a weight other than 0 and 1, which is not used; or None.

    Args:
        values: The row's fields.
        columns: As in `says_unlearned`.
    """
    for name in (*LEARN, *MASK):
        value = _told(values.get(name))
        is_weight = isinstance(value, (int, float)) and not isinstance(value, bool) and value not in (0, 1)
        if is_weight and name not in columns:
            return name
    return None


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
