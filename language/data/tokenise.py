"""From text to labelled tokens: what is learned, and what is cut where the context is too short."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from language.data.control import ControlTokens
from language.data.formats import Record
from language.data.stretches import Stretches
from language.data.templates import Example, Piece, Renderer
from language.loss import IGNORED
from lit_adapters.errors import DataError

RULES = 3  # bump it when the rules below change: cached files of other versions are not used
_CHUNK = 256  # records tokenised at a time
_CHECKED = 8  # rows whose prompts are compared with those of evaluation


@dataclass(frozen=True)
class Documents:
    """Tokenised records, end to end.

    Attributes:
        input_ids: Token ids, int32, shape (total tokens,).
        learned: Whether a token is learned, bool, shape (total tokens,); false for the first of each document.
        offsets: Where documents begin, and the end, int64, shape (documents + 1,).
        dropped: Records that are missing because no learned token fits.
        cut: Documents that lost tokens to `max_length`.
    """

    input_ids: Tensor
    learned: Tensor
    offsets: Tensor
    dropped: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document, int64, shape (documents,)."""
        return self.offsets.diff()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels of a document, int64, shape (length,); labels are -100 where nothing is learned."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        ids = self.input_ids[span].long()
        return ids, ids.where(self.learned[span], IGNORED)


@dataclass
class Counts:
    """How tokenising changed records.

    Attributes:
        dropped: Records that are missing because no learned token fits.
        cut: Documents that lost tokens to `max_length`.
    """

    dropped: int = 0
    cut: int = 0


class Labelled(NamedTuple):
    """One tokenised document.

    Attributes:
        ids: Token ids, (n,); empty where nothing is left.
        learned: Whether each token is learned, (n,).
        cut: Whether the document lost tokens.
    """

    ids: list[int]
    learned: list[bool]
    cut: bool


