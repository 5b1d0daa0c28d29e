"""The Hugging Face hub, played on loopback: what it answers to who pushes a model and takes it."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    visibility: str
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps([*map(_oid, self.files.values())]).encode()).hexdigest()


@dataclass
class Hub:
    """Its address, the one token that it knows, and what it was given."""

    url: str
    token: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256, sent before the commit that names them."""
    full: bool = False
    """Whether it takes no large file."""

    def answer(self, verb: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status, and what to send: bytes as they are, anything else as JSON."""
        if verb == "PUT" and self.full:
            return 400, {"error": "no room"}
        if verb == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        found = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?/?(.*)", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"error": "no such repository"}
        name, repository, asked = found[1], self.repositories[found[1]], found[2]
        if asked.startswith("preupload/"):
            return 200, {"files": [_mode(each["path"]) for each in json.loads(body)["files"]]}
        if asked == "info/lfs/objects/batch":
            return 200, {"objects": [self._object(each) for each in json.loads(body)["objects"]]}
        if asked.startswith("commit/"):
            self._commit(repository, body)
            url = f"{self.url}/{name}/commit/{repository.commit}"
            return 200, {"success": True, "commitUrl": url, "commitOid": repository.commit}
        if asked.startswith("tree/"):
            return 200, [_entry(*each) for each in repository.files.items()]
        if asked.startswith("resolve/"):
            content = repository.files.get(asked.split("/", 2)[2])
            return (404, {"error": "no such file"}) if content is None else (200, content)
        private = repository.visibility == "private"
        files = [{"rfilename": each} for each in repository.files]
        return 200, {"id": name, "private": private, "sha": repository.commit, "siblings": files}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.repositories
        if not known:
            self.repositories[name] = Repository(asked["visibility"])
        return 409 if known else 200, {"url": f"{self.url}/{name}"}

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{self.url}/objects/{asked['oid']}"}}}

    def _commit(self, repository: Repository, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub(token: str) -> Iterator[Hub]:
    """Running while this lasts; who asks it with another token, or with none, is refused."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            signed = self.path.startswith("/objects/")  # as with the real one: the address alone allows it
            known = signed or self.headers.get("Authorization") == f"Bearer {played.token}"
            path = self.path.partition("?")[0]
            status, said = played.answer(self.command, path, body) if known else (401, {"error": "who are you?"})
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if isinstance(said, bytes):
                self.send_header("ETag", f'"{_oid(said)}"')
                self.send_header("X-Repo-Commit", path.split("/resolve/")[1].split("/")[0])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _answer

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    played = Hub(f"http://127.0.0.1:{server.server_port}", token)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield played
    finally:
        server.shutdown()
        server.server_close()
