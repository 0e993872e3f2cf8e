"""Files and directories that come into being whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from lit_adapters.errors import AdapterError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text, or leave it as it was."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def umask() -> int:
    """The permissions that this process withholds from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output(out: Path, overwrite: bool, known: Collection[str]) -> None:
    """Raise if `out` must not be written to; before time is spent on what would go there.

    Only a directory of plain files, one of them among the `known` names, may be overwritten: it is replaced as a whole,
    and a mistyped path should cost nobody their files.

    Raises:
        AdapterError: a file is there, or a directory that is not empty and may not be overwritten.
    """
    if out.is_file():
        raise AdapterError(f"--out {str(out)!r} is a file; give a directory, it is created")
    present = list(out.iterdir()) if out.is_dir() else []
    if not present:
        return
    if not overwrite:
        raise AdapterError(f"--out {str(out)!r} is not empty; give another directory, or --overwrite to replace it")
    if any(not p.is_file() for p in present) or not any(p.name in known for p in present):
        raise AdapterError(
            f"--out {str(out)!r} holds other things than an earlier result ({', '.join(known)}); remove it yourself, "
            "or give another directory"
        )


def write_directory(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary directory beside `out`, force it to disk, and put it in the place of `out`."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        new, old = Path(work) / "new", Path(work) / "old"
        new.mkdir()
        write(new)
        for path in new.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~umask())  # some libraries write for the owner alone
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
