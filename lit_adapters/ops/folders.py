"""Folders for files that can be made or fetched again, and what makes a file in one safe to trust."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """The folder `$LIT_ADAPTERS_CACHE`, or `~/.cache/lit_adapters` if that is not set; it may not exist yet.

    Raises:
        RuntimeError: The variable is not set, and there is no home directory.
    """
    return Path(os.environ.get("LIT_ADAPTERS_CACHE") or "~/.cache/lit_adapters").expanduser()


def private_folder(path: Path) -> Path:
    """Create a folder that only this user can enter, or take those rights from others.

    A folder of root is accepted if only root can write to it.

    Raises:
        OSError: The folder cannot be created, is a link, or others can write to it and this user cannot change that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is not a folder")
    if os.name == "posix":
        if found.st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"the folder {path} belongs to another user (uid {found.st_uid})")
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            path.chmod(0o700)
        elif found.st_mode & 0o022:
            raise PermissionError(f"others can write to the folder {path}")
    return path


def is_private_file(path: Path) -> bool:
    """Whether `path` is a plain file of this user (or of root) that nobody else can write to."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if os.name != "posix":
        return stat.S_ISREG(found.st_mode)
    return stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and not found.st_mode & 0o022
