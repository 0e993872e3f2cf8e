"""Where rows come from: files, folders of them, package addresses, or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from lightning.pytorch.utilities import rank_zero_info

from language.data.folders import NAMES, SplitName, look_into
from language.data.readers import as_row, check_regular, named, read_file
from language.data.rows import Row
from lit_adapters.assets.checked_files import sha256_of
from lit_adapters.assets.package_index import is_package_address, resolve
from lit_adapters.errors import DataError

__all__ = [
    "HUB",
    "Row",
    "SplitName",
    "each_row",
    "fingerprint",
    "has_split",
    "is_address",
    "read_dev_rows",
    "read_rows",
]

HUB = "hub:"
_PARTS = ("config", "split", "revision")  # of an address on the hub


def is_address(path: str) -> bool:
    """Whether data are somewhere else than in a local file or folder: on the hub, or in a package."""
    return path.startswith(HUB) or is_package_address(path)


def has_split(path: str | list[str], split: SplitName) -> bool:
    """Whether a folder has files named after the split (train-00000-of-00001.parquet), or a hub data set the split.

    Raises:
        DataError: The names of a folder's files leave it in doubt.
    """
    if isinstance(path, list):
        return False
    if path.startswith(HUB):  # with a split of its own it is like a file
        return _HubAddress.of(path).split is None and _hub_split(path, split) is not None
    folder = Path(path).expanduser()
    try:
        return folder.is_dir() and look_into(folder).has(split)
    except (OSError, ValueError):  # reading it says what is wrong
        return False


def read_rows(path: str | list[str], split: SplitName) -> list[Row]:
    """Read the rows of a split.

    Args:
        path: A file, a folder, a `package://` address of a file, `hub:NAME` (or `hub:NAME?config=...&split=...`), or a
            list of these. Of a folder the files with exactly the split's name are read, or all data files where no name
            has anything to do with splits; one line counts and names the others.
        split: Which split, for folders and the hub; a file is read whole.

    Raises:
        DataError: Data are missing, torn or badly formed, or have no rows (the message names file and line); or the
            names of a folder's files leave their splits in doubt.
        AssetError: A package cannot be fetched.
    """
    return list(each_row(path, split))


def each_row(path: str | list[str], split: SplitName) -> Iterator[Row]:
    """Read the rows of a split one at a time, for data larger than memory.

    Raises:
        DataError: As `read_rows`.
        AssetError: A package cannot be fetched.
    """
    empty = True
    for address in [path] if isinstance(path, str) else path:
        for row in _read(address, split):
            empty = False
            yield row
    if empty:
        raise DataError(f"{path} holds no rows: give a file with data")


def fingerprint(path: str | list[str], split: SplitName) -> tuple[str, ...]:
    """What tells the data of a split from others: digests of its files, or of data sets of the hub.

    Raises:
        DataError: Data do not exist, or cannot be read.
        AssetError: A package cannot be fetched.
    """
    found: list[str] = []
    for address in [path] if isinstance(path, str) else path:
        if address.startswith(HUB):
            found.append(_load_hub(address, split)[0]._fingerprint)
            continue
        for file in _local_files(address, split):
            try:
                check_regular(file)
                found.append(sha256_of(file))
            except OSError as error:
                raise DataError(f"cannot read {file}: {error}") from error
    return tuple(found)


def read_dev_rows(path: str) -> list[Row]:
    """Read the rows of a folder's `dev` files; those of its validation data where it has none of that name.

    Raises:
        DataError: As `read_rows`.
    """
    folder = Path(path).expanduser()
    files = look_into(folder).named("dev") if folder.is_dir() else []
    return [row for file in files for row in read_file(file)] if files else read_rows(path, "val")


def _read(address: str, split: SplitName) -> Iterator[Row]:
    if address.startswith(HUB):
        yield from _read_hub(address, split)
        return
    for file in _local_files(address, split):
        yield from read_file(file)


def _local_files(address: str, split: SplitName) -> list[Path]:
    """The files of a split at an address that is not on the hub."""
    if not address.strip():
        raise DataError(f"data {address!r} is empty: give a file, a folder, a package:// address or {HUB}NAME")
    path = resolve(address).expanduser()
    try:
        exists, is_folder = path.exists(), path.is_dir()
        files = _files_of(path, split) if is_folder else [path]
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, a folder that may not be looked into
        raise DataError(f"cannot look for data {address[:200]!r}: {error}") from error
    if not exists:
        raise DataError(f"data {address} does not exist: give a file, a folder, a package:// address or {HUB}NAME")
    return files


def _files_of(path: Path, split: SplitName) -> list[Path]:
    folder = look_into(path)
    files = folder.files(split)
    if unused := folder.unused(files):
        names = ", ".join(file.name for file in files[:8])
        rank_zero_info(f"Data: {len(files)} files of {path} are {split} data ({names}); not used: {unused}.")
    return files


def _datasets(address: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{address} needs the package `datasets`: pip install datasets, or give a file") from error
    return datasets


@dataclass(frozen=True)
class _HubAddress:
    """`hub:NAME?config=CONFIG&split=SPLIT&revision=REVISION`; what stands after the name may be left out."""

    address: str
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, address: str) -> _HubAddress:
        """The parts of an address.

        Raises:
            DataError: A part is unknown, stands twice or is empty.
        """
        name, _, query = address.removeprefix(HUB).partition("?")
        parts = parse_qsl(query, keep_blank_values=True)
        known = dict(parts)
        if not name or len(known) < len(parts) or known.keys() - set(_PARTS) or not all(known.values()):
            raise DataError(f"{address!r} must be {HUB}NAME, or {HUB}NAME?config=...&split=...&revision=...")
        return cls(address, name, **known)


def _hub_split(address: str, split: SplitName) -> str | None:
    """What the hub's data set calls the split, None where it has none. A split in the address is taken as it is."""
    parts = _HubAddress.of(address)
    if parts.split is not None:
        return parts.split
    return next((name for name in _hub_splits(address) if name in NAMES[split]), None)