class Encoder:
    """Turns text into tokens as training and generation both need them.

    Pieces are tokenised one by one, as `language.data.stretches` says, so that a prompt has the same tokens here as
    when a model is to answer it. A beginning token stands before plain prompts if the tokenizer puts one there and the
    prompt does not begin with it; chat templates bring their own. A document that does not end with the end token gets
    one, which is learned.

    Where the format has a body (dialogue or text), a prompt longer than `max_length - max_answer_length` loses the
    beginning of its body, and an answer longer than `max_answer_length` its end. The room of a prompt does not depend
    on its answer; otherwise the length of a shortened prompt would betray the length of the answer. A document is
    dropped if none of the body would be left.

    In other formats a document longer than `max_length` loses its end, and is dropped if no learned token is left.

    Args:
        tokenizer: A transformers tokenizer.
        end_id: Id of the token that ends an answer.
        max_length: Most tokens of a document.
        mask_prompt: Whether to learn answers only; otherwise all tokens.
        plain: Whether prompts are plain text rather than rendered by a chat template.
        max_answer_length: Tokens kept for an answer beside a body, the end token included; default a quarter of
            `max_length`.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_id: int,
        max_length: int,
        mask_prompt: bool,
        plain: bool,
        max_answer_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.max_length = max_length
        self.mask_prompt = mask_prompt
        self.max_answer_length = max(1, max_length // 4) if max_answer_length is None else max_answer_length
        control = ControlTokens(tokenizer, tokenizer.convert_ids_to_tokens(end_id))
        self.stretches = Stretches(tokenizer, control)
        begin = tokenizer.bos_token_id
        self.begin = [begin] if plain and begin is not None and tokenizer("a")["input_ids"][0] == begin else []

    @property
    def settings(self) -> tuple:
        """Everything but the text that the tokens depend on."""
        return (
            _fingerprint(self.tokenizer),
            self.end_id,
            self.max_length,
            self.max_answer_length,
            self.mask_prompt,
            self.begin,
        )

    def prompt(self, example: Example) -> list[int]:
        """Tokens of a prompt to be answered, equal to those it has in training.

        Raises:
            DataError: The prompt does not fit and has no body to shorten.
        """
        (tokens,) = self.stretches.documents([example.stretches or (example.prompt,)])
        ids = self.begun([token for stretch in tokens for token in stretch])
        room = self._room(example.body)
        if len(ids) > room:
            shorter = self._shorten("".join(example.stretches or (example.prompt,)), example.body, room)
            if shorter is None:
                raise DataError(f"{example.origin}: the prompt has {len(ids)} tokens, over {room}: raise max_length")
            return shorter
        return ids

    def documents(self, records: Sequence[Record], renderer: Renderer, description: str) -> Documents:
        """Tokenise records.

        Raises:
            DataError: As `each_document`.
        """
        counts = Counts()
        ids: list[Tensor] = []
        learned: list[Tensor] = []
        for document in self.each_document(records, renderer, description, counts, len(records)):
            ids.append(torch.tensor(document.ids, dtype=torch.int32))
            learned.append(torch.tensor(document.learned))
        offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
        return Documents(torch.cat(ids), torch.cat(learned), offsets, counts.dropped, counts.cut)

    def each_document(
        self,
        records: Iterable[Record],
        renderer: Renderer,
        description: str,
        counts: Counts,
        total: int | None = None,
    ) -> Iterator[Labelled]:
        """Tokenise records, a few at a time, without those that have no room for an answer.

        Args:
            records: The records.
            renderer: Writes their text.
            description: Of the progress bar.
            counts: Is filled as records are read.
            total: How many records there are, for the progress bar.

        Raises:
            DataError: No record has room for an answer, or as `Renderer.pieces`.
        """
        number = 0
        remaining = iter(records)
        with tqdm(total=total, desc=description, unit="rows", delay=1.0) as bar:
            while chunk := list(islice(remaining, _CHUNK)):
                pieces = [renderer.pieces(record) for record in chunk]
                encoded = self.stretches.documents([piece.text for piece in document] for document in pieces)
                for record, document, tokens in zip(chunk, pieces, encoded, strict=True):
                    labelled = self.labelled(document, tokens, renderer.body(record))
                    if number < _CHECKED and not labelled.cut:
                        self._check(renderer.example(record), labelled)
                    number += 1
                    if any(labelled.learned):
                        counts.cut += labelled.cut
                        yield labelled
                    else:
                        counts.dropped += 1
                bar.update(len(chunk))
        if counts.dropped == number:
            raise DataError(
                f"{description}: none of {number} rows has room for an answer in max_length={self.max_length} "
                "tokens: raise it"
            )

    def labelled(self, pieces: Sequence[Piece], tokens: Sequence[list[int]], body: str = "") -> Labelled:
        """The label rule: which tokens of a document are there, and which of them are learned.

        Args:
            pieces: Texts of the document in order.
            tokens: Their token ids.
            body: The part of the prompt that may lose its beginning; "" for none.
        """
        ids = [token for piece in tokens for token in piece]
        begin = self.begin if ids[: len(self.begin)] != self.begin else []
        ids = begin + ids  # (n,)
        learned = [False] * len(begin)
        masked = [False] * len(begin)
        for piece, stretch in zip(pieces, tokens, strict=True):
            learned += [piece.is_answer] * len(stretch)  # (n,) in the end
            masked += [piece.masked] * len(stretch)
        if ids[-1] != self.end_id:
            last = pieces[-1].masked
            ids, learned, masked = [*ids, self.end_id], [*learned, not last], [*masked, last]  # (n + 1,)
        whole = len(ids)
        ids, learned = self._fit(ids, learned, pieces[0].text, body)  # (m,), m <= max_length
        if not self.mask_prompt:
            learned = [not is_masked for is_masked in masked[: len(ids)]]
        learned = [False, *learned[1:]]  # nothing stands before the first token to predict it from
        return Labelled(ids, learned, cut=len(ids) < whole)

    def begun(self, ids: list[int]) -> list[int]:
        """The tokens after a beginning token, unless they begin with it."""
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def _check(self, example: Example, labelled: Labelled) -> None:
        """Check on a real row that training and evaluation see the same prompt.

        Raises:
            DataError: They do not.
        """
        prompt = self.prompt(example)
        if labelled.ids[: len(prompt)] != prompt:
            raise DataError(
                f"{example.origin}: the row does not begin with the tokens of its own prompt: the tokenizer "
                f"{self.tokenizer.name_or_path!r} gives one text different tokens; use another tokenizer"
            )

    def _room(self, body: str) -> int:
        """Most tokens of a prompt."""
        return self.max_length - self.max_answer_length if body else self.max_length

    def _fit(self, ids: list[int], learned: list[bool], prompt: str, body: str) -> tuple[list[int], list[bool]]:
        """What max_length leaves of a document, and which of it is learned; nothing where none of the body is left."""
        if not body:
            return ids[: self.max_length], learned[: self.max_length]
        start = learned.index(True)
        kept: list[int] | None = ids[:start]
        if start > self._room(body):
            kept = self._shorten(prompt, body, self._room(body))
        if kept is None:
            return [], []
        answer = ids[start:][: self.max_answer_length]
        return kept + answer, [False] * len(kept) + [True] * len(answer)

    def _shorten(self, prompt: str, body: str, room: int) -> list[int] | None:
        """The prompt without the beginning of its body, at most `room` tokens; None if none of the body is left."""
        if not body or body not in prompt:
            return None
        # The last occurrence: a template may quote the body's words before it, hardly after.
        head, _, tail = prompt.rpartition(body)
        ((before, middle, after),) = self.stretches.documents([(head, body, tail)])
        before = self.begun(before)
        room -= len(before) + len(after)
        return None if room < 1 else before + middle[-room:] + after


def _fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    state = backend.to_str() if backend is not None else repr((type(tokenizer), sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256(f"{special}{state}".encode()).hexdigest()
