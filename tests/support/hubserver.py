"""A Hub on the loopback interface that the real huggingface_hub client talks to over real HTTP.

Repositories of models, their commits, branches, tags and pull requests live in memory; the
endpoints are the ones that huggingface_hub 2.4.0 calls. Large files (LFS) answer by a redirect to
signed addresses of a second origin (another port, as a CDN is another host), small ones in place.
Uploads: preupload, LFS batch, basic or in parts (above `part_nbytes`), verify, commit.
Xet is never announced, so downloads are plain HTTP; uploads go by LFS only where the client runs
with HF_HUB_DISABLE_XET=1 (it prefers Xet without asking), which `environment` and `adopt` set.
A defect of this server (an exception in a handler) is raised when the context ends.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
import types
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp", ".model", ".onnx")
LFS_FROM = 10 * 2**20
RELATIONS = ("adapter", "merge", "quantized", "finetune")
UNKNOWN = "Invalid username or password."
DATE = "2026-01-01T00:00:00.000Z"


class Blob(NamedTuple):
    """One version of a file: its bytes, its git object id, and the sha256 where LFS keeps it."""

    data: bytes
    oid: str
    sha256: str | None


@dataclass(frozen=True)
class Request:
    """What one request was: `sent` bytes of the answer's body left, `received` came in."""

    method: str
    path: str
    query: str
    range: str | None
    authorization: str | None
    status: int
    sent: int
    received: int


@dataclass
class Fault:
    kind: str
    where: str
    times: float
    method: str | None = None
    nbytes: int = 0
    reset: bool = False
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """Commits by sha (files, title, parent), refs by full name, LFS objects by sha256."""

    private: bool
    gated: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    log: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)


class Answer(Exception):  # noqa: N818 - no error: how a request ends
    """An answer that ends a request at once."""

    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        self.status, self.body = status, {} if body is None else body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Cut(Exception):  # noqa: N818
    """The connection is to be closed in the middle."""


def is_lfs(path: str, nbytes: int) -> bool:
    return nbytes > 0 and (path.endswith(LFS_SUFFIXES) or nbytes > LFS_FROM)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def make_blob(data: bytes, lfs: bool) -> Blob:
    if not lfs:
        return Blob(data, git_oid(data), None)
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
    return Blob(data, git_oid(pointer.encode()), sha256)


