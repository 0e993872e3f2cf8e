"""Write files and directories so that an interrupted write leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import platform
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lit_adapters.errors import AdapterError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota, or largest size of a file reached


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, and rename it into place.

    Raises:
        AdapterError: The file cannot be written, as on a full disk; an earlier one at `path` is then as before.
    """
    write_together(path.parent, {path.name: write})


def write_together(
    directory: Path, files: Mapping[str, Callable[[Path], object]], withdraw: Collection[str] = ()
) -> None:
    """Write several files of one directory: all are complete on disk before the first is renamed into its place.

    Args:
        directory: Where to; created if missing.
        files: What fills each file, by name; they are renamed in this order.
        withdraw: Names of earlier files that are removed just before the renames, so that being stopped between two
            renames leaves a directory that lacks a file, and not a mixed one.

    Raises:
        AdapterError: A file cannot be written, as on a full disk; earlier files are then as before.
    """
    temporary: dict[Path, Path] = {}
    try:
        for name, write in files.items():
            path = directory / name
            with _explained(path):
                directory.mkdir(parents=True, exist_ok=True)
                descriptor, place = tempfile.mkstemp(dir=directory, prefix=f".{name}.{_writer()}.")
                os.close(descriptor)
                temporary[path] = Path(place)
                write(temporary[path])
                _force_to_disk(temporary[path])
                temporary[path].chmod(0o666 & ~umask())
        for name in withdraw:
            (directory / name).unlink(missing_ok=True)
        for path, place_now in temporary.items():
            with _explained(path):
                os.replace(place_now, path)
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)


def _writer() -> str:
    """This process on this machine, in the names of its temporary files."""
    return f"{zlib.crc32(platform.node().encode()):08x}-{os.getpid()}"


# .NAME.MACHINE-PROCESS.RANDOM, and .NAME.RANDOM of versions before
_TEMPORARY = re.compile(r"\.(?P<name>.+?)\.(?:(?P<machine>[0-9a-f]{8})-(?P<process>\d+)\.)?[a-z0-9_]{8}")
_ABANDONED = 24 * 3600  # seconds without a write, where nothing tells whether the writer is alive


def remove_leftovers(directory: Path, suffix: str) -> list[Path]:
    """Remove temporary files that processes left which were killed while they wrote.

    Files of a process of this machine are removed if it has ended, others if nothing wrote to them for a day.

    Args:
        directory: Where to look; subdirectories are left alone.
        suffix: Of the names of the files that were to be written, such as ".ckpt".

    Returns:
        The removed files.
    """
    removed = []
    for path in directory.iterdir() if directory.is_dir() else ():
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or not found["name"].endswith(suffix) or path.is_symlink() or not path.is_file():
            continue
        machine, _, _ = _writer().partition("-")
        if found["machine"] == machine:
            abandoned = not _is_alive(int(found["process"]))
        else:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED
        if abandoned:
            with suppress(OSError):  # another process may be quicker, or the directory not ours
                path.unlink()
                removed.append(path)
    return removed


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _explained(path: Path, work: str = "") -> Iterator[None]:
    """Raise what goes wrong in writing `path` as one error that says so.

    Args:
        path: The file or directory.
        work: The temporary directory that will become `path`, which nobody should see in a message.

    Raises:
        AdapterError: The system refused to write.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error)
        torn_archive = "unexpected pos" in reason or "file write failed" in reason  # torch.save, on a full disk
        if isinstance(error, AdapterError) and work and work in reason:
            raise AdapterError(reason.replace(work, str(path))) from error
        if isinstance(error, AdapterError) or (isinstance(error, RuntimeError) and not torn_archive):
            raise
        full = torn_archive or getattr(error, "errno", None) in _FULL or any(f"os error {n}" in reason for n in _FULL)
        fix = f"free space on the disk of {path.parent}" if full else f"see that {path.parent} can be written to"
        raise AdapterError(
            f"{path} could not be written ({'the disk is full: ' * full}{reason}); nothing was lost, and an earlier "
            f"one is as it was: {fix}, or give another place"
        ) from error


def _force_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
    """Let `write` fill a temporary directory beside `out`, force it to disk, and replace `out` with it.

    Raises:
        AdapterError: It cannot be written, as on a full disk; an earlier `out` is then as before.
    """
    out = out.resolve()  # a link stays, and what it leads to is replaced
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
            new, old = Path(work) / "new", Path(work) / "old"
            new.mkdir()
            with _explained(out, str(new)):
                write(new)
            for path in new.rglob("*"):
                if path.is_file():
                    path.chmod(0o666 & ~umask())  # some libraries write for the owner alone
                    _force_to_disk(path)
            if out.exists():
                os.replace(out, old)
            try:
                os.replace(new, out)
            except OSError:
                if old.exists():
                    os.replace(old, out)
                raise
