"""A stand-in for the Hugging Face Hub on 127.0.0.1, for tests without a network.

    with HubServer({"org/model": folder}) as server:
        use_hub(monkeypatch, server)
        huggingface_hub.snapshot_download("org/model")
        assert server.downloads == ["config.json"]

Commits are hashes of the files as they are: to make one, change a file, or push.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

REVOKED_TOKEN = "hf_revoked"  # unlike one without access, refused on public repos too
_ROUTE = re.compile(
    r"(?:/api/models)?/(?P<repo>[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
_PUSH = re.compile(
    r"/api/models/(?P<repo>.+)/(?P<what>preupload|commit)/(?P<revision>[^/]+)"
)
_BATCH = re.compile(r"/(?P<repo>.+)\.git/info/lfs/objects/batch")
_Reply = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Request:
    """One request and how it was answered; ``token``: whether one was sent."""

    method: str
    path: str
    status: int
    token: bool
    range: str | None

    @property
    def is_peek(self) -> bool:
        """Whether it names the last byte it wants; to resume a download does not."""
        return bool(re.fullmatch(r"bytes=\d+-\d+", self.range or ""))


class HubServer:
    """Serves model repos, each of them a folder or one folder per revision.

    ``token`` opens the repos in ``private`` (hidden from everyone else) and in
    ``gated`` (listed for everyone, files refused). With it repos can be made and pushed
    to: commits are written into their folders. ``home`` is a scratch folder.
    ``ranges`` says what becomes of a request for a part of a file: "served", "ignored"
    (the whole file is sent) or "refused", as servers and proxies do that lack them.
    """

    def __init__(
        self,
        repos: Mapping[str, Path | Mapping[str, Path]],
        token: str | None = None,
        *,
        private: Collection[str] = (),
        gated: Collection[str] = (),
        ranges: str = "served",
    ) -> None:
        self.repos = {
            name: source if isinstance(source, Mapping) else {"main": source}
            for name, source in repos.items()
        }
        self.token, self.private, self.gated = token, private, gated
        assert ranges in ("served", "ignored", "refused")
        self.ranges = ranges
        self.requests: list[Request] = []
        self.uploads: dict[
            str, bytes
        ] = {}  # by hash, of files that are not in a commit
        self._cuts: dict[str, int] = {}

    def __enter__(self) -> HubServer:
        self._scratch = tempfile.TemporaryDirectory()
        self.home = Path(self._scratch.name)
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        self._scratch.cleanup()

    def stop(self) -> None:
        """Refuse connections from now on, as a Hub that is down does."""
        self._http.shutdown()
        self._http.server_close()

    def cut(self, filename: str, after: int) -> None:
        """Break the connection after so many bytes of the file's next download."""
        self._cuts[filename] = after

    @property
    def downloads(self) -> list[str]:
        """Names of the files whose contents were sent to their end, in order."""
        return self._sent(lambda r: not r.is_peek)

    @property
    def peeks(self) -> list[str]:
        """Names of the files of which a part was asked for, as of headers, in order."""
        return self._sent(lambda r: r.is_peek)

    def _sent(self, wanted: Callable[[Request], bool]) -> list[str]:
        served = (r for r in self.requests if r.method == "GET" and r.status < 300)
        routes = (_ROUTE.fullmatch(r.path) for r in served if wanted(r))
        return [unquote(m["path"]) for m in routes if m and m["what"] == "resolve"]

    def snapshot(
        self, repo: str, revision: str = "main"
    ) -> tuple[str, dict[str, bytes]]:
        """The commit hash and the files of a revision; KeyError if there is none."""
        for name, folder in self.repos[repo].items():
            paths = sorted(p for p in folder.rglob("*") if p.is_file())
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
            listing = "".join(f"{_blob_id(d)} {path}\n" for path, d in files.items())
            commit = hashlib.sha1(listing.encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        raise KeyError(revision)

    def create(self, repo: str) -> None:
        """Make a repo without files."""
        folder = self.home / "pushed" / repo
        folder.mkdir(parents=True)
        self.repos[repo] = {"main": folder}


class _Http(ThreadingHTTPServer):
    hub: HubServer
    request_queue_size = 64  # snapshot_download connects from eight threads at once

    def server_bind(self) -> None:
        # HTTPServer's own looks up the host's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP/1.0, so that no open connection outlives the server."""

    server: _Http

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        route = _ROUTE.fullmatch(url.path)
        path = unquote(route["path"] or "") if route else ""
        self._send(self._reply(route, parse_qs(url.query)), path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._send(self._take(self._body()))

    do_PUT = do_POST

    def _send(self, reply: _Reply, path: str = "") -> None:
        status, headers, body = reply
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.server.hub._cuts.pop(path, None)])

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _take(self, body: bytes) -> _Reply:
        """Answer a request that makes a repo or writes to one."""
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if self.command == "PUT":  # of a place that was given out
            hub.uploads[path.rpartition("/")[2]] = body
            return 200, {}, b""
        if hub.token is None or self.headers["Authorization"] != f"Bearer {hub.token}":
            return _refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'somebody'}/{asked['name']}"
            existed = repo in hub.repos
            if not existed:
                hub.create(repo)
            made = json.dumps({"url": f"{hub.endpoint}/{repo}"}).encode()
            return (409 if existed else 200), {"Content-Type": "application/json"}, made
        route = _PUSH.fullmatch(path) or _BATCH.fullmatch(path)
        if route is None or route["repo"] not in hub.repos:
            return _refuse(404, "RepoNotFound", "Repository not found")
        if route.re is _BATCH:
            return _json(_places(hub, json.loads(body)["objects"]))
        folder = hub.repos[route["repo"]].get(unquote(route["revision"]))
        if folder is None:
            return _refuse(404, "RevisionNotFound", "Invalid rev id")
        if route["what"] == "preupload":
            return _json(
                {"files": [_mode(f, folder) for f in json.loads(body)["files"]]}
            )
        _commit(hub, folder, body)
        commit, _ = hub.snapshot(route["repo"], unquote(route["revision"]))
        url = f"{hub.endpoint}/{route['repo']}/commit/{commit}"
        return _json({"commitUrl": url, "commitOid": commit})

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        path, token = urlsplit(self.path).path, "Authorization" in self.headers
        request = Request(self.command, path, int(code), token, self.headers["Range"])
        self.server.hub.requests.append(request)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _reply(self, route: re.Match[str] | None, query: dict[str, Any]) -> _Reply:
        hub, sent = self.server.hub, self.headers["Authorization"]
        if sent == f"Bearer {REVOKED_TOKEN}":
            return _refuse(401, "", "Invalid credentials in Authorization header")
        if route is None or (repo := unquote(route["repo"])) not in hub.repos:
            return _refuse(404, "RepoNotFound", "Repository not found")
        what, path = route["what"], unquote(route["path"] or "")
        if hub.token is None or sent != f"Bearer {hub.token}":
            if repo in hub.private:
                return _refuse(401, "RepoNotFound", "Repository not found")
            if repo in hub.gated and what == "resolve":
                return _refuse(401, "GatedRepo", f"Access to {repo} is restricted")
        try:
            commit, files = hub.snapshot(repo, unquote(route["revision"] or "main"))
        except KeyError as error:
            return _refuse(404, "RevisionNotFound", f"Invalid rev id: {error}")
        if what == "resolve" and path in files:
            wanted = self.headers["Range"]
            if wanted and hub.ranges == "refused":
                return _refuse(501, "", "Ranges are not implemented")
            part = wanted if hub.ranges == "served" else None
            return _contents(files[path], commit, part)
        if what == "tree":
            tree = _tree(files, path, "true" in str(query))
            if tree or not path:
                return _json(tree)
        if what in ("tree", "resolve"):
            # Knowing the commit, the client remembers that the file is missing.
            return _refuse(404, "EntryNotFound", "Entry not found", commit)
        flags = {"private": repo in hub.private, "gated": repo in hub.gated}
        siblings = [{"rfilename": name} for name in files]
        return _json({"id": repo, "sha": commit, "siblings": siblings, **flags})


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _refuse(status: int, code: str, message: str, commit: str = "") -> _Reply:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    headers["X-Repo-Commit"] = commit
    return status, {name: value for name, value in headers.items() if value}, b""


