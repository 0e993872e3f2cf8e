"""Files to rows: jsonl, json, csv, tsv, parquet and YAML, text also as .gz. Each row carries its file and line, or row.

Our own readers, not those of `datasets`, because those do not tell lines.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from language.data.rows import Row, shown
from lit_adapters.errors import DataError

_LONGEST_LINE = 1 << 28  # characters of a line of jsonl; a file of one endless line would fill the memory
_LARGEST = {".json": 1 << 32, ".yml": 1 << 28, ".yaml": 1 << 28}  # bytes of files that are read whole
# A parquet or .gz file may unpack to this many bytes, or to this many times its own size, whichever is more.
_UNPACKED, _RATIO = 1 << 30, 1000
_BATCH = 256  # rows of a parquet file that are read together


def read_file(file: Path) -> Iterator[Row]:
    """Read the rows of a file, by its suffix.

    Raises:
        DataError: The file is missing, no regular file, of an unknown kind, too large, torn or badly formed; the
            message names the file and, where it can, the line.
    """
    suffix = suffix_of(file)
    try:
        check_regular(file)
        if suffix not in READERS:
            raise DataError(f"{file} is of an unknown kind: use {', '.join(READERS)}, or text of these kinds as .gz")
        size = file.stat().st_size
        if size > _LARGEST.get(suffix, size):
            raise DataError(f"{file} has {size:,} bytes, too many to read at once: write its rows as jsonl or parquet")
        yield from READERS[suffix](file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # a .gz may be torn
        raise DataError(f"cannot read {file}: {error}. Copy it again, as UTF-8 text") from error


def suffix_of(file: Path) -> str:
    """The suffix that says what kind of rows a file holds: ".jsonl" of rows.jsonl and of rows.jsonl.gz."""
    suffix = file.suffix.lower()
    inner = Path(file.stem).suffix.lower()
    return inner if suffix == ".gz" and inner in _TEXT else suffix


class _Unpacking(io.RawIOBase):
    """The content of a .gz file, up to the size that may be unpacked.

    Raises:
        DataError: There is more.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._content, self._read = file, gzip.GzipFile(file), 0
        self._most = max(_UNPACKED, _RATIO * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._content.read(len(buffer))
        self._read += len(data)
        if self._read > self._most:
            raise DataError(f"{self._file} unpacks to more than {self._most:,} bytes: check the file")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._content.close()
        super().close()


def _open(file: Path, newline: str | None = None) -> TextIO:
    """A text file, unpacked if it is a .gz."""
    if file.suffix.lower() != ".gz":
        return file.open(encoding="utf-8-sig", newline=newline)
    return io.TextIOWrapper(io.BufferedReader(_Unpacking(file)), encoding="utf-8-sig", newline=newline)


def _text(file: Path) -> str:
    with _open(file) as opened:
        return opened.read()


def check_regular(file: Path) -> None:
    """Check that a path is a regular file, or a link to one.

    Raises:
        DataError: It is a folder, pipe, socket or device: reading it might never end.
        OSError: It does not exist or may not be looked at.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise DataError(f"{file} is a folder, pipe, socket or device, not a regular file: give a file with rows")


def as_row(value: object, origin: str) -> Row:
    """A row of a parsed value.

    Args:
        value: The value, an object.
        origin: Where it stands, for messages.

    Raises:
        DataError: The value is not an object with named fields.
    """
    if not isinstance(value, dict):
        raise DataError(f"{origin}: expected an object with named fields, got {shown(value)}; correct the row")
    return Row(value, origin)


def named(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """The row with the names of its integer classes; a number without a name, such as -1, means no class: None."""
    if not names:
        return values
    found = {c: values[c] for c in names if isinstance(values.get(c), int)}
    classes = {c: names[c][v] if 0 <= v < len(names[c]) else None for c, v in found.items()}
    return {**values, **classes}


class _TwiceError(ValueError):
    """An object has two fields of one name."""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"field {twice[:60]!r} stands twice")
    return values


def _parsed(text: str, origin: str) -> Any:
    """A JSON value; its errors name the origin."""
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not valid JSON ({error}); correct or remove the line") from error
    except ValueError as error:  # a field that stands twice, an integer of too many digits
        raise DataError(f"{origin}: {error}; correct the row") from error
    except RecursionError:
        raise DataError(f"{origin}: lists or objects lie too deep within each other; correct the row") from None


def _read_jsonl(file: Path) -> Iterator[Row]:
    with _open(file) as lines:
        number = 0
        while line := lines.readline(_LONGEST_LINE):
            number += 1
            origin = f"{file} line {number}"
            if len(line) == _LONGEST_LINE:
                raise DataError(f"{origin} has more than {_LONGEST_LINE:,} characters: put one row in each line")
            if line.strip():
                yield as_row(_parsed(line, origin), origin)


def _read_json(file: Path) -> Iterator[Row]:
    text = _text(file)
    try:
        values = json.loads(text, object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} line {error.lineno}: not valid JSON ({error.msg}); correct it") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}; correct it") from error
    except RecursionError:
        raise DataError(f"{file}: lists or objects lie too deep within each other; correct it") from None
    if not isinstance(values, list):
        raise DataError(f"{file} does not hold a list of rows; if it has one object a line, name it .jsonl")
    for number, value in enumerate(values, 1):
        yield as_row(value, f"{file} row {number}")


def _read_csv(file: Path, delimiter: str = ",") -> Iterator[Row]:
    """The first line names the columns; all values are text."""
    csv.field_size_limit(_LONGEST_LINE)
    with _open(file, newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names) or not all(name.strip() for name in names):
                raise DataError(f"{file} line 1: columns need different names, got {', '.join(map(shown, names[:20]))}")
            begin = rows.line_num + 1
            for values in rows:
                origin, begin = f"{file} line {begin}", rows.line_num + 1  # a value may have several lines
                if not values:
                    continue
                if len(values) != len(names):
                    raise DataError(f"{origin} has {len(values)} values for {len(names)} columns; correct it")
                yield Row(dict(zip(names, values, strict=True)), origin)
        except csv.Error as error:
            raise DataError(f"{file} line {rows.line_num}: not valid csv ({error}); correct it") from error


def _read_parquet(file: Path) -> Iterator[Row]:
    from pyarrow import parquet

    with _not_parquet(file):
        opened = parquet.ParquetFile(file)
        _check_unpacked(file, opened.metadata)
        schema = opened.schema_arrow
        batches = opened.iter_batches(_BATCH)
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{file} has two columns of one name among {', '.join(schema.names)}: rename one")
    names = _class_names(file, (schema.metadata or {}).get(b"huggingface"))
    number = 0
    while True:
        with _not_parquet(file):
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for values in rows:
            number += 1
            yield as_row(named(values, names), f"{file} row {number}")


@contextmanager
def _not_parquet(file: Path) -> Iterator[None]:
    """Raise what goes wrong in reading a parquet file as one error that names it."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(f"{file} is truncated or not parquet ({reason}): copy or download it again") from error


def _check_unpacked(file: Path, metadata: Any) -> None:
    unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if unpacked > max(_UNPACKED, _RATIO * file.stat().st_size):
        raise DataError(f"{file} would unpack to {unpacked:,} bytes, more than {_RATIO} times its size: check the file")


def _class_names(file: Path, described: bytes | None) -> dict[str, list[str]]:
    """The names of integer classes, which Hugging Face's writer leaves in a file's metadata.

    Raises:
        DataError: The metadata are not such a description, so that classes would be numbers.
    """
    if described is None:
        return {}
    try:
        features = json.loads(described).get("info", {}).get("features", {})
        found = {column: f["names"] for column, f in features.items() if isinstance(f, dict) and "names" in f}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file}: its metadata 'huggingface' do not describe features, so that the names of classes cannot be "
            "read: write the file again"
        ) from error
    # A column with fields of its own may have one that is called `names`.
    return {c: n for c, n in found.items() if isinstance(n, list) and all(isinstance(name, str) for name in n)}


