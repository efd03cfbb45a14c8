"""The Hub's client, and what its errors mean: which pass, which do not, and what to do then.

Hides huggingface_hub's kinds of errors, how long the Hub wants to be left alone, and what stands
before it: proxies, login pages, certificates, addresses that are none.
"""

import os
import re
import ssl
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from skillvec.errors import FormatError, OutputError, SkillvecError, UsageError, printable
from skillvec.remote.files import Judge, Result, retry, seconds_after

README = "README.md"
TRIES = 5  # in a row without a MiB of progress
SERVER_BUSY = (500, 502, 503, 504)
BUSY = (408, 429, *SERVER_BUSY)
LONGEST_WAIT = 300  # seconds: the Hub counts requests in windows of five minutes
TIMEOUT = 30  # seconds without a byte
CONFUSED = (ValueError, KeyError, TypeError, AttributeError)  # by an answer of another shape
LOGIN = "give a token with read access (HF_TOKEN or `hf auth login`)"
OFFLINE = "offline mode is on (HF_HUB_OFFLINE), the cache does not hold it: fetch it once online"
MISSING = (
    "no repository of a model on the Hub that may be read: check the name; if it is private,"
    f" {LOGIN}"
)
DEFAULT_ENDPOINT = "https://huggingface.co"
PAGES = ("text/html", "text/plain")  # what proxies, login pages and other servers answer with
PROXIES = "check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY"
OFFLINE_KINDS = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
SENTENCES: dict[str | int, str] = {  # what the client's errors mean, by class or status
    **dict.fromkeys(OFFLINE_KINDS, OFFLINE),
    "GatedRepoError": f"gated: ask for access on its page on the Hub, then {LOGIN}",
    "RevisionNotFoundError": "the repository has no such branch, tag or commit",
    "EntryNotFoundError": "the repository has no such file at this commit",
    "RepositoryNotFoundError": MISSING,
    "HFValidationError": "not a name that a repository can have",
    401: MISSING,
    403: f"the Hub forbids it: {LOGIN} and the right to this repository",
}


def client(part: str = "") -> Any:
    said = os.environ.get("HF_ENDPOINT", "")
    if not _is_address(said):  # the client takes it apart where it is imported, and fails there
        raise UsageError(f"HF_ENDPOINT {printable(said):.200}: not the URL of a Hub")
    return import_module(f"huggingface_hub{part}")


