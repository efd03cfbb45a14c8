"""What answers in place of the Hub: mirrors, proxies, login pages, other servers.

The error names the cause and who answered, and nothing is tried again that another try would not
change. The client is the real one, and so are the connections.
"""

import datetime
import ipaddress
import ssl
import threading
import types
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from families import load, save, toy
from hubserver import HubServer
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

import skillvec as sv
from skillvec.errors import SkillvecError, UsageError
from skillvec.remote import files, hub, hub_client

Reply = tuple[int, bytes, dict[str, str]]
HTML = {"Content-Type": "text/html; charset=utf-8"}
PAGE = b"<html>Please log in</html>"


class Server(ThreadingHTTPServer):
    """Answers every request by `reply`, and counts them."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, reply: Callable[[str], Reply], pem: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked = reply, [""] * 0
        if pem is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        scheme = "http" if pem is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that break off a handshake are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status, body, headers = self.server.reply(self.path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_CONNECT = do_GET  # noqa: N815


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(reply: Callable[[str], Reply], pem: Path | None = None) -> Server:
        servers.append(Server(reply, pem))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
        server.thread.join()


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[float]]]:
    """Return what points the client at an endpoint and returns the list of its waits."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)

    def at(endpoint: str, **environment: str) -> list[float]:
        slept: list[float] = []
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for module in (files, _http, file_download):
            clock = types.SimpleNamespace(**vars(module.time))
            clock.sleep = slept.append
            monkeypatch.setattr(module, "time", clock)
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        huggingface_hub.close_session()  # it keeps proxies and certificates
        return slept

    yield at
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate of 127.0.0.1 that nobody trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "loopback.pem"
    encoding = serialization.Encoding.PEM
    secret = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(secret + certificate.public_bytes(encoding))
    return file


def refusal(kind: type[SkillvecError] = SkillvecError, ref: str = "org/name") -> str:
    with pytest.raises(kind) as caught:
        hub.locate(ref, "base")
    assert caught.value.__cause__ is None
    return str(caught.value)


def redirects_to(url: str, status: int = 308) -> Callable[[str], Reply]:
    return lambda path: (status, b"", {"Location": f"{url}{path}"})


# -------------------------------------------------------------------------------- mirrors


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as origin:
        origin.add_repo("org/base", save(tmp_path / "base", toy(0)))
        origin.add_repo("org/tuned", save(tmp_path / "tuned", toy(1)))
        yield origin


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_mirror_that_redirects_where_the_client_does_not_follow_is_named(
    status: int, serve, point, origin: HubServer
) -> None:
    mirror = serve(redirects_to(origin.endpoint, status))
    slept = point(mirror.url)
    said = refusal(ref="org/base")
    assert f"{mirror.url} (HF_ENDPOINT) redirects to {origin.endpoint}" in said
    assert "set HF_ENDPOINT to that" in said and "network" not in said and not slept
    point(origin.endpoint)
    assert hub.locate("org/base", "base").revision


def test_a_mirror_that_redirects_to_the_hub_works(
    serve, point, origin: HubServer, tmp_path: Path, monkeypatch
) -> None:
    """The client follows to origins that it knows to be the Hub's; so do ranges and downloads."""
    mirror = serve(redirects_to(origin.endpoint))
    slept = point(mirror.url)
    known = {*_http._HUB_ORIGINS, _http._url_origin(origin.endpoint)}
    monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset(known))
    sv.diff("org/tuned", "org/base", tmp_path / "v.safetensors")
    sv.apply("org/base", tmp_path / "v.safetensors", tmp_path / "out")
    tuned = load(tmp_path / "tuned")
    assert all((t == tuned[name]).all() for name, t in load(tmp_path / "out").items())
    assert not slept and any("/resolve/" in path for path in mirror.asked)


def test_a_mirror_of_listings_without_files_is_said(serve, point, origin: HubServer) -> None:
    """Its answer for a file is a page, and lacks the commit."""

    def reply(path: str) -> Reply:
        if not path.startswith("/api/"):
            return 200, PAGE, HTML
        with urllib.request.urlopen(f"{origin.endpoint}{path}") as answer:
            return 200, answer.read(), {"Content-Type": "application/json"}

    mirror = serve(reply)
    slept = point(mirror.url)
    said = refusal(ref="org/base")
    assert "answers for a file without saying of which commit" in said and not slept
    assert mirror.url in said and "cannot be reached" not in said


# --------------------------------------------------------------------- pages, other servers


@pytest.mark.parametrize("status", [401, 403, 404, 407, 451])
@pytest.mark.parametrize("kind", ["text/html", "text/plain; charset=utf-8"])
def test_a_page_in_place_of_an_answer_is_said(status: int, kind: str, serve, point) -> None:
    server = serve(lambda path: (status, PAGE, {"Content-Type": kind}))
    slept = point(server.url)
    said = refusal()
    assert f"{server.url} (HF_ENDPOINT) answered {status} with a page" in said
    assert "proxy" in said and "token" not in said and "log in" not in said
    assert len(server.asked) == 1 and not slept


def test_what_the_hub_itself_says_is_not_taken_for_a_page(serve, point) -> None:
    """Its errors carry a code or a message, whatever the type of their text."""
    told = {"Content-Type": "text/plain", "X-Error-Code": "GatedRepo"}
    slept = point(serve(lambda path: (403, b"gated", told)).url)
    assert "gated: ask for access" in refusal(UsageError) and not slept
    point(serve(lambda path: (404, b"{}", {"Content-Type": "application/json"})).url)
    said = refusal()
    assert "answered 404: is it a Hub?" in said and "later" not in said