def _read_yaml(file: Path) -> Iterator[Row]:
    """Read `conversations`, lists of turns: each turn is a prompt, and the turn after it is the response."""
    import yaml

    try:
        # Node by node, because these know their lines and because plain scalars such as `Yes` must stay text.
        root = yaml.compose(_text(file), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", error)).split("\n")[0]
        raise DataError(f"{file}{line}: not valid YAML ({reason}); correct it") from error
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError) as error:  # an escape for a character that does not exist
        raise DataError(f"{file}: not valid YAML ({error}); correct it") from error
    except RecursionError:
        raise DataError(f"{file}: lists lie too deep within each other; correct it") from None
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    conversations = next((value for key, value in pairs if key.value == "conversations"), None)
    if not isinstance(conversations, yaml.SequenceNode):
        raise DataError(f"{file} has no list `conversations` of lists of strings, the only YAML form that is read")
    for conversation in conversations.value:
        turns = conversation.value
        line = conversation.start_mark.line + 1
        if not isinstance(turns, list) or not all(isinstance(turn, yaml.ScalarNode) for turn in turns):
            raise DataError(f"{file} line {line}: a conversation must be a list of strings; correct it")
        if len(turns) < 2:
            raise DataError(f"{file} line {line}: a conversation needs a prompt and a response; remove or complete it")
        for prompt, response in pairwise(turns):
            origin = f"{file} line {response.start_mark.line + 1}"
            yield Row({"prompt": prompt.value, "response": response.value}, origin)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".yml": _read_yaml,
    ".yaml": _read_yaml,
}
_TEXT = READERS.keys() - {".parquet"}
