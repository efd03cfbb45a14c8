"""A real S3 server on the loopback interface: moto's, behind a layer that notes and breaks them.

The real s3fs and botocore clients talk to it over real HTTP. Buckets live in this process. `faults`
answer, cut or rewrite chosen requests; `requests` lists what was asked, in the order of answers.
"""

from __future__ import annotations

import http.client
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

QUIET = "x-quiet"  # header of what a test itself asks: neither noted nor broken
SIGNED = "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, Signature=0"
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>made by a test</Message></Error>"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "very-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_MAX_ATTEMPTS": "1",  # botocore's own tries wait for real
    "NO_PROXY": "127.0.0.1",
}


class Request(NamedTuple):
    """What one request was; `sent` bytes of the answer's body left, `received` came in."""

    method: str
    path: str
    query: str
    range: str | None
    if_match: str | None
    status: int
    sent: int
    received: int


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path and query contain `where`.

    After `after` bytes of the answer the connection ends; `status` and `code` answer at once;
    `rewrite` changes the body; `before` is called first.
    """

    method: str
    where: str
    times: float = 1
    status: int = 0
    code: str = ""
    after: int | None = None
    rewrite: Callable[[bytes], bytes] | None = None
    before: Callable[[], object] | None = None


class Handler(WSGIRequestHandler):
    def log_request(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""


@dataclass
class ObjectServer:
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, True, request_handler=Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    # What a test puts in and looks at.

    def fault(self, method: str, where: str, **how: Any) -> None:
        self.faults.append(Fault(method, where, **how))

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
    ) -> bytes:
        """Ask the server without a note; the path begins with the bucket."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            headers = {QUIET: "1", "Authorization": SIGNED, **headers}
            connection.request(method, "/" + urllib.parse.quote(path, "/?=&"), body, headers)
            answer = connection.getresponse()
            assert answer.status < 300, (method, path, answer.status, answer.read())
            return answer.read()
        finally:
            connection.close()

    def put(self, path: str, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            self.ask("PUT", f"{path}/{name}", content)

    def keys(self, bucket: str) -> list[str]:
        listing = self.ask("GET", f"{bucket}?list-type=2").decode()
        return re.findall("<Key>([^<]*)</Key>", listing)

    def unfinished(self, bucket: str) -> list[str]:
        listing = self.ask("GET", f"{bucket}?uploads=").decode()
        return re.findall("<Key>([^<]*)</Key>", listing)

    def asked(self, method: str, where: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == method and where in f"{r.path}?{r.query}"]

    # Inside.

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if "HTTP_X_QUIET" in environ:
            with self._lock:
                return list(self._app(environ, start_response))
        method, path, query = (environ[k] for k in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING"))
        fault = next(
            (f for f in self.faults if f.method == method and f.where in f"{path}?{query}"
             and f.times > 0), None,
        )  # fmt: skip
        if fault:
            fault.times -= 1
            if fault.before:
                fault.before()
        said: dict[str, Any] = {}

        def start(status: str, headers: list[tuple[str, str]], info: Any = None) -> None:
            said.update(status=status, headers=headers)

        if fault and fault.status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = ERROR.format(code=fault.code).encode()
            start(f"{fault.status} made", [("Content-Length", str(len(body)))])
        else:
            with self._lock:  # moto's dictionaries are not made for threads
                body = b"".join(self._app(environ, start))
        if fault and fault.rewrite:
            body = fault.rewrite(body)
            kept = [pair for pair in said["headers"] if pair[0].lower() != "content-length"]
            said["headers"] = [*kept, ("Content-Length", str(len(body)))]
        if fault and fault.after is not None:
            body = body[: fault.after]
            said["headers"].append(("Connection", "close"))
        self.requests.append(Request(
            method, path, query, environ.get("HTTP_RANGE"), environ.get("HTTP_IF_MATCH"),
            int(said["status"].split()[0]), len(body), int(environ.get("CONTENT_LENGTH") or 0),
        ))  # fmt: skip
        start_response(said["status"], said["headers"])
        return self._body(body)

    def _body(self, body: bytes) -> Iterator[bytes]:
        yield body
