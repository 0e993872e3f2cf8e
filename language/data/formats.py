"""What a row means: the fields of each format, its prompt, and its answer.

A format turns rows into checked `Record`s: a conversation, or named fields with one answer. `language.data.templates`
writes their text for a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from language.data.sources import Row
from lit_adapters.errors import DataError

FormatName = Literal["alpaca", "openorca", "chat", "summarisation", "classification", "pairs"]
Message = tuple[str, str]  # role and content

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Format:
    """A format whose rows hold named fields.

    Attributes:
        fields: Fields of the prompt that every row must fill.
        answer: The field to be learned.
        optional: A field of the prompt that may be absent or empty; "" for none.
        plain: Prompt for models without a chat template.
        plain_short: The same where the optional field is empty.
        user: The user's message for models with a chat template.
        user_short: The same where the optional field is empty.
        system: The field that becomes the system message of a chat; "" for none.
        body: The field that may lose its beginning where a prompt is too long; "" for none.
    """

    fields: tuple[str, ...]
    answer: str
    plain: str
    user: str
    optional: str = ""
    plain_short: str = ""
    user_short: str = ""
    system: str = ""
    body: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All fields that a prompt template may use."""
        return (*self.fields, *filter(None, [self.optional]))


_ALPACA = "Below is an instruction that describes a task"
_ALPACA_END = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
FORMATS: dict[str, Format] = {
    # Stanford Alpaca's two prompts, with the line break before the answer of alpaca-lora.
    "alpaca": Format(
        fields=("instruction",),
        optional="input",
        answer="output",
        plain=f"{_ALPACA}, paired with an input that provides further context. {_ALPACA_END}"
        "### Input:\n{input}\n\n### Response:\n",
        plain_short=f"{_ALPACA}. {_ALPACA_END}### Response:\n",
        user="{instruction}\n\n{input}",
        user_short="{instruction}",
    ),
    "openorca": Format(
        fields=("question",),
        optional="system_prompt",
        answer="response",
        plain="### System:\n{system_prompt}\n\n### User:\n{question}\n\n### Response:\n",
        plain_short="### User:\n{question}\n\n### Response:\n",
        user="{question}",
        user_short="{question}",
        system="system_prompt",
    ),
    "summarisation": Format(
        fields=("dialogue",),
        answer="summary",
        plain="Summarize this dialogue.\n\n{dialogue}\n\nSummary:\n",
        user="Summarize this dialogue.\n\n{dialogue}",
        body="dialogue",
    ),
    "classification": Format(
        fields=("text",), answer="label", plain="{text}\n\nLabel:\n", user="{text}\n\nLabel:", body="text"
    ),
    "pairs": Format(fields=("prompt",), answer="response", plain="{prompt}\n", user="{prompt}"),
}


@dataclass(frozen=True)
class Record:
    """One checked row: named fields with an answer, or the messages of a conversation (then `fields` is empty)."""

    fields: dict[str, str] = field(default_factory=dict)
    answer: str = ""
    messages: tuple[Message, ...] = ()
    origin: str = ""

    @property
    def prompt_key(self) -> str:
        """What records with the same prompt share; these go into the same split."""
        return repr(self.messages[:-1] or sorted(self.fields.items()))


def parse(
    rows: Sequence[Row], name: FormatName, columns: Mapping[str, str] | None = None, drop_empty: bool = False
) -> tuple[list[Record], int]:
    r"""Check rows and turn them into records; line ends become `\n`.

    Args:
        rows: The rows.
        name: Their format.
        columns: The file's name of a field where it differs: `{"label": "label_name"}`.
        drop_empty: Drop rows whose prompt or answer is empty instead of raising.

    Returns:
        The records, and how many rows were dropped.

    Raises:
        DataError: A field is missing or not text, a role is unknown, or a prompt or answer is empty; the message names
            file, line and field.
    """
    read = _read_messages if name == "chat" else _read_fields
    records = []
    for row in rows:
        try:
            records.append(read(row, name, columns or {}))
        except _EmptyFieldError as error:
            if not drop_empty:
                raise DataError(
                    f"{row.origin}: {error}; correct the row, or set drop_empty to drop such rows"
                ) from None
    if not records:
        raise DataError(f"all {len(rows)} rows of {rows[0].origin} and after are empty: check format={name}")
    return records, len(rows) - len(records)


def check_template(template: str, form: Format, name: str) -> None:
    """Check the fields of a prompt template.

    Raises:
        DataError: A required field is missing in it, a field is unknown, or the braces do not match.
    """
    try:
        used = {part[1] for part in Formatter().parse(template) if part[1] is not None}
    except ValueError as error:
        raise DataError(f"prompt_template {template!r} is malformed ({error}): write {{{{ for a brace") from error
    if unknown := sorted(used - set(form.names)):
        raise DataError(f"prompt_template has unknown fields {unknown}: format {name} has {', '.join(form.names)}")
    if missing := sorted(set(form.fields) - used):
        raise DataError(f"prompt_template {template!r} leaves out {missing}: put {{{missing[0]}}} into it")


class _EmptyFieldError(Exception):
    """A row has an empty prompt or answer."""


def _read_fields(row: Row, name: str, columns: Mapping[str, str]) -> Record:
    form = FORMATS[name]
    fields = {key: _text(row, columns.get(key, key), name) for key in form.fields}
    if form.optional:
        fields[form.optional] = _text(row, columns.get(form.optional, form.optional), name, optional=True)
    answer = _text(row, columns.get(form.answer, form.answer), name, number=name == "classification")
    return Record(fields=fields, answer=answer, origin=row.origin)


def _text(row: Row, column: str, name: str, optional: bool = False, number: bool = False) -> str:
    """The text of a column, without surrounding white space; integers count where `number` says so."""
    value: Any = row.values.get(column)
    if value is None and optional:
        return ""
    if column not in row.values:
        raise DataError(
            f"{row.origin}: field {column!r} is missing (the row has {', '.join(map(str, row.values)) or 'none'}); "
            f"check format={name}, or name the file's column in `columns`"
        )
    if number and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.origin}: field {column!r} must be text, got {str(value)[:60]!r}; correct the row")
    text = (value or "").replace("\r\n", "\n").strip()
    if not text and not optional:
        raise _EmptyFieldError(f"field {column!r} is empty")
    return text


def _read_messages(row: Row, name: str, columns: Mapping[str, str]) -> Record:
    column = columns.get("messages", "messages")
    turns = row.values.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"{row.origin}: field {column!r} must be a list of messages with role and content "
            f"(the row has {', '.join(map(str, row.values)) or 'none'}); check format={name}"
        )
    messages = []
    for number, turn in enumerate(turns, 1):
        at = Row(turn, f"{row.origin}, message {number}")
        role = _text(at, "role", name)
        if role not in ROLES:
            raise DataError(f"{at.origin}: role {role!r} is unknown; use {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise DataError(f"{at.origin}: a system message must come first; move it")
        messages.append((role, _text(at, "content", name)))
    roles = [role for role, _ in messages]
    if not roles or roles[-1] != "assistant":
        raise _EmptyFieldError("the conversation does not end with an assistant's message, so there is no answer")
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(f"{row.origin}: the assistant speaks before any user; put a user message first")
    return Record(messages=tuple(messages), origin=row.origin)
