"""Archives that tests make: tar and zip files with any members, also such as no packing program writes."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from pathlib import Path


def write_tar(
    path: Path, members: list[tuple[str, bytes]], mode: str = "w:gz", links: dict[str, str] | None = None
) -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for name, to in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, to
            tar.addfile(entry)
    return path


def write_zip(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", method) as bundle:
        for name, data in members:
            bundle.writestr(name, data)
    return path


def write_huge_header(path: Path, size: int) -> Path:
    """A gzipped tar whose first member is a pax header of `size` bytes, which readers take into memory whole."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, size
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(header, io.BytesIO(bytes(size)))
    return path
