"""Files of tokens: kept for the next run, and mapped where the data are larger than memory.

They are our own, not those of `datasets`: their names hold what the tokens depend on (rows, templates, the state of the
tokenizer, the version of the rules), so that a changed row or template is never read from an old file.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from language.data.formats import Record
from language.data.templates import Renderer
from language.data.tokenise import RULES, Counts, Documents, Encoder
from lit_adapters.errors import DataError
from lit_adapters.files.atomic import write_atomically


@dataclass(frozen=True)
class MappedDocuments(Documents):
    """Documents of a file, which the system reads as they are used. Another process maps the file, too.

    Attributes:
        file: The file.
    """

    file: Path = Path()

    def __reduce__(self) -> tuple:
        return _load, (self.file,)


def tokenise(
    records: Sequence[Record], renderer: Renderer, encoder: Encoder, description: str, cache_dir: Path | None = None
) -> Documents:
    """Tokenise records, or take them from a file of an earlier run.

    The file is named after everything that the tokens depend on: the rows, all settings, and the tokenizer. Of several
    processes one tokenises and the others wait for it.

    Raises:
        DataError: The cache folder cannot be written; or as `Encoder.documents`.
    """
    if cache_dir is None:
        return encoder.documents(records, renderer, description)
    key = (renderer.settings, encoder.settings, [astuple(record)[:-1] for record in records])
    return _kept(cache_dir, key, lambda _: encoder.documents(records, renderer, description))


def tokenise_on_disk(
    records: Iterable[Record],
    origin: object,
    renderer: Renderer,
    encoder: Encoder,
    description: str,
    cache_dir: Path,
) -> Documents:
    """As `tokenise`, without ever holding all records or all tokens in memory.

    Writing takes twice the place of the file for a moment.

    Args:
        records: The records, read one at a time.
        origin: What tells these records from others.
        renderer: Writes their text.
        encoder: Turns the text into tokens.
        description: Of the progress bar.
        cache_dir: Where the file is kept.

    Raises:
        DataError: As `tokenise`.
    """

    def write(folder: Path) -> Documents:
        counts = Counts()
        paths = [folder / name for name in ("input_ids", "learned", "lengths")]
        with paths[0].open("wb") as ids, paths[1].open("wb") as learned, paths[2].open("wb") as lengths:
            for document in encoder.each_document(records, renderer, description, counts):
                ids.write(np.asarray(document.ids, np.int32).tobytes())
                learned.write(np.asarray(document.learned, np.bool_).tobytes())
                lengths.write(np.int64(len(document.ids)).tobytes())
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), _mapped(paths[2], torch.int64).cumsum(0)])
        return Documents(
            _mapped(paths[0], torch.int32), _mapped(paths[1], torch.bool), offsets, counts.dropped, counts.cut
        )

    return _kept(cache_dir, ("on disk", origin, renderer.settings, encoder.settings), write)


def _kept(cache_dir: Path, key: object, make: Callable[[Path], Documents]) -> Documents:
    """The documents in the file of a key.

    Args:
        cache_dir: Where the file is kept.
        key: What the tokens depend on.
        make: Makes the documents where there is no file; it gets a folder for temporary files.

    Raises:
        DataError: The folder cannot be used.
    """
    name = hashlib.sha256(repr((RULES, *key)).encode()).hexdigest()[:32]  # type: ignore[misc]
    file, scratch = cache_dir / f"{name}.safetensors", cache_dir / f".{name}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            kept = _load(file)
            if kept is None:
                shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
                scratch.mkdir()
                try:
                    documents = make(scratch)
                    write_atomically(file, partial(_save, documents))
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                kept = _load(file)
                assert kept is not None
            return kept
    except OSError as error:
        raise DataError(f"cannot use cache_dir {cache_dir}: {error}; set it to a folder that can be written") from error


def _mapped(path: Path, dtype: torch.dtype) -> Tensor:
    """The content of a file, which the system reads as it is used."""
    size = path.stat().st_size // dtype.itemsize
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)


def _save(documents: Documents, path: Path) -> None:
    tensors = {"input_ids": documents.input_ids, "learned": documents.learned, "offsets": documents.offsets}
    save_file(tensors, path, {"dropped": str(documents.dropped), "cut": str(documents.cut)})


def _load(file: Path) -> MappedDocuments | None:
    """The documents of a file; None where there are none, or a torn file."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as tensors:
            ids, learned, offsets = map(tensors.get_tensor, ("input_ids", "learned", "offsets"))
            counts = tensors.metadata()
            return MappedDocuments(ids, learned, offsets, int(counts["dropped"]), int(counts["cut"]), file)
    except SafetensorError:
        return None
