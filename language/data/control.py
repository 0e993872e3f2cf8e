"""Text that spells a control token stays text: in a row `</s>` is four characters, in a template the end token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from language.data.rows import MARK

T = TypeVar("T")


class ControlTokens:
    """The control tokens of a tokenizer, and how to tell those of a template from text that spells one.

    A row's text is guarded before a template is applied: a mark breaks each spelling of a control token. Every
    control token that is left comes from the template. `unguarded` takes the marks out.

    Args:
        tokenizer: A transformers tokenizer.
        end_token: The token that ends an answer, which need not be one of the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, end_token: str | None = None) -> None:
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        special = {str(name) for name, token in added.items() if token.special} | set(tokenizer.all_special_tokens)
        if end_token in added:
            special.add(str(end_token))
        names = {name for name in special if len(name) > 1}
        self.ids: Mapping[str, int] = {name: tokenizer.convert_tokens_to_ids(name) for name in sorted(names)}
        unknown = tokenizer.unk_token_id  # also stands for characters that have no token
        self.reserved = {index for index in self.ids.values() if index != unknown}
        self._strips = {name: (added[name].lstrip, added[name].rstrip) for name in names & added.keys()}
        longest_first = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if names else None

    def guard(self, text: str) -> str:
        """The text with a mark within each spelling of a control token."""
        while self._pattern is not None and self._pattern.search(text):
            text = self._pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], text)
        return text

    def guarded(self, record: T, **texts: str) -> T:
        """A record (a dataclass) with guarded texts; itself where nothing is to be guarded.

        Args:
            record: The record.
            texts: Further attributes of it, by name.
        """
        found: dict[str, Any] = {name: self.guard(text) for name, text in texts.items()}
        found["fields"] = {name: self.guard(text) for name, text in record.fields.items()}  # type: ignore[attr-defined]
        found["messages"] = tuple(
            (role, self.guard(text))
            for role, text in record.messages  # type: ignore[attr-defined]
        )
        found |= {name: self._within(getattr(record, name)) for name in ("more", "tools")}
        changed = any(getattr(record, name) != value for name, value in found.items())
        return replace(record, **found) if changed else record  # type: ignore[type-var]

    def _within(self, value: Any) -> Any:
        """A plain value with guarded texts."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, Mapping):
            return {self._within(key): self._within(inner) for key, inner in value.items()}
        return type(value)(map(self._within, value)) if isinstance(value, (list, tuple)) else value

    def sections(self, text: str) -> list[str]:
        """The text's control tokens and what stands between them, in order."""
        parts = re.split(f"({self._pattern.pattern})", text) if self._pattern is not None else [text]
        for i in range(1, len(parts), 2):  # tokens that take in the white space beside them
            left, right = self._strips.get(parts[i], (False, False))
            parts[i - 1] = parts[i - 1].rstrip() if left else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if right else parts[i + 1]
        return [part for part in parts if part]

    def ends(self, text: str) -> str:
        """The control token that a text ends with; "" for none."""
        return next((name for name in self.ids if text.endswith(name)), "")


def unguarded(text: str) -> str:
    """The text without the marks of `ControlTokens.guard`."""
    return text.replace(MARK, "")