def _is_address(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _client_errors() -> tuple[type[BaseException], ...]:
    """Return the roots of what the client raises: of its HTTP library, built in, of Xet."""
    return (*client(".errors").HfHubHTTPError.__bases__, OSError, RuntimeError, *CONFUSED)


def patiently(
    what: str, call: Callable[[], Result], lost: int = TRIES, busy: tuple[int, ...] = BUSY
) -> Result:
    """Return what `call` does, tried again where that can help; errors of the client become ours.

    `lost` is how often a connection may be refused: at the start of a run it may be no network.
    `busy` are the answers that another try may change.
    """
    return retry(call, judge_of(what, lost, busy))


def judge_of(what: str, lost: int = TRIES, busy: tuple[int, ...] = BUSY) -> Judge:
    """Return what tells of the client's errors whether another try helps; see `patiently`."""
    return partial(_seconds_to_wait, what, lost, busy)


def _seconds_to_wait(
    what: str, lost: int, busy: tuple[int, ...], error: BaseException, failures: int
) -> float:
    if isinstance(error, SkillvecError) or not isinstance(error, _client_errors()):
        raise error
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache", for want of an answer
    if obstacle := _obstacle(error):
        raise SkillvecError(f"{what}: {obstacle}") from None
    seconds = _pause(error, failures, busy)
    most = lost if type(error).__name__ == "ConnectError" else TRIES
    if seconds is None or failures >= most:
        raise _explained(error, what) from None
    return seconds


def written(what: str, call: Callable[[], Result], lost: int = TRIES) -> Result:
    """Return what a writing call gives, with sentences for what only a writer meets."""
    errors = client(".errors")

    def tried() -> Result:
        try:
            return call()
        except RuntimeError as error:  # of an upload in a thread: the cause tells
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise SkillvecError(f"{what}: the upload broke off: try again") from None
        except errors.OfflineModeIsEnabled:
            raise UsageError(f"{what}: offline mode is on (HF_HUB_OFFLINE): unset it") from None
        except errors.HfHubHTTPError as error:
            if obstacle := _obstacle(error):
                raise SkillvecError(f"{what}: {obstacle}") from None
            status = error.response.status_code
            if status in (401, 403):
                raise UsageError(
                    f"{what}: may not be written with this token: give one with write access to"
                    " it (--token, HF_TOKEN or `hf auth login`)"
                ) from None
            if status in (409, 412):
                raise SkillvecError(
                    f"{what}: was changed by someone else meanwhile; nothing was committed: push"
                    " again"
                ) from None
            if status == 400:
                reason = printable(error.server_message or "no reason given")
                raise UsageError(f"{what}: the Hub refuses it: {reason}") from None
            raise
        except ValueError as error:
            if README not in str(error):
                raise
            reason = " ".join(printable(str(error)).split())
            raise UsageError(f"{what}: the Hub refuses the card: {reason}") from None

    return patiently(what, tried, lost)


def _endpoint() -> str:
    """Return what answers in errors: the Hub, or what HF_ENDPOINT names in its place."""
    said = re.sub("//[^/@]*@", "//", str(client(".constants").ENDPOINT))  # no password of it
    return "the Hub" if said == DEFAULT_ENDPOINT else f"{printable(said):.200} (HF_ENDPOINT)"


def _obstacle(error: BaseException) -> str | None:
    """Return what stands before the Hub, or in its place, where another try is of no use."""
    who, response = _endpoint(), getattr(error, "response", None)
    on_the_way = "is a proxy, a firewall or a login page on the way" + (
        "?" if who == "the Hub" else ", or does HF_ENDPOINT name no Hub?"
    )
    if response is not None:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        told = {"x-error-code", "x-error-message"} & {key.lower() for key in response.headers}
        if kind in PAGES and not told and response.status_code not in BUSY:
            return f"{who} answered {response.status_code} with a page ({kind}): {on_the_way}"
        return None
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "FileMetadataError" in kinds:  # an answer for a file, and not one of the Hub's
        if target := _redirect():
            return (
                f"{who} redirects to {target}, where the client does not follow it: set HF_ENDPOINT"
                " to that, or to a mirror that answers itself"
            )
        return f"{who} answers for a file without saying of which commit: {on_the_way}"
    if "TooManyRedirects" in kinds:
        return f"{who} redirects in a circle: {on_the_way}"
    if kinds & {"UnsupportedProtocol", "InvalidURL"}:
        return f"{who} is, or leads to, no URL that begins with https:// or http://"
    if "ProxyError" in kinds and not str(error).startswith("5"):  # 502 and the like may pass
        return f"the proxy lets nothing through ({printable(str(error)):.80}): {PROXIES}"
    if isinstance(error, ValueError) and "proxy" in str(error).lower():
        return f"the proxy has no URL that is understood: {PROXIES}"
    return _tls_fault(error, who) if "ConnectError" in kinds else None


def _tls_fault(error: BaseException | None, who: str) -> str | None:
    """Return what is wrong with the certificate or the protocol that a connection met."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    if isinstance(error, ssl.SSLCertVerificationError):
        target = _redirect()
        where = f"{target}, to which {who} redirects," if target else who
        return (
            f"the certificate that {where} shows is not trusted ({error.verify_message}): if a"
            " proxy or a mirror has one of its own, name its authority's file in SSL_CERT_FILE"
        )
    if error is None or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return None
    return f"{who} does not speak TLS as https:// wants it ({error.reason}): is it http:// there?"


def _redirect() -> str | None:
    """Return the other origin to which the endpoint sends whoever asks it, if it does."""
    constants, session = client(".constants"), client(".utils").get_session()
    try:
        answer = session.head(f"{constants.ENDPOINT}/api/models", follow_redirects=False, timeout=5)
    except Exception:  # of any kind: it is asked only to say more of an error
        return None
    target = urlsplit(answer.headers.get("location", ""))
    origin = f"{target.scheme}://{target.netloc.rpartition('@')[2]}"
    return f"{printable(origin):.200}" if target.netloc else None


def _pause(error: BaseException, failures: int, busy: tuple[int, ...]) -> float | None:
    """Return the seconds to wait before another try, None where none can help."""
    response = getattr(error, "response", None)
    if response is not None:
        if response.status_code not in busy:
            return None
        said = response.headers.get("retry-after", "")
        limit = client(".utils").parse_ratelimit_headers(response.headers)
        if said.isdecimal() or (limit and limit.remaining == 0):
            seconds = int(said) if said.isdecimal() else limit.reset_in_seconds
            return float(seconds) if seconds <= LONGEST_WAIT else None
    elif type(error).__name__ in OFFLINE_KINDS or isinstance(error, CONFUSED):
        return None
    elif getattr(error, "errno", 0) and not isinstance(error, (ConnectionError, TimeoutError)):
        return None  # of this disk
    return seconds_after(failures)


def _explained(error: BaseException, what: str) -> SkillvecError:
    """Return an error of ours; the client's own text may quote signed addresses."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    kinds = [kind.__name__ for kind in type(error).__mro__]  # the most special first
    said = next((SENTENCES[kind] for kind in (*kinds, status) if kind in SENTENCES), None)
    if said is not None:
        return UsageError(f"{what}: {said}")
    if status:
        advice = f" after {TRIES} tries: try again later" if status in BUSY else ": is it a Hub?"
        return SkillvecError(f"{what}: {_endpoint()} answered {status}{advice}")
    if isinstance(error, CONFUSED):
        target = _redirect()
        where = f"{_endpoint()}, which redirects to {target}," if target else _endpoint()
        return FormatError(
            f"{what}: the answer of {where} is not understood ({kinds[0]}): is a proxy or a login"
            " page on the way, or is it no Hub?"
        )
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return OutputError(f"{what}: cannot be kept: {error.strerror}")
    return SkillvecError(
        f"{what}: {_endpoint()} cannot be reached, or the connection kept breaking ({kinds[0]}):"
        " check the network, or set HF_HUB_OFFLINE=1 to read what the cache holds"
    )
