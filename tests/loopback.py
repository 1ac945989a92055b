"""A local web server for tests: a hub, plain files, and injected faults.

with Loopback() as server:
    server.hub("owner/set", "main", folder)  # its API, as huggingface_hub calls it
    url = server.file("/set.zip", data, faults=[cut(1000)])
    server.route("/v1/chat/completions", lambda request: Reply(200, b"{}"))
    server.requests  # all requests so far
"""

import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

HASH = re.compile("[0-9a-f]{40}")
# What the real hub keeps in LFS, with a sha256 as its ETag; other files have their git blob's.
LARGE = {".tar", ".zip", ".safetensors", ".bin", ".parquet", ".gguf"}
HTML = b"<!DOCTYPE html><html><body>This image is no longer available</body></html>"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind == "Bearer" else None


@dataclass(frozen=True)
class Reply:
    """A response.

    Args:
        cut: bytes of the body after which the connection breaks.
        seconds: wait before the first byte.
        ranged: a Range in the request may choose a piece of the body.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    seconds: float = 0.0
    ranged: bool = False


@dataclass
class Fault:
    """A fault at a path, for the next `times` requests (None: all) with one of the methods."""

    change: Callable[[Reply], Reply]
    times: int | None = None
    methods: tuple[str, ...] = ("GET", "HEAD", "POST")


def status(code: int, times: int | None = None, retry_after: int | None = None) -> Fault:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Fault(lambda reply: Reply(code, f"status {code}".encode(), headers), times)


def cut(after: int, times: int | None = 1) -> Fault:
    """Close the connection after the given number of bytes of the body."""
    return Fault(lambda reply: _with(reply, cut=after), times, ("GET", "POST"))


def wrong(data: bytes, times: int | None = None) -> Fault:
    """Send other bytes than the headers describe."""
    return Fault(lambda reply: _with(reply, body=data), times, ("GET",))


def html(times: int | None = None) -> Fault:
    """Send an HTML page instead of the file, with status 200."""
    headers = {"Content-Type": "text/html; charset=utf-8"}
    return Fault(lambda reply: Reply(200, HTML, headers), times)


def slow(seconds: float, times: int | None = None) -> Fault:
    return Fault(lambda reply: _with(reply, seconds=seconds), times)


def without_range(times: int | None = None) -> Fault:
    """Ignore Range headers and send the whole file."""
    return Fault(lambda reply: _with(reply, ranged=False), times, ("GET",))


def _with(reply: Reply, **changes) -> Reply:
    return Reply(**vars(reply) | changes)


@dataclass(frozen=True)
class _Repo:
    commit: str
    files: Mapping[str, bytes] | Path
    gated: bool | str
    private: str | None

    def names(self) -> list[str]:
        if isinstance(self.files, Path):
            paths = sorted(path for path in self.files.rglob("*") if path.is_file())
            return [path.relative_to(self.files).as_posix() for path in paths]
        return sorted(self.files)

    def read(self, name: str) -> bytes:
        return (
            (self.files / name).read_bytes() if isinstance(self.files, Path) else self.files[name]
        )


class Loopback:
    """The server, in threads of this process, on a free port."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._routes: dict[str, Callable[[Request], Reply]] = {}
        self._repos: dict[tuple[str, str, str], _Repo] = {}
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Loopback":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def file(
        self,
        path: str,
        data: bytes,
        *,
        kind: str = "application/octet-stream",
        token: str | None = None,
        faults: Sequence[Fault] = (),
    ) -> str:
        """Serve a file, to everyone or only with a token; returns its URL."""

        def answer(request: Request) -> Reply:
            if token is not None and request.token != token:
                return Reply(401, b"no token, or another one")
            headers = {"Content-Type": kind, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            return Reply(200, data, headers, ranged=True)

        return self.route(path, answer, faults=faults)

    def route(
        self, path: str, answer: Callable[[Request], Reply], *, faults: Sequence[Fault] = ()
    ) -> str:
        """Answer requests for a path with a function; returns its URL."""
        self._routes[path] = answer
        self.fault(path, *faults)
        return self.url + path

    def fault(self, path: str, *faults: Fault) -> None:
        """Add faults at a path, also one of a hub; they happen one after the other."""
        self._faults.setdefault(path, []).extend(faults)

    def hub(
        self,
        repo: str,
        revision: str,
        files: Path | Mapping[str, bytes],
        *,
        kind: str = "dataset",
        gated: bool | str = False,
        private: str | None = None,
    ) -> str:
        """Serve a folder as a repository of the hub.

        Args:
            revision: name of a branch or hash of a commit.
            files: folder, or name -> content.
            kind: dataset or model.
            gated: False; True: nobody was let in; or the token that was.
            private: token without which there is no such repository.

        Returns:
            The hash of the commit.
        """
        is_hash = HASH.fullmatch(revision) is not None
        commit = revision if is_hash else hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
        found = _Repo(commit, files, gated, private)
        for name in {revision, commit}:
            self._repos[f"{kind}s", repo, name] = found
        return commit

    def resolve(self, repo: str, revision: str, name: str, *, kind: str = "dataset") -> str:
        """Path of a file of the hub, for `fault`."""
        return f"/{'datasets/' if kind == 'dataset' else ''}{repo}/resolve/{revision}/{name}"

    def asked(self, path: str, method: str = "GET") -> list[Request]:
        """The requests for a path."""
        return [r for r in self.requests if (r.path, r.method) == (path, method)]

    def answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            faults = self._faults.get(request.path, [])
            fault = next((f for f in faults if f.times != 0 and request.method in f.methods), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
        route = self._routes.get(request.path)
        reply = route(request) if route else self._of_hub(request)
        return fault.change(reply) if fault else reply

    def _of_hub(self, request: Request) -> Reply:
        api = re.fullmatch(
            r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
            r"(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?P<rest>/.*)?)?",
            request.path,
        )
        file = re.fullmatch(
            r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<rest>.+)",
            request.path,
        )
        match = api or file
        if match is None:
            return Reply(404, b"not found")
        kind = (match["kind"] or "models").rstrip("/")
        revisions = {
            r: v for (k, n, r), v in self._repos.items() if (k, n) == (kind, match["repo"])
        }
        if not revisions or any(r.private not in (None, request.token) for r in revisions.values()):
            # Without a token the real hub does not reveal whether the repository exists.
            return _hub_error(404 if request.token else 401, "RepoNotFound")
        repo = revisions.get(unquote(match["revision"] or "main"))
        if repo is None:
            return _hub_error(404, "RevisionNotFound")
        if file:
            return _hub_file(repo, match["rest"], request)
        return _hub_api(repo, match["repo"], match["what"], (match["rest"] or "")[1:], request)


def _hub_error(code: int, error: str, repo: _Repo | None = None) -> Reply:
    words = {"GatedRepo": "Access to this repository is restricted"}.get(error, error)
    commit = {"X-Repo-Commit": repo.commit} if repo else {}
    return Reply(
        code,
        json.dumps({"error": words}).encode(),
        {"X-Error-Code": error, "X-Error-Message": words, "Content-Type": "application/json"}
        | commit,
    )


def _hub_file(repo: _Repo, name: str, request: Request) -> Reply:
    if repo.gated and (repo.gated is True or request.token != repo.gated):
        return _hub_error(403 if request.token else 401, "GatedRepo", repo)
    if name not in repo.names():
        return _hub_error(404, "EntryNotFound", repo)
    data = repo.read(name)
    headers = {"ETag": f'"{_etag(name, data)}"', "X-Repo-Commit": repo.commit}
    return Reply(200, data, headers, ranged=True)


def _hub_api(repo: _Repo, name: str, what: str | None, rest: str, request: Request) -> Reply:
    content: object
    if what == "tree":
        recursive = request.query.get("recursive", ["False"])[0].lower() == "true"
        content = _tree(repo, rest, recursive=recursive)
        if rest and not content:
            return _hub_error(404, "EntryNotFound", repo)
    elif what == "paths-info":
        asked = _paths(request)
        content = [entry for entry in _tree(repo, "", recursive=True) if entry["path"] in asked]
    else:
        content = {
            "_id": "0" * 24,
            "id": name,
            "sha": repo.commit,
            "private": repo.private is not None,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": [{"rfilename": file} for file in repo.names()],
        }
    headers = {"Content-Type": "application/json", "X-Repo-Commit": repo.commit}
    return Reply(200, json.dumps(content).encode(), headers)


def _paths(request: Request) -> list[str]:
    if "json" in request.headers.get("content-type", ""):
        return json.loads(request.body)["paths"]
    return parse_qs(request.body.decode())["paths"]


def _tree(repo: _Repo, under: str, *, recursive: bool) -> list[dict]:
    prefix = f"{under}/" if under else ""
    entries: dict[str, dict] = {}
    for name in repo.names():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            path = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                oid = hashlib.sha1(path.encode()).hexdigest()
                entries[path] = {"type": "directory", "oid": oid, "size": 0, "path": path}
        if recursive or len(parts) == 1:
            data = repo.read(name)
            entries[name] = {"type": "file", "oid": _blob(data), "size": len(data), "path": name}
            if Path(name).suffix in LARGE:
                digest = hashlib.sha256(data).hexdigest()
                entries[name]["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return list(entries.values())


def _blob(data: bytes) -> str:
    """Hash of a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if Path(name).suffix in LARGE else _blob(data)


def _piece(reply: Reply, request: Request) -> Reply:
    """The reply reduced to the requested Range, unless the file has changed since."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not (reply.ranged and asked):
        return reply
    if request.headers.get("if-range", reply.headers.get("ETag")) != reply.headers.get("ETag"):
        return reply
    size = len(reply.body)
    first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
    if first >= size:
        return Reply(416, headers={"Content-Range": f"bytes */{size}"})
    headers = {**reply.headers, "Content-Range": f"bytes {first}-{last}/{size}"}
    return _with(reply, status=206, body=reply.body[first : last + 1], headers=headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that was killed is no error
            super().handle_error(request, address)


def _handler(owner: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            place = urlsplit(self.path)
            request = Request(
                self.command,
                unquote(place.path),
                parse_qs(place.query),
                {name.lower(): value for name, value in self.headers.items()},
                self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            )
            reply = _piece(owner.answer(request), request)
            if reply.seconds:
                time.sleep(reply.seconds)
            try:
                self._send(reply)
            except OSError:  # the client would not wait
                self.close_connection = True

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            if reply.ranged:
                self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(reply.body[: reply.cut])
            if reply.cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_HEAD = do_POST = _serve

        def log_message(self, *words) -> None:
            pass

    return Handler