def _json(data: object) -> _Reply:
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


def _contents(data: bytes, commit: str, wanted: str | None) -> _Reply:
    headers = {"ETag": f'"{_blob_id(data)}"', "X-Repo-Commit": commit}
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if part is None:
        return 200, headers, data
    start, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
    if start > last:
        return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
    headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
    return 206, headers, data[start : last + 1]


def _places(hub: HubServer, objects: list[Any]) -> object:
    """Where large files are to be sent."""

    def place(one: Any) -> dict[str, Any]:
        return {"upload": {"href": f"{hub.endpoint}/uploads/{one['oid']}"}}

    found = [{**one, "actions": place(one)} for one in objects]
    return {"transfer": "basic", "objects": found}


def _mode(file: Any, folder: Path) -> dict[str, Any]:
    """How a file is to be sent, and what is there under its name."""
    path, there = file["path"], folder / file["path"]
    oid = _blob_id(there.read_bytes()) if there.is_file() else None
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _commit(hub: HubServer, folder: Path, body: bytes) -> None:
    for line in body.splitlines():
        operation = json.loads(line)
        kind, value = operation["key"], operation["value"]
        if kind == "header":
            continue
        place = folder / value["path"]
        if kind == "deletedFile":
            place.unlink()
            continue
        assert kind in ("file", "lfsFile"), kind
        place.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            place.write_bytes(base64.b64decode(value["content"]))
        else:
            place.write_bytes(hub.uploads.pop(value["oid"]))


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[Any]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for path, data in files.items():
        if not path.startswith(prefix):
            continue
        child, below, _ = path.removeprefix(prefix).partition("/")
        entry = {"type": "file", "path": path, "oid": _blob_id(data), "size": len(data)}
        if below and not recursive:
            entry = {"type": "directory", "path": prefix + child, "oid": "", "size": 0}
        entries[str(entry["path"])] = entry
    return list(entries.values())


