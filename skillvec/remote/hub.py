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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from skillvec.errors import (
    FormatError,
    OutputError,
    SkillvecError,
    TransferError,
    UsageError,
    printable,
    up_to_five,
)
from skillvec.files.file import Place, register_remote, remote_of
from skillvec.remote.files import (
    HEAD_NBYTES,
    Patience,
    ReadByRange,
    Told,
    check_listed,
    describes,
    is_replaced,
    side_by_side,
)
from skillvec.remote.hub_client import (
    README,
    SERVER_BUSY,
    TIMEOUT,
    client,
    judge_of,
    patiently,
    written,
)
from skillvec.remote.references import COMMIT, SCHEME, Reference, parse
from skillvec.report import Watcher

OTHER_KINDS = ("datasets/", "spaces/", "buckets/", "kernels/")
SHA256 = re.compile("[0-9a-f]{64}")


def is_cached(repo: str) -> bool:
    """Return whether some of a repository's files are in the client's cache on this disk."""
    name = f"models--{repo.replace('/', '--')}"
    return os.path.isdir(os.path.join(client(".constants").HF_HUB_CACHE, name, "snapshots"))


def locate(ref: str, role: str, token: str | None = None) -> Place:
    """Resolve a reference to a commit, fetch its small root files, and address all its files.

    The place's `ref` names the commit. `role` names the input in errors; without `token` the one
    that the client has stored is used.
    In offline mode the place is what the cache holds of the revision. Raises UsageError for what
    is not there or may not be read, FormatError for a listing that cannot be, SkillvecError where
    the Hub cannot be reached.
    """
    what, asked = f"{role} {printable(ref)}", parse(ref)
    if asked is None:
        raise UsageError(
            f"{what}: expected org/name, org/name@revision or hf://org/name[@revision][/file]"
        )
    if asked.repo.startswith(OTHER_KINDS):
        raise UsageError(f"{what}: only repositories of models are read")
    repo, revision, hub = asked.repo, asked.revision, client()
    if client(".constants").HF_HUB_OFFLINE:
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
    listed = _check_listing(info, repo, token, what)
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
    download = client().snapshot_download
    folder = Path(patiently(what, lambda: download(repo, tqdm_class=counter, **options)))
    if not COMMIT.fullmatch(folder.name):
        raise FormatError(f"{what}: {folder} is not named by a commit: is the cache broken?")
    return folder


def _check_listing(info: Any, repo: str, token: str | None, what: str) -> "dict[str, HubFile]":
    """Return the files of a listing by name; FormatError for one that cannot be."""
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise FormatError(f"{what}: the Hub names no commit: {str(info.sha)[:80]!r}")
    files = {}
    for entry in info.siblings or ():
        name, nbytes, lfs = entry.rfilename, entry.size, entry.lfs
        sha256 = lfs.sha256 if lfs else None
        check_listed(what, "a file", "the Hub", name, nbytes)
        if lfs and lfs.size != nbytes:
            raise FormatError(
                f"{what}: {name}: the Hub says no size that can be: {nbytes}, in LFS {lfs.size!r}"
            )
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


# ----------------------------------------------------------------------------------------- files


@dataclass(eq=False)
class HubFile(ReadByRange):
    """A file of a repository at a commit (file.RemoteFile); safe to use from several threads.

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

    def request(self, begin: int, end: int) -> bytes:
        return b"".join(self.stream(begin, end))

    def stream(self, begin: int, end: int) -> Iterator[bytes]:
        """Yield bytes begin..end as they come; a broken connection is taken up where it broke."""
        utils = client(".utils")
        url = client().hf_hub_url(self.repo, self.name, revision=self.revision)
        headers = utils.build_hf_headers(token=self.token, library_name="skillvec")
        headers["Accept-Encoding"] = "identity"
        patience, at, mark = Patience(judge_of(self.address)), begin, begin
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
            except Exception as error:
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
            lambda: client().hf_hub_download(
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


def _counter(told: Told) -> Any:
    """Return a progress bar class that shows nothing and tells the bytes received."""
    bar: Any = client(".utils").tqdm

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


# --------------------------------------------------------------------------------------- outputs


def _target(ref: str) -> tuple[Reference, Any]:
    """Return what a reference to write to means, and the state of its repository."""
    asked = parse(ref)
    if asked is None or asked.repo.startswith(OTHER_KINDS):
        raise UsageError(f"output {printable(ref)}: expected hf://org/name[@branch][/file]")
    api = client().HfApi()
    look = partial(api.model_info, asked.repo, revision=asked.revision, timeout=TIMEOUT)
    return asked, written(f"output {ref}", look, 2)


def list_replaced(ref: str) -> frozenset[str] | None:
    """Return the names that an output to `ref` would replace, "" for a file; None for none."""
    asked, info = _target(ref)
    found = [entry.rfilename for entry in info.siblings or ()]
    if asked.member is not None:
        return frozenset([""]) if asked.member in found else None
    return frozenset(filter(is_replaced, found)) - {README} or None


def commit_files(files: Mapping[str, Path], ref: str) -> None:
    """Commit files, by their names below `ref`, to a repository in one commit on what it is now.

    A single file has the name "", and its own name stands in `ref`. A folder takes the place of
    what `list_replaced` says. Readers see all of it or nothing; raises as `written` does.
    """
    asked, info = _target(ref)
    if (asked.member is None) == ("" in files):
        raise UsageError(
            f"output {ref}: a folder goes to hf://org/name, a single file to hf://org/name/file"
        )
    hub = client()
    operations: list[Any] = [
        hub.CommitOperationAdd(path_in_repo=name or asked.member, path_or_fileobj=path)
        for name, path in files.items()
    ]
    if asked.member is None:
        old = sorted((list_replaced(ref) or set()) - set(files))
        operations += [hub.CommitOperationDelete(path_in_repo=name) for name in old]
    commit = partial(
        hub.HfApi().create_commit, asked.repo, operations,
        commit_message="Upload with skillvec", revision=asked.revision, parent_commit=info.sha,
    )  # fmt: skip
    written(f"output {ref}", commit)