@cache
def _hub_splits(address: str) -> tuple[str, ...]:
    """The names of the splits of a data set on the hub.

    Raises:
        DataError: It cannot be reached, or has several configurations and the address names none.
    """
    datasets, parts = _datasets(address), _HubAddress.of(address)
    try:
        if parts.config is None:
            configs = datasets.get_dataset_config_names(parts.name, revision=parts.revision)
            if len(configs) > 1 and "default" not in configs:
                raise DataError(
                    f"{address} has several configurations: choose one of {', '.join(configs[:20])}, as in "
                    f"{HUB}{parts.name}?config={configs[0]}"
                )
        return tuple(datasets.get_dataset_split_names(parts.name, parts.config, revision=parts.revision))
    except DataError:
        raise
    except Exception as error:  # whatever the network or the hub's client raises
        raise DataError(f"cannot reach {address}: {error}. Check the name and the network, or give a file") from error


def _read_hub(address: str, split: SplitName) -> Iterator[Row]:
    data, name = _load_hub(address, split)
    classes = {column: feature.names for column, feature in data.features.items() if hasattr(feature, "names")}
    for number, values in enumerate(data, 1):
        yield as_row(named(values, classes), f"{address} {name} row {number}")


def _load_hub(address: str, split: SplitName) -> tuple[Any, str]:
    """A data set of the hub, mapped from the disk, and what it calls the split."""
    parts, name = _HubAddress.of(address), _hub_split(address, split)
    if name is None:
        raise DataError(
            f"{address} has no {split} split: give its file in val_path or test_path, a fraction, or the split's name "
            f"as ?split=... (found {', '.join(_hub_splits(address))})"
        )
    if name not in (names := _hub_splits(address)):
        raise DataError(f"{address} has no split {name!r}; it has {', '.join(names)}")
    return _datasets(address).load_dataset(parts.name, parts.config, split=name, revision=parts.revision), name
