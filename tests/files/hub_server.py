"""A small local server that speaks as much of the hub's protocol as pushing and loading adapters takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_token_that_may_write"


class Hub:
    """What the server holds.

    Attributes:
        repositories: For each name: whether it is private, and its branches with the commits (id and files) of each.
        requests: "METHOD path" of all requests.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        commits = self.repositories[name]["branches"].setdefault(branch, [])
        whole = {**(commits[-1][1] if commits else {}), **files}
        sha = hashlib.sha1(repr((branch, len(commits), sorted(whole))).encode()).hexdigest()
        commits.append((sha, whole))
        return sha

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        branches = self.repositories[name]["branches"]
        if branches.get(revision):
            return branches[revision][-1]
        return next((c for commits in branches.values() for c in commits if c[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if not self.allowed:
            return self.answer(401, X_Error_Message="Invalid credentials")
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if name in self.hub.repositories:
                return self.json({"error": "exists", "url": f"http://{self.headers['Host']}/{name}"}, 409)
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repositories[name] = {"private": bool(private), "branches": {}}
            self.hub.commit(name, "main", {})
            return self.json({"url": f"http://{self.headers['Host']}/{name}"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.path):
            name, branch = found.groups()
            self.hub.repositories[name]["branches"].setdefault(
                branch, list(self.hub.repositories[name]["branches"]["main"])
            )
            return self.json({})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", self.path):
            files = json.loads(body)["files"]
            kept = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.json({"files": kept})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^?]+)(\?.*)?", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            sha = self.hub.commit(found[1], found[2], files)
            url = f"http://{self.headers['Host']}/{found[1]}/commit/{sha}"
            return self.json({"commitOid": sha, "commitUrl": url, "success": True})
        return self.answer(404)

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.path == "/api/whoami-v2":
            return self.json({"name": "user"}) if self.allowed else self.answer(401)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/([^?]+))?(\?.*)?", self.path):
            repository = self.hub.repositories.get(found[1])
            commit = repository and self.hub.find(found[1], found[3] or "main")
            if not commit:
                return self.answer(404, X_Error_Code="RepoNotFound")
            files = [{"rfilename": name} for name in commit[1]]
            return self.json({"id": found[1], "sha": commit[0], "siblings": files, "private": repository["private"]})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(\?.*)?", self.path):
            repository = self.hub.repositories.get(found[1])
            if repository is None or (repository["private"] and not self.allowed):
                return self.answer(401, X_Error_Code="RepoNotFound")
            commit = self.hub.find(found[1], found[2])
            if commit is None:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            sha, files = commit
            if found[3] not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            content = files[found[3]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(200, content, ETag=etag, X_Repo_Commit=sha, Content_Length=str(len(content)))
        return self.answer(404)

    do_HEAD = do_GET


@contextmanager
def hub_server() -> Iterator[tuple[str, Hub]]:
    """The address of a running server, and what it holds."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