@pytest.mark.parametrize("body", [PAGE, b"{}", b"[]", b"", b"null"])
def test_an_answer_that_is_no_listing_is_said(body: bytes, serve, point) -> None:
    server = serve(lambda path: (200, body, HTML))
    slept = point(server.url)
    said = refusal()
    assert f"answer of {server.url} (HF_ENDPOINT) is not understood" in said
    assert "login page" in said and not slept


def test_a_login_page_behind_a_redirect_is_named(serve, point) -> None:
    portal = serve(lambda path: (200, PAGE, HTML))
    server = serve(lambda path: (302, b"", {"Location": f"{portal.url}/login?from={path}"}))
    slept = point(server.url)
    said = refusal()
    assert f"which redirects to {portal.url}, is not understood" in said
    assert "from=" not in said and not slept


def test_redirects_in_a_circle_are_said(serve, point) -> None:
    server = serve(lambda path: (302, b"", {"Location": path}))
    slept = point(server.url)
    assert "redirects in a circle" in refusal() and not slept


def test_a_server_that_is_busy_is_asked_again(serve, point) -> None:
    """Also where a gateway says so by a page."""
    server = serve(lambda path: (502, PAGE, HTML))
    slept = point(server.url)
    assert f"answered 502 after {hub_client.TRIES} tries: try again later" in refusal()
    assert slept == [1, 2, 4, 8]


# ------------------------------------------------------------------- certificates, proxies, URLs


def test_a_certificate_that_is_not_trusted_is_said(serve, point, pem: Path) -> None:
    server = serve(lambda path: (404, b"{}", {"Content-Type": "application/json"}), pem)
    slept = point(server.url)
    said = refusal()
    assert f"the certificate that {server.url} (HF_ENDPOINT) shows is not trusted" in said
    assert "SSL_CERT_FILE" in said and "network" not in said and not slept and not server.asked
    point(server.url, SSL_CERT_FILE=str(pem))
    assert "answered 404" in refusal() and server.asked


def test_a_redirect_to_a_certificate_that_is_not_trusted_names_both(
    serve, point, pem: Path
) -> None:
    server = serve(lambda path: (404, b"", {}), pem)
    mirror = serve(redirects_to(server.url, 301))
    slept = point(mirror.url)
    said = refusal()
    assert f"{server.url}, to which {mirror.url} (HF_ENDPOINT) redirects, shows" in said
    assert not slept


def test_https_where_there_is_none_is_said(serve, point) -> None:
    server = serve(lambda path: (404, b"", {}))
    slept = point(server.url.replace("http://", "https://"))
    assert "does not speak TLS" in refusal() and not slept


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (407, 1), (503, 5)])
def test_a_proxy_that_lets_nothing_through_is_said(status: int, tries: int, serve, point) -> None:
    proxy = serve(lambda path: (status, PAGE, HTML))
    slept = point("https://example.com", HTTPS_PROXY=proxy.url)
    said = refusal()
    assert len(proxy.asked) == tries and len(slept) == tries - 1
    assert "network" in said if tries > 1 else ("proxy lets nothing through" in said)
    assert ("HTTPS_PROXY" in said) == (tries == 1)


def test_a_proxy_of_an_unknown_kind_is_said(point) -> None:
    slept = point("https://example.com", HTTPS_PROXY="socks9://127.0.0.1:1")
    said = refusal()
    assert "proxy has no URL that is understood" in said and "HTTPS_PROXY" in said and not slept


@pytest.mark.parametrize("endpoint", ["hub.invalid", "127.0.0.1:80", "ftp://hub.invalid"])
def test_an_endpoint_without_a_scheme_is_said(endpoint: str, point) -> None:
    slept = point(endpoint)
    said = refusal()
    assert endpoint in said and "https://" in said and "network" not in said and not slept


@pytest.mark.parametrize("endpoint", ["http://[::1", "http://127.0.0.1:port", "http://127.0.0.1:0"])
def test_an_endpoint_that_is_no_url_is_said(endpoint: str, monkeypatch) -> None:
    """The client cannot even be imported with it."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert f"HF_ENDPOINT {endpoint}: not the URL of a Hub" in refusal(UsageError)


def test_passwords_of_an_endpoint_are_not_shown(serve, point) -> None:
    server = serve(lambda path: (404, PAGE, HTML))
    point(server.url.replace("://", "://user:secret@"))
    said = refusal()
    assert "secret" not in said and server.url in said


def test_a_network_that_is_away_is_still_said_so(point) -> None:
    slept = point("http://127.0.0.1:9")
    said = refusal()
    assert "http://127.0.0.1:9 (HF_ENDPOINT) cannot be reached" in said and "network" in said
    assert slept == [1]
    point(hub_client.DEFAULT_ENDPOINT, HTTPS_PROXY="http://127.0.0.1:9")
    assert ": the Hub cannot be reached" in refusal()


def test_a_push_through_a_page_is_not_a_missing_right(serve, point, tmp_path: Path) -> None:
    save(tmp_path / "base", toy(0))
    sv.diff(tmp_path / "base", tmp_path / "base", tmp_path / "v.safetensors")
    server = serve(lambda path: (403, PAGE, HTML))
    slept = point(server.url)
    with pytest.raises(SkillvecError) as caught:
        sv.push(tmp_path / "v.safetensors", "org/skill", token="good")
    assert "answered 403 with a page" in str(caught.value) and not slept
