"""Download one file of a package from the indexes that pip is configured with, by its checksum.

pip itself cannot fetch a source archive without running it: even `pip download --no-deps` asks its build backend for
the package's name. So the index pages (PEP 503 and 691) and folders of `find-links` are read here.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import html.parser
import json
import netrc
import os
import re
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

PYPI = "https://pypi.org/simple"
TIMEOUT_S = 10.0
MAX_PAGE_BYTES = 1 << 26
MAX_ARCHIVE_BYTES = 1 << 34
SOURCE_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".zip")
_SECURE_HOSTS = ("localhost", "127.0.0.1", "::1")  # where pip, too, accepts http
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html; q=0.2, text/html; q=0.1"


@dataclass(frozen=True)
class Link:
    """A file that an index offers.

    Attributes:
        name: The file's name, without any folder.
        url: Where it is, without a fragment.
        sha256: Its checksum as the index states it, lower case; None if the index states none.
    """

    name: str
    url: str
    sha256: str | None


@dataclass
class Settings:
    """What pip is configured with.

    Attributes:
        indexes: Addresses of simple indexes, without the package's name.
        places: The entries of `find-links`: folders, pages or files.
        trusted: Hosts whose certificate is not checked, as `host` or `host:port`.
        certificates: A file with certificates to trust in place of the system's.
        proxy: The address of a proxy for all requests.
    """

    indexes: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    trusted: set[str] = field(default_factory=set)
    certificates: str | None = None
    proxy: str | None = None


def read_settings() -> Settings:
    """The settings of `pip download`, from pip's files and from the environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, env=safe_environment(), capture_output=True, text=True, errors="replace").stdout
    sections: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}  # each beats the one before
    for section, key, value in re.findall(r"^(global|download|:env:)\.([\w-]+)=(.*)$", listed, re.MULTILINE):
        try:
            sections[section][key.replace("_", "-")] = str(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            continue  # not written by pip
    found = {key: value for section in sections.values() for key, value in section.items()}
    indexes = []
    if found.get("no-index", "0").lower() not in ("1", "true", "yes", "on", "y", "t"):
        indexes = [found.get("index-url") or found.get("pypi-url") or PYPI, *found.get("extra-index-url", "").split()]
    environment = (os.environ.get(name) for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
    return Settings(
        indexes,
        found.get("find-links", "").split(),
        set(found.get("trusted-host", "").split()),
        next(filter(None, [found.get("cert"), *environment]), None),
        found.get("proxy") or None,
    )


def safe_environment() -> dict[str, str]:
    """The environment for pip: without the working directory among the places that Python imports from."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


class Index:
    """Finds and downloads files of packages.

    Args:
        settings: What pip is configured with.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.failures: list[str] = []  # why a page could not be read, for the message when nothing is found
        self._credentials = {}
        for url in settings.indexes + settings.places:
            parts = urllib.parse.urlsplit(url)
            if parts.username is not None:
                user, password = parts.username, parts.password or ""
                self._credentials[_host(url)] = (urllib.parse.unquote(user), urllib.parse.unquote(password))

    def links(self, package: str) -> Iterator[Link]:
        """All files that the indexes and the entries of `find-links` offer for a package."""
        normal = re.sub(r"[-_.]+", "-", package).lower()
        pages = {place: False for place in self.settings.places}
        pages |= {f"{url.rstrip('/')}/{normal}/": True for url in self.settings.indexes}
        for page, of_index in pages.items():
            url = page if re.match(r"(https?|file):", page) else Path(page).expanduser().absolute().as_uri()
            try:
                yield from self._page(url, of_index)
            except (OSError, ValueError, HTTPException, RecursionError) as error:
                if getattr(error, "code", None) != 404:  # that is: another index may have the package
                    self.failures.append(f"{_without_password(url)}: {error}")

    def _page(self, url: str, of_index: bool) -> Iterator[Link]:
        if url.startswith("file:") and (path := _local(url)).is_dir():
            if not of_index:
                yield from (Link(file.name, file.as_uri(), None) for file in sorted(path.iterdir()) if file.is_file())
                return
            url = (path / "index.html").as_uri()
        if url.lower().endswith((".whl", *SOURCE_SUFFIXES)):
            yield _link(url)
            return
        with self._open(url) as response:
            kind, base = response.headers.get_content_type(), response.geturl()
            content = response.read(MAX_PAGE_BYTES + 1)
        if len(content) > MAX_PAGE_BYTES:
            raise ValueError(f"the page has more than {MAX_PAGE_BYTES:,} bytes")
        found = _json_links(content, base) if kind.endswith("json") else _html_links(content, base)
        # A page of a server must not name files of this machine.
        yield from (link for link in found if base.startswith("file:") or link.url.startswith(("http://", "https://")))

    def download(self, link: Link, path: Path) -> str:
        """Write the file of a link to `path`.

        Args:
            link: Where the file is.
            path: Where to; its folder must exist.

        Returns:
            Its sha256.

        Raises:
            OSError: It cannot be read or written.
            ValueError: Its address is not secure, or it is larger than 16 GiB.
        """
        digest, size = hashlib.sha256(), 0
        bar = tqdm(desc=f"Downloading {link.name}", unit="B", unit_scale=True, disable=None)
        with self._open(link.url) as response, path.open("wb") as file, bar:
            bar.total = getattr(response, "length", None)  # a server may not tell
            while block := response.read(1 << 20):
                size += len(block)
                if size > MAX_ARCHIVE_BYTES:
                    raise ValueError(f"{link.name} is larger than {MAX_ARCHIVE_BYTES >> 30} GiB")
                digest.update(block)
                file.write(block)
                bar.update(len(block))
        return digest.hexdigest()

    def _open(self, url: str) -> Any:
        parts = urllib.parse.urlsplit(url)
        host = _host(url)
        trusted = bool({parts.hostname, host} & self.settings.trusted)
        if parts.scheme == "http" and not trusted and parts.hostname not in _SECURE_HOSTS:
            raise ValueError(f"http is not secure: use https, or name {parts.hostname} in pip's trusted-host")
        proxy = self.settings.proxy
        handlers: list[Any] = [urllib.request.ProxyHandler({"http": proxy, "https": proxy} if proxy else None)]
        if parts.scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=self._context(trusted)))
        address = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
        request = urllib.request.Request(address, headers={"Accept": _ACCEPT, "Accept-Encoding": "identity"})
        if credentials := self._credentials.get(host) or _from_netrc(parts.hostname):
            token = base64.b64encode(":".join(credentials).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")  # for this host alone
        return urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S)

    def _context(self, trusted: bool) -> ssl.SSLContext:
        given = self.settings.certificates
        is_folder = given is not None and Path(given).is_dir()
        context = ssl.create_default_context(cafile=None if is_folder else given, capath=given if is_folder else None)
        if trusted:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def is_source(name: str, package: str, version: str) -> bool:
    """Whether a file is named like the source archive of a version of a package."""
    suffix = next((suffix for suffix in SOURCE_SUFFIXES if name.lower().endswith(suffix)), None)
    stem = name[: -len(suffix)] if suffix else ""
    return re.sub(r"[-_.]+", "-", stem).lower() == re.sub(r"[-_.]+", "-", f"{package}-{version}").lower()


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]


