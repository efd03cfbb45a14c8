"""Models on the Hub: references to commits, files read by range requests, whole files fetched.

Hides huggingface_hub, whose public API is the only way out. A reference is resolved to a commit
once; every address holds that commit, so nothing changes under a run. Small files at the root come
into the ordinary cache at once, weights when they are asked for; what arrives is checked against
size and digest in the listing, and a wrong file is deleted. A broken connection is taken up where
it broke, a bounded number of times. Listings are hostile until checked. Tokens are handed to the
client and appear nowhere else. Refuses what is no repository of a model, and folders inside one.
"""

import glob
import hashlib
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from skillvec.errors import (
    FormatError,
    OutputError,
    SkillvecError,
    TransferError,
    UsageError,
    printable,
    up_to_five,
)
from skillvec.report import Watcher
from skillvec.sidefiles import is_weight_file
from skillvec.storage import Place, register_remote, remote_of

SCHEME = "hf://"
README = "README.md"
SHORT = re.compile(r"([^/@]+/[^/@]+)(?:@([^@]+))?")
LONG = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(.+?))?/?")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
OTHER_KINDS = ("datasets/", "spaces/", "buckets/", "kernels/")
COMMIT, SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
# files at the root that say what a model is: configs, indexes, tokenizers, templates, card, licence
DESCRIBING, DESCRIBING_NBYTES = (".json", ".jinja", ".txt", ".model", ".md", ""), 64 << 20
HEAD_NBYTES = 1 << 20  # fetched at the first read: length prefix and header are one request
TRIES = 5  # in a row without a MiB of progress
SERVER_BUSY = (500, 502, 503, 504)
BUSY = (408, 429, *SERVER_BUSY)
LONGEST_WAIT = 300  # seconds: the Hub counts requests in windows of five minutes
TIMEOUT = 30  # seconds without a byte
AT_ONCE = 4  # files that are fetched or sent
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
Told = Callable[[int], None]  # takes the bytes received so far
Result = TypeVar("Result")


def _client(part: str = "") -> Any:
    said = os.environ.get("HF_ENDPOINT", "")
    if not _is_address(said):  # the client takes it apart where it is imported, and fails there
        raise UsageError(f"HF_ENDPOINT {printable(said):.200}: not the URL of a Hub")
    return import_module(f"huggingface_hub{part}")


