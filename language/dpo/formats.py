"""What a row of preferences means: its prompt, the chosen answer and the rejected one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from language.data.formats import Record
from language.data.messages import Message, read_message, says_unlearned
from language.data.rows import Row, clean, names_of, shown
from lit_adapters.errors import DataError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
DIALOGUE = "\n\nHuman: {prompt}\n\nAssistant:"  # how a plain dialogue of one turn is written
_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True)
class Pair(Record):
    """A record whose answer is the chosen one, with the rejected answer to the same prompt."""

    rejected: str = ""

    @property
    def other(self) -> Pair:
        """The same with the answers exchanged."""
        messages = (*self.messages[:-1], ("assistant", self.rejected)) if self.messages else ()
        return replace(self, answer=self.rejected, messages=messages, rejected=self.answer)

    @property
    def plain_prompt(self) -> str:
        r"""The prompt for models without a chat template: as it is, or a dialogue in `\n\nHuman: ` turns."""
        if not self.messages:
            return self.fields["prompt"]
        turns = "".join(f"\n\n{_NAMES[role]}: {content}" for role, content in self.messages[:-1])
        return f"{turns}\n\nAssistant:"


class _UnusableError(Exception):
    """A well-formed row that holds no preference."""


def read_pairs(
    rows: Sequence[Row], drop_unusable: bool = False, strip_answers: bool = False
) -> tuple[list[Pair], Counter[str]]:
    r"""Check rows and turn them into pairs.

    `chosen` and `rejected` are answers to `prompt`, or whole dialogues whose shared beginning is the prompt.
    Dialogues are text of `\n\nHuman: ` and `\n\nAssistant: ` turns (`prompt` too may be one, up to its last
    `\n\nAssistant:`), or lists of messages with role and content; a list with one assistant's message is an answer.

    Args:
        rows: The rows.
        drop_unusable: Drop rows without a preference instead of raising: an empty prompt or answer, equal answers, no
            shared prompt, a dialogue that does not end with an answer.
        strip_answers: Remove the white space that surrounds answers.

    Returns:
        The pairs, and how many rows were dropped for which reason.

    Raises:
        DataError: A field is missing or badly formed, a row holds no preference, or no pair is left; the message names
            file and line.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if says_unlearned(row.values, set()):
            dropped["the row says that it is not to be learned"] += 1
            continue
        try:
            pair = _read(row)
            pairs.append(_stripped(pair) if strip_answers else pair)
        except _UnusableError as reason:
            if not drop_unusable:
                raise DataError(
                    f"{row.origin}: {reason}; correct the row, or set drop_unusable to drop such rows"
                ) from None
            dropped[str(reason)] += 1
    if not pairs:
        raise DataError(f"none of {len(rows)} rows of {rows[0].origin} and after holds a preference: {_words(dropped)}")
    return pairs, dropped


def _stripped(pair: Pair) -> Pair:
    """The pair without the white space that surrounds its answers."""
    answer = pair.answer.strip()
    messages = (*pair.messages[:-1], ("assistant", answer)) if pair.messages else ()
    return replace(pair, answer=answer, messages=messages, rejected=pair.rejected.strip())


def _words(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in dropped.items())


def _read(row: Row) -> Pair:
    chosen, rejected = (_side(row, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        pair = _answers(row, chosen, rejected)
    elif isinstance(chosen, tuple) and isinstance(rejected, tuple):
        pair = _dialogues(row, chosen, rejected)
    else:
        raise DataError(
            f"{row.origin}: one of 'chosen' and 'rejected' is a whole dialogue and the other an answer; give two of "
            "the same kind"
        )
    for name, text in (("chosen", pair.answer), ("rejected", pair.rejected)):
        if not text:
            raise _UnusableError(f"field {name!r} has no answer")
    if pair.answer.strip() == pair.rejected.strip():
        raise _UnusableError("chosen and rejected are equal")
    return pair


def _answers(row: Row, chosen: str, rejected: str) -> Pair:
    """A pair of two answers beside their prompt."""
    if "prompt" not in row.values:
        raise DataError(
            f"{row.origin}: field 'prompt' is missing, and chosen and rejected are no dialogues that begin with it"
        )
    prompt = _side(row, "prompt")
    if isinstance(prompt, str):
        if not prompt:
            raise _UnusableError("field 'prompt' is empty")
        return Pair(fields={"prompt": prompt}, answer=chosen, origin=row.origin, rejected=rejected)
    turns = prompt[:-1] if prompt and prompt[-1] == ("assistant", "") else prompt
    if not turns:
        raise _UnusableError("field 'prompt' is empty")
    if turns[-1][0] == "assistant":
        raise _UnusableError("the prompt ends with an assistant's message, so there is nothing to answer")
    messages = (*turns, ("assistant", chosen))
    return Pair(answer=chosen, messages=messages, origin=row.origin, rejected=rejected)


def _dialogues(row: Row, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Pair:
    """A pair of two dialogues that differ in their last message."""
    if chosen[-1][0] != "assistant" or rejected[-1][0] != "assistant":
        raise _UnusableError("a dialogue does not end with an assistant's message, so there is no answer")
    if chosen[:-1] != rejected[:-1]:
        raise _UnusableError("chosen and rejected have different prompts")
    if len(chosen) == 1:
        raise _UnusableError("the dialogues have no prompt")
    return Pair(answer=chosen[-1][1], messages=chosen, origin=row.origin, rejected=rejected[-1][1])


def _side(row: Row, name: str) -> str | tuple[Message, ...]:
    """A field as text, or as the messages of a dialogue."""
    if name not in row.values:
        raise DataError(
            f"{row.origin}: field {name!r} is missing (the row has {names_of(row.values)}); rows "
            "of preferences hold prompt, chosen and rejected"
        )
    value: Any = row.values[name]
    if value is None:
        return ""
    if isinstance(value, str):
        text = clean(value, f"{row.origin}: field {name!r}")
        if not _TURN.match(text):
            return text if name != "prompt" and text.strip() else text.strip()
        parts = _TURN.split(text)[1:]
        turns = [(_ROLES[who], said) for who, said in zip(parts[::2], parts[1::2], strict=True)]
        # The space after the colon belongs to the form of the dialogue; that at the end of the last turn to its text.
        (role, said) = turns[-1]
        return (*((who, words.strip()) for who, words in turns[:-1]), (role, _answer(said)))
    if not isinstance(value, list):
        raise DataError(
            f"{row.origin}: field {name!r} must be text or a list of messages, got {shown(value)}; correct the row"
        )
    turns_read = [read_message(turn, f"{row.origin}, {name}, message {i}") for i, turn in enumerate(value, 1)]
    if not turns_read:
        return ""
    if name != "prompt" and not turns_read[-1][2]:
        raise _UnusableError(f"the answer in field {name!r} is not to be learned")
    last = len(turns_read) - 1
    messages = tuple(
        (role, content if i == last and role == "assistant" and content.strip() else content.strip())
        for i, (role, content, _) in enumerate(turns_read)
    )
    return messages[0][1] if last == 0 and messages[0][0] == "assistant" else messages


def _answer(text: str) -> str:
    """The text of a dialogue's last turn; "" where it is nothing but white space."""
    return text.removeprefix(" ") if text.strip() else ""
