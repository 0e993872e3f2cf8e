"""Tokens of the prompts and choices of an evaluation: as training frames them, or as a benchmark writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from language.data.control import ControlTokens
from language.data.stretches import Stretches
from lit_adapters.errors import DataError


@dataclass(frozen=True)
class TokenQuestion:
    """Tokens of a prompt, and of each continuation to choose from; each has at least one."""

    context: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class FramedPrompt:
    """A prompt as training tokenises it: answers have their own tokens, whatever the tokenizer would merge.

    Attributes:
        stretches: The prompt's text, guarded as `language.data.control` says.
        lead: The beginning of the answer, which all choices share.
        chat: Whether a chat template has written the prompt; then no start-of-text token is added.
    """

    stretches: tuple[str, ...]
    lead: str = ""
    chat: bool = False


class PromptEncoder:
    """Tokens of prompts and choices; long prompts are truncated on the left and counted.

    A choice of a framed prompt is tokenised as an answer in training. A choice of a plain text has the tokens of
    prompt + choice after the longest prefix that the prompt shares with prompt + every choice: where a tokeniser merges
    the end of the prompt with the start of a choice, whole tokens are scored, for all choices of that prompt from the
    same token on, so that the sums still compare like with like.

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

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, after the start-of-text token unless the text begins with it in writing."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [self._started(row) for row in rows]

    def prompt(self, text: str | FramedPrompt, room: int = 1) -> list[int]:
        """Tokens of a prompt, at least one, with space for an answer of `room` tokens, the last of them unread.

        Args:
            text: The prompt.
            room: Tokens of the longest answer. The model predicts the last one and does not read it.

        Raises:
            DataError: The answer leaves no space, or the prompt is empty and the tokenizer has no start or end token.
        """
        if isinstance(text, str):
            return self.fit(self.tokens([text])[0], room)
        context, (lead,) = self._framed(text, [text.lead])
        return self.fit(context + lead, room)

    def question(self, prompt: str | FramedPrompt, choices: Sequence[str]) -> TokenQuestion:
        """Context and continuations; their concatenations are the tokens of prompt and choice.

        Args:
            prompt: The prompt.
            choices: The texts to choose from.

        Raises:
            DataError: A choice has no tokens, or as `prompt`.
        """
        if isinstance(prompt, str):
            alone, *whole = self.tokens([prompt, *(prompt + choice for choice in choices)])
        else:
            before, (lead, *answers) = self._framed(prompt, [prompt.lead, *(prompt.lead + c for c in choices)])
            alone, whole = before + lead, [before + answer for answer in answers]
        shared = common_prefix([alone, *whole])
        continuations = [tokens[shared:] for tokens in whole]
        for choice, tokens in zip(choices, continuations, strict=True):
            if not tokens:
                end = prompt[-60:] if isinstance(prompt, str) else prompt.stretches[-1][-60:]
                raise DataError(f"choice {choice!r} after prompt ...{end!r} has no tokens; give it a text")
        return TokenQuestion(self.fit(alone[:shared], max(map(len, continuations))), continuations)

    def _framed(self, prompt: FramedPrompt, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of a prompt, and of texts that go on after it."""
        (stretches,) = self.stretches.documents([prompt.stretches])
        context = [token for stretch in stretches for token in stretch]
        following = self.stretches.after(
            [self.stretches.control.guard(answer) for answer in answers], [prompt.stretches[-1]] * len(answers)
        )
        return context if prompt.chat else self._started(context), following

    def _started(self, row: list[int]) -> list[int]:
        return row if row[:1] == self.start else self.start + row

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
