"""Several arrays in one compressed file, which holds no code."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lit_adapters.errors import AdapterError

# What numpy and zipfile raise for bytes that were changed.
_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, KeyError, SyntaxError, zlib.error, zipfile.BadZipFile)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, compressed, under dates that do not change the file."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as inside:
                np.lib.format.write_array(inside, np.asarray(values), allow_pickle=False)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read arrays; empty if there is no such file.

    Raises:
        AdapterError: The file is damaged.
    """
    if not path.exists():
        return {}
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, not several by name")
        with archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGED as error:
        raise AdapterError(f"{path} is damaged: {error}; delete it, and run again what wrote it") from error