def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that looks up any other host."""
    lookup = socket.getaddrinfo

    def loopback_only(host: str, *args: Any, **kwargs: Any) -> Any:
        assert host == "127.0.0.1", f"a request for {host} left the stand-in"
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", loopback_only)


def use_hub(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, home: Path | None = None
) -> Path:
    """Send huggingface_hub, transformers and child processes to the server.

    Nobody is logged in and the cache, whose folder is returned, is empty. Both live
    in ``home``, by default the server's, which goes when the server does.
    """
    from huggingface_hub import close_session, constants, hf_api

    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HOME", str(home or server.home))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, f"{os.environ.get(name, '')},127.0.0.1".lstrip(","))
    # A new process would read its constants so; this one has read them already.
    spec = importlib.util.find_spec("huggingface_hub.constants")
    assert spec
    assert spec.loader
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    for name, value in vars(fresh).items():
        if name.isupper() and value != getattr(constants, name):
            monkeypatch.setattr(constants, name, value)
    # model_info and the like are methods of one HfApi, which copied the endpoint.
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    close_session()  # the open one keeps the proxies that it was made with
    with contextlib.suppress(ImportError):
        hub = importlib.import_module("transformers.utils.hub")
        monkeypatch.setattr(hub, "_hf_api", None, raising=False)  # one more copy
    return Path(constants.HF_HUB_CACHE)
