"""Read one member of an archive that may be damaged or hostile: bounded in size, links not followed, nothing run."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from lit_adapters.errors import AdapterError, AssetError

LIMIT_VARIABLE = "LIT_ADAPTERS_MAX_UNPACKED_GB"
_MAX_RATIO = 100  # images and weights hardly shrink; an archive of zeros is a thousand times smaller than its content
_MAX_BYTES = 16 << 30
_MIN_BYTES = 256 << 20
_MAX_READ = 64 << 20  # bytes at once; a tar header may claim a field of any length, which tarfile reads at once
# What Python's readers raise for a damaged or hostile archive, beside OSError.
DAMAGES = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,  # names that are no text, numbers of sparse files that are none
    IndexError,
    KeyError,
    OverflowError,
)
_OPENERS: list[tuple[bytes, Callable[..., Any]]] = [
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ", lzma.open),
]


def unpacked_limit(packed: int) -> int:
    """The number of bytes that an archive may unpack to.

    That is `$LIT_ADAPTERS_MAX_UNPACKED_GB`, or else 100 times its size, but at least 256 MiB and at most 16 GiB.

    Args:
        packed: Size of the archive in bytes.

    Raises:
        AdapterError: The variable is not a positive number.
    """
    given = os.environ.get(LIMIT_VARIABLE)
    if not given:
        return max(_MIN_BYTES, min(_MAX_RATIO * packed, _MAX_BYTES))
    try:
        limit = int(float(given) * 10**9)
    except (ValueError, OverflowError):
        limit = 0
    if limit < 1:
        raise AdapterError(f"{LIMIT_VARIABLE}={given[:50]!r} is no size: set it to a number of gigabytes above 0")
    return limit


def too_large(archive: Path, size: int, limit: int) -> AssetError:
    """The error for an archive that unpacks to more than its limit.

    Args:
        archive: The archive.
        size: Bytes that have been unpacked, or are to be.
        limit: Bytes that are allowed.
    """
    return AssetError(
        f"archive {archive} unpacks to {size:,} bytes or more, and {limit:,} are allowed: do not use it unless you "
        f"trust it. If you do, set the environment variable {LIMIT_VARIABLE} to enough gigabytes"
    )


class BoundedReader(io.RawIOBase):
    """A stream of unpacked bytes that raises where it passes a limit, so that an archive cannot fill the memory.

    Args:
        stream: The unpacked bytes.
        archive: For the message.
        limit: The largest position that may be reached.
    """

    def __init__(self, stream: IO[bytes], archive: Path, limit: int) -> None:
        self._stream, self._archive, self._limit = stream, archive, limit

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; without a size, or with one above 64 MiB, at most 64 MiB.

        Raises:
            AssetError: The limit is passed.
        """
        data = self._stream.read(min(size, _MAX_READ) if size >= 0 else _MAX_READ)
        if (position := self._stream.tell()) > self._limit:
            raise too_large(self._archive, position, self._limit)
        return data

    def drain(self) -> None:
        """Read to the end, where compressed files have their checksum.

        Raises:
            AssetError: The limit is passed.
        """
        while self.read(1 << 20):
            pass

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, counted from the start.

        Raises:
            AssetError: The limit is passed.
        """
        if offset > self._limit:
            raise too_large(self._archive, offset, self._limit)
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Where the stream stands."""
        return self._stream.tell()

    def seekable(self) -> bool:
        """Always."""
        return True

    def readable(self) -> bool:
        """Always."""
        return True


@contextlib.contextmanager
def bounded_tar(archive: Path) -> Iterator[tuple[tarfile.TarFile, BoundedReader]]:
    """Open a tar archive, compressed or not, with a bound on what it unpacks to.

    Raises:
        AssetError: It is larger than `unpacked_limit` allows.
    """
    with archive.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        unpack = next((unpack for magic, unpack in _OPENERS if start.startswith(magic)), None)
        with unpack(file) if unpack else contextlib.nullcontext(file) as stream:
            reader = BoundedReader(stream, archive, unpacked_limit(archive.stat().st_size))
            with tarfile.open(fileobj=reader, mode="r:") as tar:
                yield tar, reader


def copy_member(
    archive: Path, is_wheel: bool, choose: Callable[[list[str]], str], store: Callable[[IO[bytes]], object]
) -> None:
    """Hand one member of an archive to `store`.

    Args:
        archive: A zip file, or a tar file, compressed or not.
        is_wheel: Whether members are named from the archive's root; otherwise the one top folder is left out.
        choose: Given the names of all plain files, returns one of them. Links and folders are not among them.
        store: Reads the member to its end.

    Raises:
        AssetError: The archive is of an unknown kind, damaged, or larger than `unpacked_limit` allows.
        OSError: The archive cannot be read, or `store` cannot write.
    """
    copy = _copy_from_zip if zipfile.is_zipfile(archive) else _copy_from_tar
    try:
        copy(archive, is_wheel, choose, store)
    except AdapterError:
        raise
    except tarfile.ReadError as error:
        raise AssetError(
            f"{archive.name} is damaged, or an archive of an unknown kind ({error}): name a wheel or a source archive"
        ) from error
    except (*DAMAGES, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # not the archive's fault
            raise
        raise AssetError(f"the archive {archive.name} is damaged ({error}): name another file or version") from error


def _copy_from_zip(
    archive: Path, is_wheel: bool, choose: Callable[[list[str]], str], store: Callable[[IO[bytes]], object]
) -> None:
    limit = unpacked_limit(archive.stat().st_size)
    with zipfile.ZipFile(archive) as bundle:
        entries = [entry for entry in bundle.infolist() if _is_plain(entry)]
        names = [_inside(entry.filename, is_wheel) for entry in entries]
        entry = entries[names.index(choose(names))]
        if entry.file_size > limit:
            raise too_large(archive, entry.file_size, limit)
        with bundle.open(entry) as source:
            store(source)


def _copy_from_tar(
    archive: Path, is_wheel: bool, choose: Callable[[list[str]], str], store: Callable[[IO[bytes]], object]
) -> None:
    limit = unpacked_limit(archive.stat().st_size)
    with bounded_tar(archive) as (tar, reader):
        members = tqdm(tar, desc=f"Reading {archive.name}", unit=" members", disable=None)
        entries = [entry for entry in members if entry.isreg()]
        reader.drain()
        names = [_inside(entry.name, is_wheel) for entry in entries]
        entry = entries[names.index(choose(names))]
        if entry.size > limit:  # a sparse file may claim any size
            raise too_large(archive, entry.size, limit)
        source = tar.extractfile(entry)
        assert source is not None  # regular files always open
        with source:
            store(source)


def _inside(name: str, is_wheel: bool) -> str:
    """Path of a member; a source archive's one top folder is left out, so that both kinds are addressed alike."""
    return name if is_wheel else name.partition("/")[2]


def _is_plain(entry: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 where the archive was not made on a Unix
    return not entry.is_dir() and kind in {0, stat.S_IFREG}
