"""Files in a cache with their checksum beside them, so that a damaged, planted or torn one is not used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from lit_adapters.errors import AdapterError
from lit_adapters.files.atomic import write_atomically, write_text_atomically
from lit_adapters.ops.folders import is_private_file, private_folder


def write_checked(path: Path, folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file of the cache, and keep its checksum; both are for this user alone.

    Args:
        path: The file, inside `folder`.
        folder: The folder of the cache that only this user may write to; created if missing.
        write: Fills the file at the path it is given.

    Raises:
        OSError: The folder belongs to another user or is a link, or the disk is full.
    """
    private_folder(folder)
    for inside in reversed([p for p in path.parents if folder in p.parents]):
        if inside.is_symlink():  # nobody but an intruder makes one here
            inside.unlink()
        private_folder(inside)

    def write_privately(temporary: Path) -> None:
        write(temporary)
        temporary.chmod(0o600)

    checksum = _checksum_file(path)
    checksum.unlink(missing_ok=True)
    try:
        write_atomically(path, write_privately)
        path.chmod(0o600)
        write_text_atomically(checksum, sha256_of(path))
        checksum.chmod(0o600)
    except AdapterError as error:
        if isinstance(error.__cause__, OSError):  # the caller knows which setting moves the cache
            raise error.__cause__ from None
        raise


def is_intact(path: Path, folder: Path) -> bool:
    """Whether a file that `write_checked` wrote is there and unchanged, and nobody else can have written to it.

    Args:
        path: The file, inside `folder`.
        folder: The folder of the cache that `write_checked` was given.
    """
    parents = [p for p in path.parents if p == folder or folder in p.parents]
    checksum = _checksum_file(path)
    try:
        if any(_is_open_to_others(p) for p in parents) or not (is_private_file(path) and is_private_file(checksum)):
            return False
        return checksum.read_text(encoding="ascii") == sha256_of(path)
    except (OSError, UnicodeDecodeError):
        return False


def sha256_of(path: Path) -> str:
    """The checksum of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_open_to_others(folder: Path) -> bool:
    found = folder.lstat()
    if folder.is_symlink():
        return True
    return os.name == "posix" and (found.st_uid not in (os.geteuid(), 0) or bool(found.st_mode & 0o022))


def _checksum_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")
