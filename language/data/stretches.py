"""Tokens of the stretches that a document is made of: prompt, answer, prompt, answer.

A tokenizer may merge the end of a prompt with the start of an answer. So each stretch is tokenised apart from what
follows it: prompt and answer together begin with the tokens of the prompt alone. Tokenizers that put a space before a
text put none before a stretch in the middle of a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from language.data.control import ControlTokens, unguarded
from language.data.rows import MARK
from lit_adapters.errors import DataError

# What a stretch is tokenised after, to see its tokens in the middle of a text: the first whose own tokens stay.
_ANCHORS = ("\n", ":\n", ":", "a")


class Stretches:
    """Turns stretches of text into tokens.

    Args:
        tokenizer: A transformers tokenizer.
        control: Its control tokens.
    """

    def __init__(self, tokenizer: Any, control: ControlTokens) -> None:
        self.tokenizer = tokenizer
        self.control = control
        # Whether the beginning of a text has other tokens than the same words within a text.
        joined, start, end = self._plain(["a\na", "a\n", "a"])
        self.prefixes = joined != start + end

    def documents(self, documents: Iterable[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each stretch of each document; texts may be guarded, see `ControlTokens`.

        Raises:
            DataError: The tokenizer takes guarded text for a control token.
        """
        listed = [list(document) for document in documents]
        before: list[str] = []
        for document in listed:
            before += [next((text for text in reversed(document[:i]) if text), "") for i in range(len(document))]
        tokens = iter(self.after([text for document in listed for text in document], before))
        return [[next(tokens) for _ in document] for document in listed]

    def after(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, each after another text.

        Args:
            texts: The texts; they may be guarded.
            before: What stands before each of them, as many; "" for nothing.

        Raises:
            DataError: As `documents`.
        """
        if not self.prefixes:
            tokens = self._plain([unguarded(text) for text in texts])
        else:
            tokens = self._anchored([unguarded(text) for text in texts], before)
        for i, text in enumerate(texts):
            if MARK in text:
                tokens[i] = self._guarded(text, before[i])
        return tokens

    def _plain(self, texts: list[str], **options: Any) -> list[list[int]]:
        # verbose=False: transformers would warn of the tokenizer's own maximum, where max_length counts.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, **options)["input_ids"] if texts else []

    def _anchored(self, texts: Sequence[str], before: Sequence[str], **options: Any) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        anchors = [((end,) if (end := self.control.ends(text)) else _ANCHORS) if text else () for text in before]
        for number in range(len(_ANCHORS)):
            waiting = [i for i in range(len(texts)) if i not in found and number < len(anchors[i])]
            joined = self._plain([anchors[i][number] + texts[i] for i in waiting], **options)
            alone = dict(zip(_used := sorted({anchors[i][number] for i in waiting}), self._plain(_used), strict=True))
            for i, tokens in zip(waiting, joined, strict=True):
                anchor = alone[anchors[i][number]]
                if tokens[: len(anchor)] == anchor:
                    found[i] = tokens[len(anchor) :]
        rest = [i for i in range(len(texts)) if i not in found]
        found |= zip(rest, self._plain([texts[i] for i in rest], **options), strict=True)
        return [found[i] for i in range(len(texts))]

    def _guarded(self, text: str, before: str) -> list[int]:
        tokens: list[int] = []
        for section in self.control.sections(text):
            if section in self.control.ids:
                tokens.append(self.control.ids[section])
            elif MARK in section:
                tokens += self._as_text(section, before)
            else:
                tokens += self._one(section, before)
            before = section
        return tokens

    def _as_text(self, section: str, before: str) -> list[int]:
        """Tokens of guarded text without a control token of the template."""
        tokens = self._one(unguarded(section), before, split_special_tokens=True)
        if not self.control.reserved.intersection(tokens):
            return tokens
        tokens = []  # the vocabulary itself spells a control token: cut each spelling in two
        for part in filter(None, section.split(MARK)):
            tokens += self._one(part, before, split_special_tokens=True)
            before = part
        if self.control.reserved.intersection(tokens):
            raise DataError(
                f"tokenizer {self.tokenizer.name_or_path!r} takes a part of {unguarded(section)[:60]!r} for a control "
                "token, whatever stands around it: change the row"
            )
        return tokens

    def _one(self, text: str, before: str, **options: Any) -> list[int]:
        return (self._anchored([text], [before], **options) if self.prefixes else self._plain([text], **options))[0]
