"""What a row means: the fields of each format, its prompt, and its answer.

A format turns rows into checked `Record`s: a conversation, or named fields with one answer. `language.data.templates`
writes their text for a tokenizer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from language.data.messages import EmptyFieldError, Message, read_messages, says_unlearned, weighs
from language.data.rows import Row, check_characters, clean, names_of, shown
from lit_adapters.errors import DataError

FormatName = Literal["alpaca", "openorca", "chat", "summarisation", "classification", "pairs"]


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
    """One checked row: named fields with an answer, or the messages of a conversation (then `fields` is empty).

    Attributes:
        fields: The fields of the prompt by name.
        answer: The field to be learned.
        messages: Role and content of each message.
        unlearned: Places of the assistant's messages that are not learned.
        more: Further fields of a message for the chat template, by its place.
        tools: Descriptions of functions for the chat template.
        origin: File and line.
    """

    fields: dict[str, str] = field(default_factory=dict)
    answer: str = ""
    messages: tuple[Message, ...] = ()
    unlearned: tuple[int, ...] = ()
    more: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    origin: str = ""

    @property
    def prompt_key(self) -> str:
        """What records with the same prompt share; these go into the same split."""
        return repr(self.messages[:-1] or sorted(self.fields.items())) + (repr(self.tools) if self.tools else "")


class Parser:
    r"""Checks rows and turns them into records; line ends become `\n`.

    Prompts and classes lose the white space that surrounds them, answers keep it. Rows that say so (`weight: 0`,
    `train: false`, `mask: true`) are not learned: they are left out, and counted in one line.

    Args:
        name: Format of the rows.
        columns: The file's name of a field where it differs: `{"label": "label_name"}`.
        drop_empty: Drop rows whose prompt or answer is empty instead of raising.
        strip_answers: Remove the white space that surrounds answers.

    Attributes:
        empty: Rows that were dropped because they are empty.
    """

    def __init__(
        self,
        name: FormatName,
        columns: Mapping[str, str] | None = None,
        drop_empty: bool = False,
        strip_answers: bool = False,
    ) -> None:
        self.name = name
        self.columns = columns or {}
        self.drop_empty = drop_empty
        self.strip_answers = strip_answers
        self.empty = 0

    def records(self, rows: Iterable[Row]) -> Iterator[Record]:
        """The records of rows, one at a time.

        Raises:
            DataError: A field is missing or not text, a role or a field of a message is unknown, or a prompt or answer
                is empty; the message names file, line and field. Or no record is left.
        """
        first, seen, unlearned, self.empty = None, 0, 0, 0
        weighed = None
        for row in rows:
            first, seen = first or row, seen + 1
            try:
                if self.name == "chat":
                    yield _read_messages(row, self.columns, self.strip_answers)
                elif says_unlearned(row.values, set(self.columns.values())):
                    unlearned += 1
                else:
                    weighed = weighed or weighs(row.values, set(self.columns.values()))
                    yield _read_fields(row, self.name, self.columns, self.strip_answers)
            except EmptyFieldError as error:
                if not self.drop_empty:
                    raise DataError(
                        f"{row.origin}: {error}; correct the row, or set drop_empty to drop such rows"
                    ) from None
                self.empty += 1
        if weighed:
            rank_zero_info(f"Data: field {weighed!r} has values beside 0 and 1, which are ignored: rows count alike.")
        if unlearned:
            rank_zero_info(f"Data: {unlearned} of {seen} rows say that they are not to be learned; left out.")
        if first is not None and unlearned + self.empty == seen:
            raise DataError(
                f"all {seen} rows of {first.origin} and after are empty or not to be learned: check format={self.name}"
            )


def parse(
    rows: Iterable[Row],
    name: FormatName,
    columns: Mapping[str, str] | None = None,
    drop_empty: bool = False,
    strip_answers: bool = False,
) -> tuple[list[Record], int]:
    """Check rows and turn them into records, as `Parser` does.

    Returns:
        The records, and how many rows were dropped because they are empty.

    Raises:
        DataError: As `Parser.records`.
    """
    parser = Parser(name, columns, drop_empty, strip_answers)
    return list(parser.records(rows)), parser.empty


def field_names(name: FormatName) -> tuple[str, ...]:
    """The fields of a format's rows."""
    return ("messages",) if name == "chat" else (*FORMATS[name].names, FORMATS[name].answer)


