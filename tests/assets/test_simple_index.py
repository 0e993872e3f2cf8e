"""Index pages and files, read as pip would: from a server of this process and from folders."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lit_adapters.assets import fetch, simple_index
from lit_adapters.assets.simple_index import Index, Link, Settings, is_source, read_settings
from lit_adapters.errors import AssetError
from tests.mutations import byte_edits, json_edits

DATA = b"a source archive"
SHA = hashlib.sha256(DATA).hexdigest()
NAME = "tiny_source-1.0.tar.gz"


@pytest.fixture
def server():
    """A server on this machine: `pages` by path, each (status, type, content); it keeps the headers it was sent."""
    pages: dict[str, tuple[int, str, bytes]] = {}
    asked: list[tuple[str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, dict(self.headers)))
            status, kind, content = pages.get(self.path, (404, "text/plain", b"none"))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", content.decode())
                content = b""
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    running.pages, running.asked = pages, asked
    running.address = f"http://127.0.0.1:{running.server_port}"
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def by_checksum(tmp_path, monkeypatch):
    """Fetch without pip, from the given settings."""

    def call(**settings):
        monkeypatch.setattr(fetch, "read_settings", lambda: Settings(**settings))
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        return fetch._by_checksum("tiny.source", "1.0", SHA, work)

    return call


def page(kind: str, href: str, sha256: str | None) -> tuple[int, str, bytes]:
    if kind == "json":
        file = {"filename": NAME, "url": href, "hashes": {"sha256": sha256} if sha256 else {}}
        return 200, "application/vnd.pypi.simple.v1+json", json.dumps({"files": [file]}).encode()
    fragment = f"#sha256={sha256}" if sha256 else ""
    return 200, "text/html; charset=utf-8", f'<!DOCTYPE html><a href="{href}{fragment}">{NAME}</a>'.encode()


@pytest.mark.parametrize("kind", ["json", "html"])
@pytest.mark.parametrize("stated", [True, False], ids=["with checksum", "without"])
def test_an_index(server, by_checksum, kind, stated):
    server.pages["/simple/tiny-source/"] = page(kind, f"../../files/{NAME}", SHA if stated else None)
    server.pages[f"/files/{NAME}"] = (200, "application/gzip", DATA)
    path, reasons = by_checksum(indexes=[f"{server.address}/empty", f"{server.address}/simple/"])
    assert path.read_bytes() == DATA
    assert path.name == NAME
    assert reasons == []


@pytest.mark.parametrize("kind", ["json", "html"])
@pytest.mark.parametrize("stated", [True, False], ids=["with checksum", "without"])
def test_an_index_with_another_file(server, by_checksum, kind, stated):
    other = hashlib.sha256(b"other").hexdigest()
    server.pages["/simple/tiny-source/"] = page(kind, f"/{NAME}", other if stated else None)
    server.pages[f"/{NAME}"] = (200, "application/gzip", b"other")
    with pytest.raises(AssetError, match=f"expected sha256 {SHA}, got {other}"):
        by_checksum(indexes=[f"{server.address}/simple"])
    assert (f"/{NAME}" in [path for path, _ in server.asked]) is not stated


def test_folders_and_files(tmp_path, by_checksum):
    (tmp_path / "simple" / "tiny-source").mkdir(parents=True)
    (tmp_path / NAME).write_bytes(DATA)
    (tmp_path / "simple" / "tiny-source" / "index.html").write_bytes(page("html", f"../../{NAME}", None)[2])
    (tmp_path / "page.html").write_bytes(page("html", NAME, SHA)[2])
    for settings in (
        {"places": [str(tmp_path)]},
        {"places": [tmp_path.as_uri()]},
        {"places": [str(tmp_path / NAME)]},
        {"places": [str(tmp_path / "page.html")]},
        {"indexes": [(tmp_path / "simple").as_uri()]},
    ):
        assert by_checksum(**settings)[0].read_bytes() == DATA
        (tmp_path / "work").rename(tmp_path / f"work{len(list(tmp_path.iterdir()))}")


def test_a_page_of_a_server_names_no_file_of_this_machine(server, by_checksum, tmp_path):
    (tmp_path / NAME).write_bytes(DATA)
    for kind in ("json", "html"):
        server.pages["/simple/tiny-source/"] = page(kind, (tmp_path / NAME).as_uri(), SHA)
        assert by_checksum(indexes=[f"{server.address}/simple"]) == (None, [])


def test_a_password_goes_to_its_host_alone(server, by_checksum):
    port = server.server_port
    with_password = f"http://me:p%40ss@127.0.0.1:{port}/simple"
    server.pages["/simple/tiny-source/"] = page("html", f"/moved/{NAME}", SHA)
    server.pages[f"/moved/{NAME}"] = (302, "text/plain", f"http://localhost:{port}/{NAME}".encode())
    server.pages[f"/{NAME}"] = (200, "application/gzip", DATA)
    assert by_checksum(indexes=[with_password])[0].read_bytes() == DATA
    sent = {path: headers.get("Authorization") for path, headers in server.asked}
    token = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert sent == {"/simple/tiny-source/": token, f"/moved/{NAME}": token, f"/{NAME}": None}


def test_what_fails_is_told_without_the_password(by_checksum, server):
    server.pages["/simple/tiny-source/"] = (500, "text/plain", b"")
    server.pages["/json/tiny-source/"] = (200, "application/json", b"[" * 100_000)
    indexes = [f"http://me:secret@127.0.0.1:{server.server_port}/simple", f"{server.address}/json"]
    path, reasons = by_checksum(indexes=[*indexes, "http://example.invalid/simple"])
    assert path is None
    assert [word in reason for word, reason in zip(["500", "json", "http is not secure"], reasons, strict=True)]
    assert not any("secret" in reason for reason in reasons)


def test_names_of_source_archives():
    names = ["tiny_source-1.0.tar.gz", "tiny-source-1.0.zip", "Tiny.Source-1.0.tar.bz2"]
    assert all(is_source(name, "tiny-source", "1.0") for name in names)
    names = ["tiny_source-1.0-py3-none-any.whl", "tiny_source-1.1.tar.gz", "tiny-1.0.tar.gz", "tiny_source-1.0"]
    assert not any(is_source(name, "tiny-source", "1.0") for name in names)


def test_pips_settings_are_read(tmp_path, monkeypatch):
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one.example/simple\nfind-links =\n  /a\n  /b\ntrusted-host = one.example\n"
        "[download]\nindex-url = https://two.example/simple\n[install]\nindex-url = https://three.example/simple\n"
    )
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_CERT", "PIP_NO_INDEX", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://four.example/simple")
    monkeypatch.setenv("PIP_CERT", "/certificates.pem")
    monkeypatch.setenv("PIP_PROXY", "proxy.example:3128")
    found = read_settings()
    assert found.indexes == ["https://two.example/simple", "https://four.example/simple"]
    assert (found.places, found.trusted) == (["/a", "/b"], {"one.example"})
    assert (found.certificates, found.proxy) == ("/certificates.pem", "proxy.example:3128")


def test_damaged_pages_give_links_or_a_failure(server):
    """150 edits of a page of each kind."""
    index = Index(Settings(indexes=[f"{server.address}/simple"]))
    document = json.loads(page("json", f"/{NAME}", SHA)[2])
    pages = [("application/json", json.dumps(edited).encode()) for _, edited in json_edits(document, 150)]
    pages += [("text/html", damaged) for _, damaged in byte_edits(page("html", f"/{NAME}", SHA)[2], 150)]
    read = {"application/json": simple_index._json_links, "text/html": simple_index._html_links}
    for kind, content in pages:
        try:
            assert all(isinstance(link, Link) for link in read[kind](content, "http://127.0.0.1/"))
        except (ValueError, RecursionError):
            continue
    for kind, content in pages[::30]:
        server.pages["/simple/tiny-source/"] = (200, kind, content)
        assert all(isinstance(link, Link) for link in index.links("tiny-source"))