def _without_password(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _local(url: str) -> Path:
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))


def _from_netrc(host: str | None) -> tuple[str, str] | None:
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host) if host else None
    except (OSError, RuntimeError, netrc.NetrcParseError):  # none, no home folder, or malformed: pip ignores it too
        return None
    return (found[0], found[2] or "") if found else None


def _link(url: str, sha256: str | None = None) -> Link:
    """A link from an address that may hold the checksum as its fragment."""
    address, _, fragment = url.partition("#")
    stated = re.search(r"sha256=([0-9a-fA-F]{64})", fragment)
    name = urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2]
    checksum = sha256 or (stated[1] if stated else None)
    return Link(name, address, checksum.lower() if checksum else None)


def _json_links(content: bytes, base: str) -> list[Link]:
    """The files of a page of PEP 691."""
    found = json.loads(content)
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, list):
        raise ValueError("the page lists no files")
    links = []
    for file in files:
        if isinstance(file, dict) and isinstance(file.get("url"), str):
            hashes = file.get("hashes")
            stated = hashes.get("sha256") if isinstance(hashes, dict) else None
            links.append(_link(urllib.parse.urljoin(base, file["url"]), stated if isinstance(stated, str) else None))
    return links


def _html_links(content: bytes, base: str) -> list[Link]:
    """The files of a page of PEP 503."""
    parser = _Anchors()
    parser.feed(content.decode(errors="replace"))
    base = urllib.parse.urljoin(base, parser.base or "")
    return [_link(urllib.parse.urljoin(base, href)) for href in parser.found]


class _Anchors(html.parser.HTMLParser):
    """Collects the addresses that a page links to, and the base that they are relative to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.base: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href and tag == "a":
            self.found.append(href)
        elif href and tag == "base":
            self.base = self.base or href
