"""From text to labelled tokens: what is learned, what is cut where the context is too short, and a cache of it all."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from language.data.formats import Record
from language.data.templates import Example, Piece, Renderer
from language.loss import IGNORED
from lit_adapters.errors import DataError
from lit_adapters.files.atomic import write_atomically

_CACHE_VERSION = 2  # of the rules below: a new one makes older cached files unused
_CHUNK = 256  # records tokenised at a time


@dataclass(frozen=True)
class Documents:
    """Tokenised records, end to end.

    Attributes:
        input_ids: int32, shape (total tokens,).
        learned: Whether a token is learned, bool, shape (total tokens,); false for the first of each document.
        offsets: Where documents begin, and the end, int64, shape (documents + 1,).
        dropped: Records that are missing because no learned token fits.
        cut: Documents that lost tokens to ``max_length``.
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


class Encoder:
    """Turns text into tokens as training and generation both need them.

    Pieces are tokenised one by one, so that a prompt has the tokens here which it has when a model is to answer it.
    A beginning token is put before plain prompts if the tokenizer does so; chat templates bring their own. A document
    whose last token is not the end token gets it appended, learned.

    Where the format has a body (dialogue or text), a prompt longer than ``max_length - max_answer_length`` loses the
    beginning of its body, and an answer longer than ``max_answer_length`` its end. The room of a prompt does not depend
    on its answer: else the length of a shortened prompt would tell that of the answer, in training and in tests. A
    document is dropped if none of the body would be left.

    In other formats a document longer than ``max_length`` loses its end, and is dropped if no learned token is left.

    Args:
        tokenizer: A transformers tokenizer.
        end_id: Id of the token that ends an answer.
        max_length: Most tokens of a document.
        mask_prompt: Learn answers only; otherwise all tokens.
        plain: Whether prompts are plain text rather than rendered by a chat template.
        max_answer_length: Tokens kept for an answer beside a body, the end token included; default a quarter of
            ``max_length``.
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
            DataError: A prompt that does not fit and has no body to shorten.
        """
        ids = self.begin + self._ids([example.prompt])[0]
        room = self._room(example.body)
        if len(ids) > room:
            shorter = self._shorten(example.prompt, example.body, room)
            if shorter is None:
                raise DataError(f"{example.origin}: the prompt has {len(ids)} tokens, over {room}: raise max_length")
            return shorter
        return ids

    def documents(self, records: Sequence[Record], renderer: Renderer, description: str) -> Documents:
        """Tokenise records. Raises what ``Renderer.pieces`` raises."""
        ids: list[Tensor] = []
        learned: list[Tensor] = []
        dropped = cut = 0
        with tqdm(total=len(records), desc=description, unit="rows", delay=1.0) as bar:
            for start in range(0, len(records), _CHUNK):
                chunk = records[start : start + _CHUNK]
                pieces = [renderer.pieces(record) for record in chunk]
                encoded = iter(self._ids([text for document in pieces for text, _ in document]))
                for record, document in zip(chunk, pieces, strict=True):
                    full, flags = self._join(document, encoded)
                    whole = len(full)
                    full, flags = self._cut(full, flags, document[0][0], renderer.body(record))
                    cut += len(full) < whole
                    flags = self._flags(flags)
                    if not any(flags):
                        dropped += 1
                        continue
                    ids.append(torch.tensor(full, dtype=torch.int32))
                    learned.append(torch.tensor(flags))
                bar.update(len(chunk))
        if not ids:
            raise DataError(
                f"{description}: none of {len(records)} rows has room for an answer in max_length={self.max_length} "
                "tokens: raise it"
            )
        offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
        return Documents(torch.cat(ids), torch.cat(learned), offsets, dropped, cut - dropped)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: the model's own maximum is no matter here, max_length is.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _join(self, document: list[Piece], encoded: Iterator[list[int]]) -> tuple[list[int], list[bool]]:
        ids, flags = list(self.begin), [False] * len(self.begin)
        for _, learned in document:
            piece = next(encoded)
            ids += piece
            flags += [learned] * len(piece)
        if ids[-1] != self.end_id:
            ids.append(self.end_id)
            flags.append(True)
        return ids, flags

    def _flags(self, flags: list[bool]) -> list[bool]:
        """The first token of a document has nothing before it to be predicted from."""
        return [False, *(flags[1:] if self.mask_prompt else [True] * (len(flags) - 1))]

    def _room(self, body: str) -> int:
        """Most tokens of a prompt."""
        return self.max_length - self.max_answer_length if body else self.max_length

    def _cut(self, ids: list[int], flags: list[bool], prompt: str, body: str) -> tuple[list[int], list[bool]]:
        """What of a document is kept; nothing where none of its body is."""
        if not body:
            return ids[: self.max_length], flags[: self.max_length]
        start = flags.index(True)
        kept: list[int] | None = ids[:start]
        if start > self._room(body):
            kept = self._shorten(prompt, body, self._room(body))
        if kept is None:
            return [], []
        answer = ids[start:][: self.max_answer_length]
        return kept + answer, [False] * len(kept) + [True] * len(answer)

    def _shorten(self, prompt: str, body: str, room: int) -> list[int] | None:
        """The prompt without the beginning of its body, at most ``room`` tokens; None if none of the body is left."""
        if not body or body not in prompt:
            return None
        # The last occurrence: a template may quote the body's words before it, hardly after.
        head, _, tail = prompt.rpartition(body)
        before, middle, after = self._ids([head, body, tail])
        room -= len(self.begin) + len(before) + len(after)
        return None if room < 1 else self.begin + before + middle[-room:] + after


def tokenise(
    records: Sequence[Record], renderer: Renderer, encoder: Encoder, description: str, cache_dir: Path | None = None
) -> Documents:
    """Tokenise records, or take them from the cache.

    The cache's file is named after everything that the tokens depend on: the rows, all settings, and the tokenizer.
    Of several processes one tokenises and the others wait for it.

    Raises:
        DataError: What ``Encoder.documents`` raises, or a cache folder that cannot be written.
    """
    if cache_dir is None:
        return encoder.documents(records, renderer, description)
    key = repr((_CACHE_VERSION, renderer.settings, encoder.settings, [astuple(record)[:-1] for record in records]))
    file = cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if (cached := _load(file)) is not None:
                return cached
            documents = encoder.documents(records, renderer, description)
            write_atomically(file, lambda path: _save(documents, path))
            return documents
    except OSError as error:
        raise DataError(f"cannot use cache_dir {cache_dir}: {error}; set it to a folder that can be written") from error


def _save(documents: Documents, path: Path) -> None:
    tensors = {"input_ids": documents.input_ids, "learned": documents.learned, "offsets": documents.offsets}
    save_file(tensors, path, {"dropped": str(documents.dropped), "cut": str(documents.cut)})


def _load(file: Path) -> Documents | None:
    """The cached documents; None where there are none, or a torn file."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as tensors:
            ids, learned, offsets = map(tensors.get_tensor, ("input_ids", "learned", "offsets"))
            counts = tensors.metadata()
            return Documents(ids, learned, offsets, int(counts["dropped"]), int(counts["cut"]))
    except SafetensorError:
        return None


def _fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr((type(tokenizer), sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256(state.encode()).hexdigest()