def check_columns(columns: Mapping[str, str], names: Sequence[str], name: str) -> None:
    """Check the setting `columns`.

    Args:
        columns: The file's name of a field where it differs.
        names: The fields that there are.
        name: What has these fields, for messages.

    Raises:
        DataError: A field is unknown, or the name of a column is empty or stands for two fields.
    """
    if unknown := sorted(set(map(str, columns)) - set(names)):
        near = difflib.get_close_matches(unknown[0], names, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"columns names unknown fields {unknown}: {meant}{name} has {', '.join(names)}")
    for field_name, column in columns.items():
        if not isinstance(column, str) or not column:
            raise DataError(f"columns gives field {field_name!r} the name {shown(column)}: give a column of the file")
    used = [columns.get(field_name, field_name) for field_name in names]
    if twice := sorted({column for column in used if used.count(column) > 1}):
        raise DataError(f"columns gives two fields the column {twice[0]!r}: each field needs a column of its own")


def check_template(template: str, form: Format, name: str) -> None:
    """Check the fields of a prompt template.

    Raises:
        DataError: A required field is missing in it, a field is unknown, or the braces do not match.
    """
    check_characters(template, "prompt_template")
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"prompt_template {template!r} is malformed ({error}): write {{{{ for a brace") from error
    used = {str(name) for _, name, _, _ in parts}
    if any(width or conversion for _, _, width, conversion in parts):
        raise DataError(f"prompt_template {template!r} formats a field: put nothing but its name into the braces")
    if unknown := sorted(used - set(form.names)):
        raise DataError(f"prompt_template has unknown fields {unknown}: format {name} has {', '.join(form.names)}")
    if missing := sorted(set(form.fields) - used):
        raise DataError(f"prompt_template {template!r} leaves out {missing}: put {{{missing[0]}}} into it")


def _read_fields(row: Row, name: str, columns: Mapping[str, str], strip_answers: bool) -> Record:
    form = FORMATS[name]
    fields = {key: _text(row, columns.get(key, key), name).strip() for key in form.fields}
    if form.optional:
        optional = columns.get(form.optional, form.optional)
        fields[form.optional] = _text(row, optional, name, optional=True).strip()
    is_class = name == "classification"
    answer = _text(row, columns.get(form.answer, form.answer), name, number=is_class)
    return Record(fields=fields, answer=answer.strip() if strip_answers or is_class else answer, origin=row.origin)


def _text(row: Row, column: str, name: str, optional: bool = False, number: bool = False) -> str:
    """The text of a column; integers count where `number` says so."""
    value: Any = row.values.get(column)
    if value is None and optional:
        return ""
    if column not in row.values:
        raise DataError(
            f"{row.origin}: field {column!r} is missing (the row has {names_of(row.values)}); "
            f"check format={name}, or name the file's column in `columns`"
        )
    if number and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.origin}: field {column!r} must be text, got {shown(value)}; correct the row")
    text = clean(value or "", f"{row.origin}: field {column!r}")
    if not text.strip() and not optional:
        raise EmptyFieldError(f"field {column!r} is empty")
    return text


def _read_messages(row: Row, columns: Mapping[str, str], strip_answers: bool) -> Record:
    read = read_messages(row, columns.get("messages", "messages"))
    messages = read.messages
    if strip_answers:
        messages = tuple((role, content.strip()) for role, content in messages)
    return Record(messages=messages, unlearned=read.unlearned, more=read.more, tools=read.tools, origin=row.origin)
