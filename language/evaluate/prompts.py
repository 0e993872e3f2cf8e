"""Tokens of the prompts and choices of an evaluation, as training would have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from language.data.control import ControlTokens, unguarded
from language.data.stretches import Stretches
from lit_adapters.errors import DataError


@dataclass(frozen=True)
class TokenQuestion:
    """Tokens of a prompt, and of each continuation to choose from; each has at least one."""

    context: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Prompt:
    """A prompt as training tokenises it: answers have their own tokens, whatever the tokenizer would merge.

    Attributes:
        stretches: The prompt's text, guarded as `language.data.control` says.
        lead: The beginning of the answer, which all choices share.
        chat: Whether a chat template has written the prompt; then no start-of-text token is added.
        ending: What follows each choice in training, before its end token.
        end_id: The token that ends each choice; None for none, where choices are no whole answers.
    """

    stretches: tuple[str, ...]
    lead: str = ""
    chat: bool = False
    ending: str = ""
    end_id: int | None = None

    @property
    def text(self) -> str:
        """All that the model reads."""
        return unguarded("".join(self.stretches)) + self.lead


def ended(tokens: list[int], end_id: int) -> list[int]:
    """The tokens of an answer with its end token, as training ends it."""
    return tokens if tokens[-1:] == [end_id] else [*tokens, end_id]


class PromptEncoder:
    """Tokens of prompts and choices; long prompts are truncated on the left and counted.

    Args:
        tokenizer: A tokenizer of transformers. The start-of-text token it would add, and no other, is added.
        max_length: Tokens that a pass may read; None for any number.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated = 0
        self.stretches = Stretches(tokenizer, ControlTokens(tokenizer, tokenizer.eos_token))
        added = tokenizer("").input_ids[:1]
        self.start: list[int] = added if added and added == [tokenizer.bos_token_id] else []

    def prompt(self, prompt: Prompt, room: int = 1) -> list[int]:
        """Tokens of a prompt, at least one, with space for an answer of `room` tokens, the last of them unread.

        Args:
            prompt: The prompt.
            room: Tokens of the longest answer. The model predicts the last one and does not read it.

        Raises:
            DataError: The answer leaves no space, or the prompt is empty and the tokenizer has no start or end token.
        """
        context, (lead,) = self._tokens(prompt, [self.stretches.control.guard(prompt.lead)])
        return self.fit(context + lead, room)

    def question(self, prompt: Prompt, choices: Sequence[str]) -> TokenQuestion:
        """Context and continuations; their concatenations are the tokens of prompt and choice.

        Args:
            prompt: The prompt.
            choices: The texts to choose from.

        Raises:
            DataError: A choice has no tokens, or as `prompt`.
        """
        guard = self.stretches.control.guard
        whole = [guard(prompt.lead + choice) + prompt.ending for choice in choices]
        before, answers = self._tokens(prompt, [guard(prompt.lead), *whole])
        shared = common_prefix(answers)
        _, *continuations = [tokens[shared:] for tokens in answers]
        if prompt.end_id is not None:
            continuations = [ended(tokens, prompt.end_id) for tokens in continuations]
        for choice, tokens in zip(choices, continuations, strict=True):
            if not tokens:
                raise DataError(
                    f"choice {choice!r} after prompt ...{prompt.text[-60:]!r} has no tokens; give it a text"
                )
        return TokenQuestion(self.fit(before + answers[0][:shared], max(map(len, continuations))), continuations)

    def _tokens(self, prompt: Prompt, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of a prompt, and of texts that go on after it, which are guarded."""
        (stretches,) = self.stretches.documents([prompt.stretches])
        context = [token for stretch in stretches for token in stretch]
        following = self.stretches.after(answers, [prompt.stretches[-1]] * len(answers))
        started = prompt.chat or context[:1] == self.start
        return context if started else self.start + context, following

    def fit(self, context: list[int], room: int) -> list[int]:
        """The context, or as much of its end as leaves space for an answer of `room` tokens; counted if truncated.

        Args:
            context: Tokens; none stand for the start or end token.
            room: Tokens of the longest answer. The model predicts the last one and does not read it.

        Raises:
            DataError: As `prompt`.
        """
        if not context:
            # The first token of a text needs something to be predicted from.
            anything = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            context = [token for token in anything if token is not None][:1]
            if not context:
                raise DataError("an empty prompt needs a tokenizer with a start or end token")
        if self.max_length is None or len(context) + room - 1 <= self.max_length:
            return context
        keep = self.max_length - room + 1
        if keep < 1:
            raise DataError(f"{room} tokens after the prompt do not fit into max_length={self.max_length}: raise it")
        self.truncated += 1
        start = self.start if keep > 1 and context[:1] == self.start else []
        return start + context[len(context) - keep + len(start) :]


def common_prefix(rows: Sequence[list[int]]) -> int:
    """Number of leading tokens that all rows share."""
    low, high = min(rows), max(rows)  # in lexicographic order every other row lies between them
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