def _is_address(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


class Reference(NamedTuple):
    """What a user wrote: revision None for the default branch, member None for the repository."""

    repo: str
    revision: str | None
    member: str | None

    def pinned(self, commit: str) -> str:
        """Return the reference to this at a commit."""
        whole = f"{self.repo}@{commit}"
        return f"{SCHEME}{whole}/{self.member}" if self.member else whole


# ------------------------------------------------------------------------------------ references


def is_plain(name: str) -> bool:
    """Return whether a name, relative and with slashes, stays in its folder on every system."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def describes(name: str, nbytes: int) -> bool:
    """Return whether a file is a small one at the root that says what the model is."""
    suffix = PurePosixPath(name).suffix
    return "/" not in name and suffix in DESCRIBING and nbytes <= DESCRIBING_NBYTES


def is_replaced(name: str) -> bool:
    """Return whether a new model at the same place leaves no room for an old file of this name.

    So it is for weights and describing files at the root; hidden files and folders stay.
    """
    plain = "/" not in name and not name.startswith(".")
    return plain and (PurePosixPath(name).suffix in DESCRIBING or is_weight_file(name))


def _parsed(ref: str) -> Reference | None:
    text = ref.removeprefix(SCHEME)
    found = (SHORT if text == ref else LONG).fullmatch(text)
    if found is None or not REPO.fullmatch(found[1]):
        return None
    revision, member = (*found.groups(), None)[1:3]
    if revision is not None and text != ref:
        revision = unquote(revision)
    # the cache makes file names of both
    plain = all(is_plain(name) for name in (revision, member) if name is not None)
    return Reference(found[1], revision, member) if plain else None


def is_reference(text: str) -> bool:
    """Return whether text is written like a model on the Hub; a path that exists comes before."""
    return text.startswith(SCHEME) or _parsed(text) is not None


def pinned(text: str) -> tuple[str, str] | None:
    """Return repository and commit of a reference that names a commit, as all that are recorded."""
    asked = _parsed(text)
    if asked is None or asked.revision is None or not COMMIT.fullmatch(asked.revision):
        return None
    return asked.repo, asked.revision


def is_recorded(text: str) -> bool:
    """Return whether a record says by text that it was read of the Hub: with commit or scheme."""
    return text.startswith(SCHEME) or pinned(text) is not None


def may_be(recorded: str, said: str) -> bool:
    """Return whether a reference with its commit is that of what a user wrote, the same or not."""
    one, other = _parsed(recorded), _parsed(said)
    same = one and other and (one.repo, one.member) == (other.repo, other.member)
    return bool(same) and pinned(recorded) is not None


def is_cached(repo: str) -> bool:
    """Return whether some of a repository's files are in the client's cache on this disk."""
    name = f"models--{repo.replace('/', '--')}"
    return os.path.isdir(os.path.join(_client(".constants").HF_HUB_CACHE, name, "snapshots"))


def locate(ref: str, role: str, token: str | None = None) -> Place:
    """Resolve a reference to a commit, fetch its small root files, and address all its files.

    The place's `ref` names the commit. `role` names the input in errors; without `token` the one
    that the client has stored is used.
    In offline mode the place is what the cache holds of the revision. Raises UsageError for what
    is not there or may not be read, FormatError for a listing that cannot be, SkillvecError where
    the Hub cannot be reached.
    """
    what, asked = f"{role} {printable(ref)}", _parsed(ref)
    if asked is None:
        raise UsageError(
            f"{what}: expected org/name, org/name@revision or hf://org/name[@revision][/file]"
        )
    if asked.repo.startswith(OTHER_KINDS):
        raise UsageError(f"{what}: only repositories of models are read")
    repo, revision, hub = asked.repo, asked.revision, _client()
    if _client(".constants").HF_HUB_OFFLINE:
        folder = _snapshot(what, repo, revision=revision, local_files_only=True, allow_patterns=[])
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): os.fspath(path) for path in found}
        _check_member(asked, files, f"{what} (offline mode: in the cache)")
        return Place(asked.pinned(folder.name), folder, files, folder.name, asked.member)
    api = hub.HfApi(token=token)
    info = patiently(
        what,
        lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT),
        2,
    )
    listed = _listed(info, repo, token, what)
    _check_member(asked, listed, what)
    small = [name for name, remote in listed.items() if remote.is_describing]
    # by the revision as it was written: the cache then knows it in offline mode
    patterns = [glob.escape(name) for name in small]
    folder = _snapshot(what, repo, revision=revision, token=token, allow_patterns=patterns)
    if folder.name != info.sha:
        raise SkillvecError(f"{what}: {revision or 'main'} moved while it was read: try again")
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, remote in listed.items():
        if remote.is_describing:
            remote.check_file(os.fspath(folder / name))
        cached = hub.try_to_load_from_cache(repo, name, revision=info.sha)
        here = isinstance(cached, str) and os.path.getsize(cached) == remote.nbytes
        if here and remote.is_describing:
            files[name] = cached
            continue
        # by its address, wherever it lies: so a journal speaks of it that is older than its copy
        files[name] = remote.address
        remote.local = cached if here else None
        register_remote(remote.address, remote)
    return Place(asked.pinned(info.sha), folder, files, info.sha, asked.member)


def _snapshot(what: str, repo: str, **options: Any) -> Path:
    """Return the folder of a commit in the cache, with the files wanted in it."""
    counter = _counter(lambda received: None)
    download = _client().snapshot_download
    folder = Path(patiently(what, lambda: download(repo, tqdm_class=counter, **options)))
    if not COMMIT.fullmatch(folder.name):
        raise FormatError(f"{what}: {folder} is not named by a commit: is the cache broken?")
    return folder


def _listed(info: Any, repo: str, token: str | None, what: str) -> "dict[str, HubFile]":
    """Return the files of a listing by name; FormatError for one that cannot be."""
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise FormatError(f"{what}: the Hub names no commit: {str(info.sha)[:80]!r}")
    files = {}
    for entry in info.siblings or ():
        name, nbytes, lfs = entry.rfilename, entry.size, entry.lfs
        sha256 = lfs.sha256 if lfs else None
        if type(name) is not str or not is_plain(name):
            raise FormatError(f"{what}: a file named {str(name)[:200]!r}: no relative path")
        if type(nbytes) is not int or nbytes < 0 or (lfs and lfs.size != nbytes):
            raise FormatError(f"{what}: {name}: the Hub says no size that can be: {nbytes!r}")
        for digest, form in ((sha256, SHA256), (entry.blob_id, COMMIT)):
            if digest is not None and not (isinstance(digest, str) and form.fullmatch(digest)):
                raise FormatError(f"{what}: {name}: no digest: {str(digest)[:80]!r}")
        files[name] = HubFile(repo, info.sha, name, nbytes, sha256, entry.blob_id, token)
    return files


def _check_member(asked: Reference, files: Iterable[str], what: str) -> None:
    if asked.member is None or asked.member in files:
        return
    below = [name for name in files if name.startswith(f"{asked.member}/")]
    problem = f"{asked.member} is a folder: name one file of it" if below else "no such file"
    raise UsageError(f"{what}: {problem}:\n{up_to_five(below or sorted(files))}")


# ---------------------------------------------------------------------------------------- errors


def _client_errors() -> tuple[type[BaseException], ...]:
    """Return the roots of what the client raises: of its HTTP library, built in, of Xet."""
    return (*_client(".errors").HfHubHTTPError.__bases__, OSError, RuntimeError, *CONFUSED)


class _Patience:
    """Waits between tries, and turns the last error into one of ours."""

    def __init__(self, what: str, lost: int = TRIES) -> None:
        self.what, self.lost, self.failures = what, lost, 0

    def bear(self, error: BaseException, busy: tuple[int, ...] = BUSY) -> None:
        """Wait before another try; raise where another is of no use or was the last."""
        if isinstance(error, SkillvecError):
            raise error
        if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # "not in the cache", for want of an answer
        if obstacle := _obstacle(error):
            raise SkillvecError(f"{self.what}: {obstacle}") from None
        self.failures += 1
        seconds = _pause(error, self.failures, busy)
        most = self.lost if type(error).__name__ == "ConnectError" else TRIES
        if seconds is None or self.failures >= most:
            raise _explained(error, self.what) from None
        time.sleep(seconds)


def patiently(
    what: str, call: Callable[[], Result], lost: int = TRIES, busy: tuple[int, ...] = BUSY
) -> Result:
    """Return what `call` does, tried again where that can help; errors of the client become ours.

    `lost` is how often a connection may be refused: at the start of a run it may be no network.
    `busy` are the answers that another try may change.
    """
    patience = _Patience(what, lost)
    while True:
        try:
            return call()
        except _client_errors() as error:
            patience.bear(error, busy)


def written(what: str, call: Callable[[], Result], lost: int = TRIES) -> Result:
    """Return what a writing call gives, with sentences for what only a writer meets."""
    errors = _client(".errors")

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
    said = re.sub("//[^/@]*@", "//", str(_client(".constants").ENDPOINT))  # no password of it
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
    constants, session = _client(".constants"), _client(".utils").get_session()
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
        limit = _client(".utils").parse_ratelimit_headers(response.headers)
        if said.isdecimal() or (limit and limit.remaining == 0):
            seconds = int(said) if said.isdecimal() else limit.reset_in_seconds
            return float(seconds) if seconds <= LONGEST_WAIT else None
    elif type(error).__name__ in OFFLINE_KINDS or isinstance(error, CONFUSED):
        return None
    elif getattr(error, "errno", 0) and not isinstance(error, (ConnectionError, TimeoutError)):
        return None  # of this disk
    return float(2 ** (failures - 1))


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


# ----------------------------------------------------------------------------------------- files


@dataclass(eq=False)
class HubFile:
    """A file of a repository at a commit (storage.RemoteFile); safe to use from several threads.

    `oid` is git's, of the content unless LFS keeps it.
    """

    repo: str
    revision: str
    name: str
    nbytes: int
    sha256: str | None
    oid: str | None
    token: str | None = field(default=None, repr=False)
    local: str | None = None
    ranged = False  # large reads wait until it was fetched

    @property
    def address(self) -> str:
        return f"{SCHEME}{self.repo}@{self.revision}/{self.name}"

    def current_identity(self) -> tuple[int, str]:
        """Return size and digest: a commit does not change."""
        return self.nbytes, self.sha256 or self.oid or ""

    @property
    def is_describing(self) -> bool:
        """Whether it is a small file at the root that says what the model is."""
        return describes(self.name, self.nbytes)

    def read_range(self, offset: int, nbytes: int) -> bytes:
        """Return some bytes by range requests; the first MiB is asked for once."""
        end, head = offset + nbytes, b""
        if not 0 <= offset <= end <= self.nbytes:
            raise FormatError(f"{self.address}: bytes {offset} to {end} of {self.nbytes}")
        if offset < HEAD_NBYTES:
            head = _head_of(self)[offset:end]
        return head + b"".join(self.stream(offset + len(head), end))

    def stream(self, begin: int, end: int) -> Iterator[bytes]:
        """Yield bytes begin..end as they come; a broken connection is taken up where it broke."""
        utils = _client(".utils")
        url = _client().hf_hub_url(self.repo, self.name, revision=self.revision)
        headers = utils.build_hf_headers(token=self.token, library_name="skillvec")
        headers["Accept-Encoding"] = "identity"
        patience, at, mark = _Patience(self.address), begin, begin
        while at < end:
            headers["Range"] = f"bytes={at}-{end - 1}"
            try:
                with utils.http_stream_backoff(
                    "GET", url, headers=headers, timeout=TIMEOUT,
                    retry_on_exceptions=(), retry_on_status_codes=(),
                ) as response:  # fmt: skip
                    utils.hf_raise_for_status(response)
                    self._check_answer(response, at)
                    for chunk in response.iter_bytes():  # as received: nothing waits to be whole
                        piece = chunk[: end - at]
                        at += len(piece)
                        yield piece
                        if at == end:
                            return
                raise ConnectionError("an answer that ends too early")
            except _client_errors() as error:
                if at - mark >= HEAD_NBYTES:
                    patience.failures, mark = 0, at
                patience.bear(error)

    def _check_answer(self, response: Any, at: int) -> None:
        """Refuse an answer that begins elsewhere, or is of a file of another size."""
        begin, total = 0, "*"
        if response.status_code == 206:
            said = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", "")
            )
            begin, total = (int(said[1]), said[2]) if said else (-1, "*")
        if begin != at:
            raise FormatError(f"{self.address}: asked for byte {at} on, not served by range")
        if total not in ("*", str(self.nbytes)):
            raise FormatError(f"{self.address}: expected {self.nbytes} bytes, found {total}")

    def fetch(self, folder: Path | None = None, told: Told = lambda received: None) -> str:
        """Fetch the whole file into the cache, or into `folder`; check it and return its path.

        Raises FormatError for bytes that are not those listed; they are deleted.
        """
        if folder is not None:
            self.local = self._into(folder, told)
            return self.local
        path: str = patiently(
            self.address,
            lambda: _client().hf_hub_download(
                self.repo, self.name, revision=self.revision, token=self.token,
                tqdm_class=_counter(told),
            ),
            busy=SERVER_BUSY,  # for the others the client has waited
        )  # fmt: skip
        self.check_file(path)
        self.local = path
        return path

    def _into(self, folder: Path, told: Told) -> str:
        prefix = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        path = folder / f"{prefix}-{PurePosixPath(self.name).name}"
        hasher, received = self._hasher(), 0
        try:
            with open(path, "wb") as file:
                for piece in self.stream(0, self.nbytes):
                    file.write(piece)
                    hasher.update(piece)
                    received += len(piece)
                    told(received)
            self._check(received, hasher.hexdigest())
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and not isinstance(error, SkillvecError):
                raise OutputError(f"{path}: {error.strerror or error}") from None
            raise
        return os.fspath(path)

    def check_file(self, path: str) -> None:
        """Raise FormatError, and delete the file, where it is not what the listing says."""
        hasher, received = self._hasher(), 0
        try:
            with open(path, "rb") as file:
                while piece := file.read(HEAD_NBYTES):
                    hasher.update(piece)
                    received += len(piece)
            self._check(received, hasher.hexdigest())
        except FormatError:
            for wrong in (os.path.realpath(path), path):  # the blob, then the link to it
                Path(wrong).unlink(missing_ok=True)
            raise
        except OSError as error:
            raise SkillvecError(f"{self.address}: not in the cache: {error.strerror}") from None

    def _hasher(self) -> Any:
        """Return sha256 where LFS keeps the file, else the hash of git's blobs."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.nbytes)

    def _check(self, received: int, digest: str) -> None:
        expected = self.sha256 or self.oid or digest
        if (received, digest) != (self.nbytes, expected):
            raise TransferError(
                f"{self.address}: expected {self.nbytes} bytes with digest {expected}, received"
                f" {received} with {digest}; they were deleted: try again"
            )


@lru_cache(maxsize=16)  # not all shards of a large model at a time
def _head_of(file: HubFile) -> bytes:
    return b"".join(file.stream(0, min(HEAD_NBYTES, file.nbytes)))


def _counter(told: Told) -> Any:
    """Return a progress bar class that shows nothing and tells the bytes received."""
    bar: Any = _client(".utils").tqdm

    class Counter(bar):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.received = kwargs.get("initial") or 0
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            self.received += n or 0
            told(int(self.received))

    return Counter


def not_here(addresses: Iterable[str]) -> list[HubFile]:
    """Return the files of the Hub among the addresses that are not on this disk, each once."""
    remotes = [remote_of(address) for address in dict.fromkeys(addresses)]
    return [r for r in remotes if isinstance(r, HubFile) and r.local is None]


def fetch_all(addresses: Iterable[str], watcher: Watcher | None = None) -> None:
    """Fetch into the cache what is not on this disk, a few files at once, and check each."""
    files = not_here(addresses)
    total = sum(file.nbytes for file in files)

    def told(received: int) -> None:
        if watcher:
            watcher.advanced(received, total)

    side_by_side([partial(file.fetch, None) for file in files], told)


def side_by_side(calls: Sequence[Callable[[Told], object]], told: Told) -> None:
    """Run calls, a few at once; `told`, in this thread, gets the sum of the bytes they tell of.

    After an error, or an interrupt, the others end by an exception when they next tell.
    """
    stopped, moved = threading.Event(), [0] * len(calls)

    def run(number: int) -> None:
        def telling(nbytes: int) -> None:
            moved[number] = nbytes
            if stopped.is_set():
                raise SkillvecError("given up, because another file failed")

        calls[number](telling)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(run, number) for number in range(len(calls))}
        try:
            while running:
                done, running = wait(running, 0.1, "FIRST_EXCEPTION")
                for future in done:
                    future.result()
                told(sum(moved))
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