def read_files(folder: Path | dict[str, bytes]) -> dict[str, bytes]:
    if isinstance(folder, dict):
        return dict(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


class HubServer:
    """Serve repositories at `endpoint` while the context is open.

    `tokens` maps each accepted token to a user; reading a private repository and every write take
    one. `owners` may restrict who writes in a namespace. `page` is the length of a tree's page.
    """

    def __init__(self) -> None:
        self.tokens = {"good": "user"}
        self.owners: dict[str, set[str]] = {}
        self.page = 1000
        self.part_nbytes = 5 * 2**30
        self._requests: list[Request] = []
        self._busy = 0  # requests whose answer is not yet written down
        self.repos: dict[str, Repo] = {}
        self.errors: list[BaseException] = []
        self.lock = threading.RLock()
        self._settled = threading.Condition(self.lock)
        self._faults: list[Fault] = []
        self._parts: dict[tuple[str, int], bytes] = {}
        self._listeners: list[_Listener] = []

    @property
    def requests(self) -> list[Request]:
        """What was asked and answered. A client may have its answer before it stands here."""
        with self._settled:
            self._settled.wait_for(lambda: not self._busy, timeout=2)
            return self._requests

    @contextlib.contextmanager
    def written_down(self) -> Iterator[list[Request]]:
        """Yield the list to which a request that was served is added before the context ends."""
        with self.lock:
            self._busy += 1
        try:
            yield self._requests
        finally:
            with self._settled:
                self._busy -= 1
                self._settled.notify_all()

    def __enter__(self) -> Self:
        self._listeners = [_Listener(self), _Listener(self)]
        self.endpoint, self.cdn = (listener.address for listener in self._listeners)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()
        if self.errors and kind is None:
            raise self.errors[0]

    def close(self) -> None:
        """Be reached no longer."""
        while self._listeners:
            self._listeners.pop().stop()

    # What a test puts in.

    def add_repo(
        self,
        repo_id: str,
        folder: Path | dict[str, bytes] | None = None,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Add a repository with one commit on main that holds `folder`; return its sha."""
        with self.lock:
            self.repos[repo_id] = Repo(private, gated)
            files = {} if folder is None else read_files(folder)
            return self._commit(
                repo_id, "refs/heads/main", self._blobs(repo_id, files), "initial commit"
            )

    def commit(
        self,
        repo_id: str,
        files: dict[str, bytes | None] | Path,
        branch: str = "main",
        title: str = "commit",
    ) -> str:
        """Commit `files` (None deletes) on `branch`, made from main if new; return the sha."""
        with self.lock:
            repo, ref = self.repos[repo_id], f"refs/heads/{branch}"
            if isinstance(files, Path):
                files = dict(read_files(files))
            held = dict(repo.commits[repo.refs.get(ref, repo.refs["refs/heads/main"])])
            held.update(self._blobs(repo_id, {k: v for k, v in files.items() if v is not None}))
            kept = {path: blob for path, blob in held.items() if files.get(path, b"") is not None}
            return self._commit(repo_id, ref, kept, title)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a revision holds."""
        with self.lock:
            repo = self.repos[repo_id]
            return {
                path: blob.data for path, blob in repo.commits[_resolve(repo, revision)].items()
            }

    def grant(self, repo_id: str, user: str) -> None:
        """Let `user` read a gated repository."""
        self.repos[repo_id].granted.add(user)

    def cut_after(self, where: str, nbytes: int, times: float = 1, reset: bool = False) -> None:
        """Close the connection once `nbytes` of a file's body went out (of an upload's: came in).

        Uploaded objects have addresses `/upload/...`. `reset` ends with a TCP reset.
        """
        self._faults.append(Fault("cut", where, times, nbytes=nbytes, reset=reset))

    def fail(
        self,
        where: str,
        status: int,
        times: float = 1,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> None:
        """Answer `status` to the next `times` requests whose path contains `where`."""
        self._faults.append(
            Fault("fail", where, times, method=method, status=status, headers=headers or {})
        )

    def corrupt(self, where: str, at: int = -1, times: float = float("inf")) -> None:
        """Serve files with one wrong byte, at offset `at` of the file."""
        self._faults.append(Fault("corrupt", where, times, nbytes=at))

    def heal(self) -> None:
        """Forget all faults."""
        with self.lock:
            self._faults.clear()

    # What a test points the client with.

    def environment(self, home: Path, token: str | None = "good") -> dict[str, str]:
        """Return the environment of a subprocess whose huggingface_hub is to ask this server."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept.update(
            HF_ENDPOINT=self.endpoint,
            HF_HOME=str(home),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_PROXY="127.0.0.1",
        )
        return kept if token is None else {**kept, "HF_TOKEN": token}

    def adopt(self, monkeypatch: Any, home: Path, token: str | None = "good") -> list[float]:
        """Point this process's huggingface_hub at the server; return a list of its waits.

        The client's waits between tries are noted there (seconds) and not waited for.
        """
        import huggingface_hub.constants as constants
        from huggingface_hub import file_download, hf_api, hf_file_system
        from huggingface_hub.utils import _http

        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        hf_file_system.HfFileSystem.clear_instance_cache()
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        slept: list[float] = []
        for module in (_http, file_download):
            clock = types.SimpleNamespace(**vars(module.time))
            clock.sleep = slept.append
            monkeypatch.setattr(module, "time", clock)
        return slept

    # Inside.

    def _blobs(self, repo_id: str, files: dict[str, bytes]) -> dict[str, Blob]:
        blobs = {path: make_blob(data, is_lfs(path, len(data))) for path, data in files.items()}
        objects = self.repos[repo_id].objects
        objects.update({blob.sha256: blob.data for blob in blobs.values() if blob.sha256})
        return blobs

    def _commit(self, repo_id: str, ref: str, files: dict[str, Blob], title: str) -> str:
        repo = self.repos[repo_id]
        parent = repo.refs.get(ref)
        tree = "".join(f"{path}\0{files[path].oid}\n" for path in sorted(files))
        text = f"{repo_id}\n{parent}\n{len(repo.log)}\n{title}\n{tree}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[sha], repo.log[sha], repo.refs[ref] = files, (title, parent), sha
        return sha

    def _fault(self, kind: str, path: str, method: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                matches = fault.kind == kind and fault.where in path and fault.times > 0
                if matches and fault.method in (None, method):
                    fault.times -= 1
                    return fault
        return None


def _resolve(repo: Repo, revision: str) -> str:
    for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
        if name in repo.refs:
            return repo.refs[name]
    if re.fullmatch("[0-9a-f]{7,40}", revision):
        found = [sha for sha in repo.commits if sha.startswith(revision)]
        if len(found) == 1:
            return found[0]
    raise Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")


def _lfs_facts(key: str, blob: Blob) -> dict[str, Any]:
    return {key: blob.sha256, "size": len(blob.data), "pointerSize": 134}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away is part of the tests."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each otherwise
    server: _Listener

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        self.hub = self.server.hub
        with self.hub.written_down() as requests:
            self._serve_one(requests)

    def _serve_one(self, requests: list[Request]) -> None:
        self.raw, _, self.query = self.path.partition("?")
        self.status = self.sent = self.received = 0
        self._body: bytes | None = None
        try:
            fault = self.hub._fault("fail", self.raw, self.command)
            if fault is not None:
                self._read_body()
                self._reply(fault.status, {"error": f"a planned {fault.status}"}, fault.headers)
                return
            if self.command == "PUT":
                self._cut_upload()
            self._read_body()
            try:
                self._route([urllib.parse.unquote(part) for part in self.raw.split("/")[1:]])
            except Answer as answer:
                self._reply(answer.status, answer.body, answer.headers)
        except (Cut, ConnectionError):
            self.close_connection = True
        except Exception as error:
            self.hub.errors.append(error)
            self.close_connection = True
        finally:
            with self.hub.lock:
                requests.append(
                    Request(
                        self.command,
                        urllib.parse.unquote(self.raw),
                        self.query,
                        self.headers.get("Range"),
                        self.headers.get("Authorization"),
                        self.status,
                        self.sent,
                        self.received,
                    )
                )

    # Bytes in and out.

    def _pieces(self) -> Any:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while nbytes := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(nbytes)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, 2**16))
            if not piece:
                raise Cut
            left -= len(piece)
            yield piece

    def _read_body(self) -> None:
        pieces = []
        for piece in self._pieces():
            self.received += len(piece)
            pieces.append(piece)
        self._body = b"".join(pieces)

    def _cut_upload(self) -> None:
        fault = self.hub._fault("cut", self.raw, self.command)
        if fault is None:
            return
        self.received = len(self.rfile.read(fault.nbytes))
        self._drop(fault)

    def _drop(self, fault: Fault) -> None:
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # before the shutdown that would send a FIN
        raise Cut

    def _json(self) -> Any:
        return json.loads(self._body or b"null")

    def _reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        if status >= 400 and isinstance(body, dict) and "error" in body:
            headers.setdefault("X-Error-Message", str(body["error"]))
        self._head(status, {**headers, "Content-Length": str(len(data))})
        if self.command != "HEAD":
            self._write(data)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self.sent += self.connection.send(view[: 2**18])
            view = memoryview(data)[self.sent :]

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        """Answer with a file or the asked range of it, cut or corrupted as planned."""
        begin, end, status = 0, len(data), 200
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first, last = found.groups()
            begin = int(first) if first else max(0, len(data) - int(last))
            end = min(len(data), int(last) + 1) if first and last else len(data)
            if begin >= end:
                raise Answer(416, {"error": "no such range"}, Content_Range=f"bytes */{len(data)}")
            status = 206
            headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        body = data[begin:end]
        headers = {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self._head(status, headers)
            return
        if wrong := self.hub._fault("corrupt", self.raw, self.command):
            at = wrong.nbytes % len(data) - begin
            if 0 <= at < len(body):
                body = body[:at] + bytes([body[at] ^ 0x55]) + body[at + 1 :]
        self._head(status, headers)
        cut = self.hub._fault("cut", self.raw, self.command)
        self._write(body if cut is None else body[: cut.nbytes])
        if cut is not None:
            self._drop(cut)

    # Who asks.

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = self.hub.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise Answer(401, {"error": "Invalid credentials in Authorization header"})
        return user

    def _repo(self, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user is None):
            if user is None:
                raise Answer(401, {"error": UNKNOWN}, X_Error_Code="RepoNotFound")
            raise Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if write:
            self._may_write(repo_id.split("/")[0], user)
        if content and repo.gated and user not in repo.granted:
            message = f"Access to model {repo_id} is restricted. You must have access to it."
            raise Answer(403 if user else 401, {"error": message}, X_Error_Code="GatedRepo")
        return repo

    def _may_write(self, namespace: str, user: str | None) -> None:
        if user is None:
            raise Answer(401, {"error": UNKNOWN})
        if user not in self.hub.owners.get(namespace, {user}):
            raise Answer(403, {"error": f"You don't have the rights to write under {namespace}"})

    # Where a request goes.

    def _route(self, parts: list[str]) -> None:
        with self.hub.lock:
            call = self._find(parts)
        call()

    def _find(self, parts: list[str]) -> Any:
        """Do what is asked, under the lock; return what writes the answer, called outside it."""
        match (self.command, *parts):
            case ("GET", "api", "whoami-v2"):
                return self._whoami()
            case ("POST", "api", "validate-yaml"):
                return self._validate_yaml()
            case ("POST", "api", "repos", "create"):
                return self._create()
            case ("DELETE", "api", "repos", "delete"):
                asked = self._json()
                repo_id = f"{asked.get('organization') or self._user()}/{asked['name']}"
                self._repo(repo_id, write=True)
                del self.hub.repos[repo_id]
                return self._answer({})
            case (_, "api", "models", namespace, name, *rest):
                return self._api(f"{namespace}/{name}", rest)
            case ("POST", namespace, name, "info", "lfs", *rest) if name.endswith(".git"):
                return self._lfs(f"{namespace}/{name.removesuffix('.git')}", rest)
            case ("GET" | "HEAD", namespace, name, "resolve", *rest):
                return self._resolve_file(f"{namespace}/{name}", rest)
            case ("GET" | "HEAD", "cdn", namespace, name, sha256, *_):
                if f"signature={sha256[:8]}" not in self.query:
                    raise Answer(403, {"error": "an address without its signature"})
                data = self.hub.repos[f"{namespace}/{name}"].objects[sha256]
                return lambda: self._file(data, {"ETag": f'"{sha256}"'})
            case ("PUT", "upload", namespace, name, sha256, *part):
                return self._put(f"{namespace}/{name}", sha256, part)
            case ("POST", "complete", namespace, name, sha256):
                return self._complete(f"{namespace}/{name}", sha256)
        raise Answer(404, {"error": f"no endpoint {self.command} {self.raw}"})

    def _answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
        return lambda: self._reply(status, body, headers)

    def _whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise Answer(401, {"error": UNKNOWN})
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return self._answer({"type": "user", "name": user, "orgs": [], "auth": access})

    def _validate_yaml(self) -> Any:
        content = self._json()["content"]
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
        errors: list[str] = []
        try:
            data = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError as error:
            data, errors = {}, [str(error)]
        if not isinstance(data, dict):
            data, errors = {}, ["the metadata is no mapping"]
        models = data.get("base_model", [])
        models = [models] if isinstance(models, str) else models
        if not all(isinstance(model, str) and "/" in model for model in models):
            errors.append('"base_model" must be model ids')
        relation = data.get("base_model_relation", "merge")
        if relation not in RELATIONS:
            errors.append(
                '"base_model_relation" must be one of adapter, merge, quantized, finetune'
            )
        warnings = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        body = {"errors": [{"message": text} for text in errors], "warnings": warnings}
        return self._answer(body, 400 if errors else 200)

    def _create(self) -> Any:
        asked, user = self._json(), self._user()
        namespace = asked.get("organization") or user
        self._may_write(namespace, user)
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            return self._answer({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add_repo(
            repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private
        )
        return self._answer({"url": url, "name": repo_id, "id": repo_id})

    def _api(self, repo_id: str, rest: list[str]) -> Any:
        if rest[1:2] == ["refs"] and len(rest) > 3:  # an unquoted refs/pr/1
            rest = [rest[0], "/".join(rest[1:4]), *rest[4:]]
        match (self.command, *rest):
            case ("GET",):
                return self._info(repo_id, "main")
            case ("GET", "revision", revision):
                return self._info(repo_id, revision)
            case ("GET", "tree", revision, *path):
                return self._tree(repo_id, revision, "/".join(path))
            case ("POST", "paths-info", revision):
                return self._paths_info(repo_id, revision)
            case ("GET", "refs"):
                return self._refs(repo_id)
            case ("GET", "commits", revision):
                return self._commits(repo_id, revision)
            case ("GET", "auth-check", *write):
                self._repo(repo_id, write=bool(write), content=True)
                return self._answer({})
            case ("POST", "branch" | "tag" as kind, name):
                return self._add_ref(repo_id, kind, name)
            case ("DELETE", "branch" | "tag" as kind, name):
                repo = self._repo(repo_id, write=True)
                if (
                    repo.refs.pop(f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}", None)
                    is None
                ):
                    raise Answer(
                        404, {"error": f"no {kind} {name}"}, X_Error_Code="RevisionNotFound"
                    )
                return self._answer({})
            case ("POST", "preupload", revision):
                return self._preupload(repo_id, revision)
            case ("POST", "commit", revision):
                return self._take_commit(repo_id, revision)
        raise Answer(404, {"error": f"no endpoint {self.command} {self.raw}"})

    # Reading.

    def _info(self, repo_id: str, revision: str) -> Any:
        repo = self._repo(repo_id)
        sha = _resolve(repo, revision)
        files = repo.commits[sha]
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        if "blobs=" in self.query:
            for entry in siblings:
                blob = files[entry["rfilename"]]
                entry.update(size=len(blob.data), blobId=blob.oid)
                if blob.sha256:
                    entry["lfs"] = _lfs_facts("sha256", blob)
        body = {
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "createdAt": DATE,
            "lastModified": DATE,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        readme = files["README.md"].data.decode() if "README.md" in files else ""
        if found := re.match(r"---\s*\n(.*?)\n---\s*\n", readme, re.DOTALL):
            body["cardData"] = yaml.safe_load(found[1])
        return self._answer(body)

    def _entry(self, path: str, blob: Blob, expand: bool, sha: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "oid": blob.oid,
            "size": len(blob.data),
        }
        if blob.sha256:
            entry["lfs"] = _lfs_facts("oid", blob)
        if expand:
            entry["lastCommit"] = {"id": sha, "title": "commit", "date": DATE}
        return entry

    def _tree(self, repo_id: str, revision: str, under: str) -> Any:
        repo = self._repo(repo_id)
        sha = _resolve(repo, revision)
        files = repo.commits[sha]
        asked = urllib.parse.parse_qs(self.query)
        recursive, expand = (
            asked.get(k, [""])[0].lower() == "true" for k in ("recursive", "expand")
        )
        prefix = f"{under}/" if under else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            steps = path[len(prefix) :].split("/")
            for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
                folder = prefix + "/".join(steps[:depth])
                entries.setdefault(folder, _folder(folder))
            if recursive or len(steps) == 1:
                entries[path] = self._entry(path, blob, expand, sha)
        if under and not entries:
            raise Answer(404, {"error": f"{under} does not exist"}, X_Error_Code="EntryNotFound")
        begin = int(asked.get("cursor", ["0"])[0])
        page = list(entries.values())[begin : begin + self.hub.page]
        headers = {}
        if begin + self.hub.page < len(entries):
            query = {k: v[0] for k, v in asked.items()} | {"cursor": str(begin + self.hub.page)}
            address = f"{self.hub.endpoint}{self.raw}?{urllib.parse.urlencode(query)}"
            headers["Link"] = f'<{address}>; rel="next"'
        return self._answer(page, headers=headers)

    def _paths_info(self, repo_id: str, revision: str) -> Any:
        repo = self._repo(repo_id)
        sha = _resolve(repo, revision)
        if "json" in self.headers.get("Content-Type", ""):
            asked = self._json()
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = urllib.parse.parse_qs((self._body or b"").decode())
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
        found = []
        for path in paths:
            if path in repo.commits[sha]:
                found.append(self._entry(path, repo.commits[sha][path], expand, sha))
            elif any(held.startswith(f"{path}/") for held in repo.commits[sha]):
                found.append(_folder(path))
        return self._answer(found)

    def _refs(self, repo_id: str) -> Any:
        repo = self._repo(repo_id)
        body: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": []}
        body["pullRequests"] = []
        kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, sha in repo.refs.items():
            for prefix, kind in kinds.items():
                if ref.startswith(prefix):
                    name = ref if kind == "pullRequests" else ref.removeprefix(prefix)
                    body[kind].append({"name": name, "ref": ref, "targetCommit": sha})
        return self._answer(body)

    def _commits(self, repo_id: str, revision: str) -> Any:
        repo = self._repo(repo_id)
        sha: str | None = _resolve(repo, revision)
        found = []
        while sha is not None:
            title, parent = repo.log[sha]
            found.append({"id": sha, "title": title, "message": "", "date": DATE, "authors": []})
            sha = parent
        return self._answer(found)

    def _resolve_file(self, repo_id: str, rest: list[str]) -> Any:
        if rest[0] == "refs" and len(rest) > 3:
            rest = ["/".join(rest[:3]), *rest[3:]]
        repo = self._repo(repo_id, content=True)
        sha, path = _resolve(repo, rest[0]), "/".join(rest[1:])
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise Answer(
                404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha
            )
        if blob.sha256 is None:
            headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": sha, "Content-Type": "text/plain"}
            return lambda: self._file(blob.data, headers)
        address = f"{self.hub.cdn}/cdn/{repo_id}/{blob.sha256}/{urllib.parse.quote(path)}"
        headers = {
            "Location": f"{address}?signature={blob.sha256[:8]}",
            "ETag": f'"{blob.oid}"',
            "X-Repo-Commit": sha,
            "X-Linked-Size": str(len(blob.data)),
            "X-Linked-Etag": f'"{blob.sha256}"',
        }
        return self._answer(b"", 302, headers)

    # Writing.

    def _add_ref(self, repo_id: str, kind: str, name: str) -> Any:
        repo, asked = self._repo(repo_id, write=True), self._json() or {}
        if kind == "branch":
            ref, sha = f"refs/heads/{name}", _resolve(repo, asked.get("startingPoint") or "main")
        else:
            ref, sha = f"refs/tags/{asked['tag']}", _resolve(repo, name)
        if ref in repo.refs:
            raise Answer(409, {"error": f"Reference already exists: {ref}"})
        repo.refs[ref] = sha
        return self._answer({})

    def _preupload(self, repo_id: str, revision: str) -> Any:
        repo = self._repo(repo_id, write="create_pr" not in self.query)
        sha = _resolve(repo, revision)
        found = []
        for asked in self._json()["files"]:
            blob = repo.commits[sha].get(asked["path"])
            found.append(
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if is_lfs(asked["path"], asked["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": (blob.sha256 or blob.oid) if blob else None,
                }
            )
        return self._answer({"files": found, "commitOid": sha})

    def _lfs(self, repo_id: str, rest: list[str]) -> Any:
        repo, asked = self._repo(repo_id, write=True), self._json()
        if rest == ["verify"]:
            if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
                raise Answer(404, {"error": f"object {asked['oid']} is not here"})
            return self._answer({})
        if rest != ["objects", "batch"] or asked["operation"] != "upload":
            raise Answer(404, {"error": f"no endpoint {self.raw}"})
        objects = [
            self._upload_actions(repo_id, repo, item, asked["transfers"])
            for item in asked["objects"]
        ]
        return self._answer({"transfer": "basic", "objects": objects})

    def _upload_actions(self, repo_id: str, repo: Repo, item: Any, transfers: list[str]) -> Any:
        oid, size = item["oid"], item["size"]
        if oid in repo.objects:
            return {"oid": oid, "size": size}
        address = f"{self.hub.cdn}/upload/{repo_id}/{oid}"
        upload: dict[str, Any] = {"href": address}
        if size > self.hub.part_nbytes and "multipart" in transfers:
            count = -(-size // self.hub.part_nbytes)
            header = {str(part): f"{address}/{part}" for part in range(1, count + 1)}
            header["chunk_size"] = str(self.hub.part_nbytes)
            upload = {"href": f"{self.hub.cdn}/complete/{repo_id}/{oid}", "header": header}
        verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _put(self, repo_id: str, sha256: str, part: list[str]) -> Any:
        data = self._body or b""
        if part:
            self.hub._parts[sha256, int(part[0])] = data
            return self._answer(b"", headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        return self._keep(repo_id, sha256, data)

    def _keep(self, repo_id: str, sha256: str, data: bytes) -> Any:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Answer(400, {"error": "the object's sha256 is another"})
        self.hub.repos[repo_id].objects[sha256] = data
        return self._answer(b"")

    def _complete(self, repo_id: str, sha256: str) -> Any:
        numbers = [part["partNumber"] for part in self._json()["parts"]]
        data = b"".join(self.hub._parts.pop((sha256, number)) for number in numbers)
        return self._keep(repo_id, sha256, data)

    def _take_commit(self, repo_id: str, revision: str) -> Any:
        create_pr = "create_pr" in self.query
        repo = self._repo(repo_id, write=not create_pr)
        if self._user() is None:
            raise Answer(401, {"error": UNKNOWN})
        base = _resolve(repo, revision)
        lines = [json.loads(line) for line in (self._body or b"").splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if not create_pr and header.get("parentCommit", base) != base:
            raise Answer(
                412, {"error": "A commit has happened since. Please refresh and try again."}
            )
        files = dict(repo.commits[base])
        for line in lines:
            self._change(repo, files, line["key"], line["value"])
        ref = f"refs/heads/{revision}" if f"refs/heads/{revision}" in repo.refs else revision
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        if create_pr:
            ref = f"refs/pr/{number}"
            repo.refs[ref] = base
        elif ref not in repo.refs:
            raise Answer(400, {"error": f"{revision} is no branch"})
        sha = self.hub._commit(repo_id, ref, files, header["summary"])
        body = {
            "success": True,
            "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}",
            "commitOid": sha,
            "hookOutput": "",
        }
        if create_pr:
            body["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        return self._answer(body)

    def _change(self, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = make_blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Answer(400, {"error": f"LFS object {value['oid']} was never uploaded"})
            files[value["path"]] = make_blob(repo.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [
                p
                for p in files
                if p == value["path"] or p.startswith(value["path"].rstrip("/") + "/")
            ]
            if not gone:
                message = f"A file with this name doesn't exist: {value['path']}"
                raise Answer(404, {"error": message}, X_Error_Code="EntryNotFound")
            for path in gone:
                del files[path]
        elif key != "header":
            raise Answer(400, {"error": f"unknown operation {key}"})
