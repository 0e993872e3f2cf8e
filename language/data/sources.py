"""Where rows come from: jsonl, json, parquet and YAML files, folders of them, package addresses, or the hub.

Every row carries its origin (file and line, or row), so that errors can name it. Our own readers, not those of
`datasets`, because those do not tell lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from lit_adapters.assets.package_index import resolve
from lit_adapters.errors import DataError

SplitName = Literal["train", "val", "test"]

HUB = "hub:"
_NAMES = {"train": {"train"}, "val": {"val", "valid", "validation", "dev"}, "test": {"test"}}


@dataclass(frozen=True)
class Row:
    """One row of a file: its fields by name, and where it stands."""

    values: dict[str, Any]
    origin: str


def has_split(path: str | list[str], split: SplitName) -> bool:
    """Whether a folder has files named after the split (train-00000-of-00001.parquet), or a hub data set the split."""
    if isinstance(path, list):
        return False
    if path.startswith(HUB):
        return _hub_split(path, split) is not None
    folder = Path(path).expanduser()
    return folder.is_dir() and any(_is_of(file, split) for file in _data_files(folder))


def read_rows(path: str | list[str], split: SplitName) -> list[Row]:
    """Read the rows of a split.

    Args:
        path: A file, a folder, a `package://` address of a file, `hub:NAME`, or a list of these. Of a folder
            the files named after the split are read, or all data files where none is named after any split.
        split: Which split, for folders and the hub; a file is read whole.

    Raises:
        DataError: Data are missing, torn or badly formed, or have no rows; the message names file and line.
        AssetError: A package cannot be fetched.
    """
    rows = [row for address in ([path] if isinstance(path, str) else path) for row in _read(address, split)]
    if not rows:
        raise DataError(f"{path} holds no rows: give a file with data")
    return rows


def _read(address: str, split: SplitName) -> Iterator[Row]:
    if address.startswith(HUB):
        yield from _read_hub(address, split)
        return
    path = resolve(address).expanduser()
    if not path.exists():
        raise DataError(f"data {address} does not exist: give a file, a folder, a package:// address or {HUB}NAME")
    for file in _files_of(path, split):
        if file.suffix.lower() not in _READERS:
            raise DataError(f"{file} is of an unknown kind: use {', '.join(_READERS)}")
        try:
            yield from _READERS[file.suffix.lower()](file)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {file}: {error}. Copy it again, as UTF-8 text") from error


def _files_of(path: Path, split: SplitName) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = _data_files(path)
    named = any(_is_of(file, name) for file in files for name in _NAMES)
    chosen = [file for file in files if _is_of(file, split)] if named else files
    if not chosen:
        raise DataError(f"folder {path} holds no {split} data: put {split}.jsonl (or json, parquet, yml) into it")
    return chosen


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _READERS and not p.name.startswith("."))


def _is_of(file: Path, split: str) -> bool:
    return re.split(r"[-_.]", file.name.lower())[0] in _NAMES[split]


def _as_row(value: object, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: expected an object with named fields, got {str(value)[:60]!r}; correct the row")
    return Row(value, origin)


def _read_jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            origin = f"{file} line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{origin}: not valid JSON ({error}); correct or remove the line") from error
            yield _as_row(value, origin)


def _read_json(file: Path) -> Iterator[Row]:
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} line {error.lineno}: not valid JSON ({error.msg}); correct it") from error
    if not isinstance(values, list):
        raise DataError(f"{file} does not hold a list of rows; if it has one object a line, name it .jsonl")
    for number, value in enumerate(values, 1):
        yield _as_row(value, f"{file} row {number}")


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is truncated or not parquet ({error}): copy or download it again") from error
    # Hugging Face's writer leaves the names of integer classes in the schema.
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    names = {column: feature["names"] for column, feature in features.items() if "names" in feature}
    for number, values in enumerate(table.to_pylist(), 1):
        yield _as_row(_named(values, names), f"{file} row {number}")


def _named(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    classes = {c: n[values[c]] for c, n in names.items() if isinstance(values.get(c), int) and 0 <= values[c] < len(n)}
    return {**values, **classes}


def _read_yaml(file: Path) -> Iterator[Row]:
    """Read `conversations`, lists of turns: each turn is the prompt of the next one, its response."""
    import yaml

    try:
        # Node by node, because these know their lines and because plain scalars such as `Yes` must stay text.
        root = yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise DataError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)}); correct it") from error
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


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".yml": _read_yaml,
    ".yaml": _read_yaml,
}


def _datasets(address: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{address} needs the package `datasets`: pip install datasets, or give a file") from error
    return datasets


@cache
def _hub_split(address: str, split: SplitName) -> str | None:
    """What the hub's data set calls the split, None where it has none."""
    datasets = _datasets(address)
    try:
        names = datasets.get_dataset_split_names(address.removeprefix(HUB))
    except Exception as error:  # whatever the network or the hub's client raises
        raise DataError(f"cannot reach {address}: {error}. Check the name and the network, or give a file") from error
    return next((name for name in names if name in _NAMES[split]), None)


def _read_hub(address: str, split: SplitName) -> Iterator[Row]:
    name = _hub_split(address, split)
    if name is None:
        raise DataError(f"{address} has no {split} split: give its file in val_path or test_path, or a fraction")
    data = _datasets(address).load_dataset(address.removeprefix(HUB), split=name)
    names = {column: feature.names for column, feature in data.features.items() if hasattr(feature, "names")}
    for number, values in enumerate(data, 1):
        yield _as_row(_named(values, names), f"{address} {name} row {number}")