# --------------------------------------------------------------------------------------- outputs


def _target(ref: str) -> tuple[Reference, Any]:
    """Return what a reference to write to means, and the state of its repository."""
    asked = _parsed(ref)
    if asked is None or asked.repo.startswith(OTHER_KINDS):
        raise UsageError(f"output {printable(ref)}: expected hf://org/name[@branch][/file]")
    api = _client().HfApi()
    look = partial(api.model_info, asked.repo, revision=asked.revision, timeout=TIMEOUT)
    return asked, written(f"output {ref}", look, 2)


def names(ref: str) -> frozenset[str] | None:
    """Return the names that an output to `ref` would replace, "" for a file; None for none."""
    asked, info = _target(ref)
    found = [entry.rfilename for entry in info.siblings or ()]
    if asked.member is not None:
        return frozenset([""]) if asked.member in found else None
    return frozenset(filter(is_replaced, found)) - {README} or None


def upload(files: Mapping[str, Path], ref: str) -> None:
    """Commit files, by their names below `ref`, to a repository in one commit on what it is now.

    A single file has the name "", and its own name stands in `ref`. A folder takes the place of
    what `names` says. Readers see all of it or nothing; raises as `written` does.
    """
    asked, info = _target(ref)
    if (asked.member is None) == ("" in files):
        raise UsageError(
            f"output {ref}: a folder goes to hf://org/name, a single file to hf://org/name/file"
        )
    hub = _client()
    operations: list[Any] = [
        hub.CommitOperationAdd(path_in_repo=name or asked.member, path_or_fileobj=path)
        for name, path in files.items()
    ]
    if asked.member is None:
        old = sorted((names(ref) or set()) - set(files))
        operations += [hub.CommitOperationDelete(path_in_repo=name) for name in old]
    commit = partial(
        hub.HfApi().create_commit, asked.repo, operations,
        commit_message="Upload with skillvec", revision=asked.revision, parent_commit=info.sha,
    )  # fmt: skip
    written(f"output {ref}", commit)
