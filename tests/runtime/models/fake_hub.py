"""A small Hugging Face Hub on loopback: the endpoints that `huggingface_hub` downloads through, over local folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MODEL_API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/]+)")
RESOLVE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def commit_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repository:
    """The folder of each commit, and the commit of each branch and tag."""

    commits: dict[str, Path]
    refs: dict[str, str]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def move(self, folder: Path, ref: str = "main") -> str:
        """Adds a commit and lets a branch or tag point to it."""
        commit = commit_of(f"{len(self.commits)} {folder}")
        self.commits[commit] = folder
        self.refs[ref] = commit
        return commit


@dataclass
class FakeHub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Method and path of every request, and the range that it asked for."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """Bytes after which the connection breaks, for each next download of a file."""
    refuse: tuple[int, str] | None = None
    """Status and code that answer everything."""

    def add(self, name: str, folder: Path, **options) -> str:
        """A repository whose main branch is this folder; returns the commit."""
        self.repositories[name] = Repository({}, {}, **options)
        return self.repositories[name].move(folder)

    def downloads(self) -> list[str]:
        """The files that were asked for, once for every time."""
        return [RESOLVE.search(line)["file"].partition(" ")[0] for line in self.asked if line.startswith("GET /")
                and RESOLVE.search(line)]  # fmt: skip


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running Hub; stopped afterwards."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
        if self.hub.refuse:
            return self._refuse(*self.hub.refuse)
        match = MODEL_API.fullmatch(path) or RESOLVE.fullmatch(path)
        repository = match and self.hub.repositories.get(match["name"])
        if not repository:
            return self._refuse(401, "RepoNotFound")
        if repository.gated and "resolve" in path:
            return self._refuse(403, "GatedRepo")
        commit = repository.commit(match["revision"])
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        folder = repository.commits[commit]
        if "file" in match.groupdict():
            return self._file(folder / match["file"], commit)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if match["what"] == "tree":
            return self._json([_entry(folder, file) for file in files])
        siblings = [{"rfilename": file} for file in files]
        gated = "manual" if repository.gated else False
        return self._json({"id": match["name"], "sha": commit, "siblings": siblings, "gated": gated, "private": False})

    def _file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content, etag = path.read_bytes(), hashlib.sha1(path.read_bytes()).hexdigest()
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cuts = self.hub.cuts.get(path.name) if self.command == "GET" else None
        self._send(206 if first else 200, content[first:], headers, cut=cuts.pop(0) if cuts else None)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
        self.close_connection = self.close_connection or cut is not None


def _entry(folder: Path, file: str) -> dict[str, object]:
    content = (folder / file).read_bytes()
    return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
