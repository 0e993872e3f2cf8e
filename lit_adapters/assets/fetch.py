"""Fetch the archive of a package from the indexes that pip is configured with. Nothing of it is built or run."""

from __future__ import annotations

import errno
import logging
import re
import subprocess
import sys
from http.client import HTTPException
from pathlib import Path

from lit_adapters.assets.checked_files import sha256_of
from lit_adapters.assets.simple_index import Index, is_source, read_settings, safe_environment
from lit_adapters.errors import AssetError

logger = logging.getLogger(__name__)

HELP = (
    "Check the network and pip's index settings ('pip config list'), or give the path of a local copy instead of the "
    "address."
)


def fetch(name: str, version: str, sha256: str, work: Path) -> Path:
    """Download the archive with this checksum.

    pip fetches wheels. It would run the build backend of a source archive, so those are fetched without it.

    Args:
        name: The package.
        version: Its version.
        sha256: The checksum of the archive, lower case.
        work: A new folder for downloads and temporary files.

    Returns:
        The archive; a wheel's name ends in .whl.

    Raises:
        AssetError: pip is missing, no index has such an archive, or an archive has another checksum.
        OSError: The disk is full.
    """
    logger.info("fetching %s==%s", name, version)
    archive, complaint = _wheel(name, version, sha256, work)
    reasons: list[str] = []
    if archive is None:
        archive, reasons = _by_checksum(name, version, sha256, work)
    if archive is None:
        raise AssetError(_explain(f"{name}=={version}", sha256, complaint, reasons))
    got = sha256_of(archive)
    if got != sha256:
        raise AssetError(_mismatch(f"{name}=={version}", sha256, got))
    return archive


def _wheel(name: str, version: str, sha256: str, work: Path) -> tuple[Path | None, str]:
    """The wheel, or None and what pip says of it."""
    (work / "tmp").mkdir(parents=True)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    # A dead network must end in an error within seconds: one retry, short time-outs.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--ignore-requires-python"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--no-input", "--retries", "1", "--timeout", "10"]
    command += ["--requirement", str(requirements), "--dest", str(work / "archive")]
    # On a terminal pip's own progress bar is shown, on stderr so that stdout stays the program's own.
    done = subprocess.run(
        command,
        env={**safe_environment(), "TMPDIR": str(work / "tmp")},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        (archive,) = (work / "archive").iterdir()
        return archive, ""
    if "No module named pip" in done.stderr:
        raise AssetError(
            f"{name}=={version} cannot be fetched because {sys.executable} has no pip: run "
            f"'{sys.executable} -m ensurepip' (or 'uv pip install pip'), or give the path of a local copy instead"
        )
    if "[Errno 28]" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    return None, done.stderr


def _by_checksum(name: str, version: str, sha256: str, work: Path) -> tuple[Path | None, list[str]]:
    """The file that an index offers with this checksum, or the source archive where the index states no checksum.

    Returns:
        The file, or None and the reasons.

    Raises:
        AssetError: There are source archives of this version, all with other checksums.
    """
    index = Index(read_settings())
    offered = list(index.links(name))
    sources = [link for link in offered if is_source(link.name, name, version)]
    chosen = [link for link in offered if link.sha256 == sha256] + [link for link in sources if link.sha256 is None]
    others = [link.sha256 for link in sources if link.sha256 not in (None, sha256)]
    reasons = list(index.failures)
    for number, link in enumerate(chosen):
        kept = re.sub(r"[^A-Za-z0-9._+-]", "_", link.name)[-100:].lstrip(".")
        path = work / f"download{number}" / kept
        path.parent.mkdir()
        try:
            got = index.download(link, path)
        except (ValueError, HTTPException) as error:
            reasons.append(f"{link.name}: {error}")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            reasons.append(f"{link.name}: {error}")
        else:
            if got == sha256:
                return path, []
            others.append(got)
    if others:
        raise AssetError(_mismatch(f"{name}=={version}", sha256, str(others[0])))
    return None, reasons


def _mismatch(package: str, sha256: str, got: str) -> str:
    return (
        f"the archive of {package} does not match the address: expected sha256 {sha256}, got {got}. "
        "Correct the hash if the address is wrong; otherwise do not trust what the index serves."
    )


def _explain(package: str, sha256: str, complaint: str, reasons: list[str]) -> str:
    """One message from pip's complaint about wheels and the reasons why there is no source archive either."""
    got = re.search(r"^\s*Got\s+([0-9a-f]{64})", complaint, re.MULTILINE)
    if "DO NOT MATCH THE HASHES" in complaint and got:
        return _mismatch(package, sha256, got[1])
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR")] or lines[-3:] or ["pip gave no reason"]
    if broken := re.search(r"connection broken by '(.+)': /", complaint):
        said.append(broken[1])
    elif reasons:
        said += reasons[:3]
    return f"no wheel or source archive of {package} could be fetched: {'; '.join(said)}. {HELP}"
