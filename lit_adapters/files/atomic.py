"""Write files and directories so that an interrupted write leaves nothing half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from lit_adapters.errors import AdapterError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
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
    """The permission bits that this process takes from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output(out: Path, overwrite: bool, known: Collection[str]) -> None:
    """Raise if `out` must not be written to; call this before time is spent on the result.

    A directory is overwritten as a whole, so that a mistyped path could cost somebody their files. Only a directory of
    plain files may be overwritten, and one of them must have a `known` name.

    Args:
        out: The directory to create.
        overwrite: Whether an earlier result may be replaced.
        known: Names of the files that such a result consists of.

    Raises:
        AdapterError: `out` is a file, or a directory that is not empty and must not be overwritten.
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
    """Let `write` fill a temporary directory beside `out`, force it to disk, and replace `out` with it."""
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
