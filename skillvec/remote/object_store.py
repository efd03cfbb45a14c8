"""Models in object stores: URLs of fsspec, objects read by ranges, and folders put there.

Hides fsspec and the stores' packages (s3fs, gcsfs), which find endpoint and credentials themselves
and in no other way. Small describing files come into a cache when a place is opened; every other
object is read range by range and never whole. An object that changes while it is read is noticed:
S3 and Google are asked for the very version that was listed, for other stores there is
`ObjectFile.current_identity`. What makes a model of a folder is put last, and until all is done an
object beside says that it is not, so an upload that breaks off leaves nothing that looks whole.
Listings are hostile until checked. Requests are retried here, a bounded number of times, on top of
what the packages do.
"""

import hashlib
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from skillvec.errors import FormatError, OutputError, SkillvecError, UsageError, needs, printable
from skillvec.files.file import REQUESTS, MiB, Place, register_remote
from skillvec.remote import hub
from skillvec.remote.files import (
    AT_ONCE,
    ReadByRange,
    Result,
    Told,
    check_listed,
    describes,
    is_replaced,
    retry,
    seconds_after,
    side_by_side,
)
from skillvec.remote.references import SCHEME

STORES = ("s3", "gs", "gcs", "az", "abfs", "abfss", "memory")
# what names one state of an object, by the key in fsspec's listings: the first that is there
VERSIONS = ("generation", "ETag", "etag", "LastModified", "last_modified", "mtime", "created")
TRIES = 4
PART_NBYTES = 16 * MiB  # of an upload in parts
MOST_PARTS = 10_000  # that S3 takes of one object
IN_FLIGHT_NBYTES = 64 * MiB  # of parts, of all files together; the client takes thrice the memory
# without these no reader takes a folder for a model, a vector, an adapter or a report
MANIFESTS = (
    "model.safetensors.index.json", "vector.safetensors.index.json", "model.safetensors",
    "adapter_model.safetensors", "report.json", "config.json",
)  # fmt: skip
UNFINISHED = ".skillvec-unfinished"  # an object in a folder while it is put there
DENIED = "may not be used with the credentials that the store's client found, or with none"
SENTENCES = {  # what errors of the stores' packages mean, by class; another try would not help
    "FileNotFoundError": "no such bucket or object",
    "PermissionError": DENIED,
    "NoCredentialsError": DENIED,
    "PartialCredentialsError": DENIED,
    "ProfileNotFound": DENIED,
    "DefaultCredentialsError": DENIED,
    "ParamValidationError": "not a name that a bucket or an object can have",
}


# ------------------------------------------------------------------------------------ references


def _store(url: str) -> Any:
    """Return fsspec's file system for a URL, one a process; UsageError where there is none."""
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    if scheme not in STORES or "::" in url:  # files of others name references too
        raise UsageError(f"{printable(url)}: expected hf:// or one of {', '.join(STORES)}")
    if "?" in url or re.search("//[^/]*:[^/]*@", url):
        shown = printable(re.sub("//[^/]*@", "//", url.partition("?")[0]))
        raise UsageError(
            f"{shown}: a password or a query in a URL would be kept in what is made of it: leave"
            " it to the configuration of the store's client"
        )
    with needs({"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme, "adlfs"), printable(url)):
        try:
            return url_to_fs(url, use_listings_cache=False)[0]
        except ValueError as error:
            raise UsageError(f"{printable(url)}: {error}") from None


def _patiently(what: str, url: str, call: Callable[[Any], Result]) -> Result:
    """Return what `call` does with the store, tried again where that can help."""
    return retry(partial(call, _store(url)), partial(_seconds_to_wait, what))


def _seconds_to_wait(what: str, error: Exception, failures: int) -> float:
    """Judge an error of a store (files.Patience); every store has its own kinds.

    The text of the packages' errors is not repeated: it may quote signed addresses.
    """
    if isinstance(error, SkillvecError | TypeError | AttributeError | KeyError):
        raise error
    kinds = [kind.__name__ for kind in type(error).__mro__]
    said = next((SENTENCES[kind] for kind in kinds if kind in SENTENCES), None)
    # gcsfs has no type of its own for these
    if str(getattr(error, "code", "")) in ("401", "403") or "Forbidden" in str(error)[:9]:
        said = DENIED
    if said is not None:
        raise UsageError(f"{what}: {said}") from None
    if "FileExpired" in kinds:
        raise _changed(what) from None
    if failures >= TRIES:
        raise SkillvecError(
            f"{what}: the store cannot be reached or keeps failing ({kinds[0]} after {TRIES}"
            " tries): check the network and the endpoint, then run the same command again"
        ) from None
    return seconds_after(failures)


def _changed(what: str) -> FormatError:
    return FormatError(f"{what}: has changed since it was opened: run the command again")


# ---------------------------------------------------------------------------------------- inputs


@dataclass(eq=False)
class ObjectFile(ReadByRange):
    """An object (file.RemoteFile); safe to use from several threads, and to pickle.

    `version` is key and value of what the listing says of its state.
    """

    url: str
    nbytes: int
    version: tuple[str, str]
    local: str | None = None
    ranged = True

    @property
    def address(self) -> str:
        return self.url

    def request(self, begin: int, end: int) -> bytes:
        key, value = self.version

        def read(store: Any) -> bytes:
            # of S3 only files ask for one version (If-Match), cat_file does not
            if "s3" in store.protocol and key == "ETag":
                found: bytes = _open_version(self, os.getpid())._fetch_range(begin, end)
            else:
                pin = {"generation": value} if key == "generation" else {}
                found = store.cat_file(self.url, begin, end, **pin)
            if len(found) != end - begin:
                raise ConnectionError("an answer that ends too early")
            return found

        return _patiently(self.url, self.url, read)

    def identity(self) -> tuple[int, str]:
        """Return size and version as they were when the place was opened."""
        return self.nbytes, self.version[1]

    def current_identity(self) -> tuple[int, str]:
        """Return size and version as the store says them now; raise where they have changed."""
        entry = _patiently(self.url, self.url, lambda store: store.info(self.url))
        if (entry["size"], _version(entry)[1]) != self.identity():
            raise _changed(self.url)
        return self.identity()


@lru_cache(maxsize=1024)
def _open_version(file: ObjectFile, process: int) -> Any:
    """Return s3fs's file, which asks by If-Match for the version that it finds when it is made."""
    pinned = _store(file.url).open(file.url, "rb", cache_type="none")
    if (pinned.details["size"], _version(pinned.details)[1]) != file.identity():
        raise _changed(file.url)
    return pinned


def _version(entry: Mapping[str, Any]) -> tuple[str, str]:
    key = next((key for key in VERSIONS if entry.get(key)), "")
    value = entry.get(key, "")
    return key, str(value.timestamp() if isinstance(value, datetime) else value)


def _list_objects(what: str, url: str) -> dict[str, ObjectFile]:
    """Return the objects at and below a URL by their names below it, "" for the one at it.

    Raises FormatError for names that are no relative paths, UsageError and SkillvecError.
    """

    def look(store: Any) -> dict[str, Any]:
        found: dict[str, Any] = store.find(url, detail=True)
        return found

    root = _store(url)._strip_protocol(url).rstrip("/")
    files = {}
    for path, entry in _patiently(what, url, look).items():
        inside = path == root or path.startswith(f"{root}/")
        name = path[len(root) + 1 :] if inside else f"/{path}"
        if path.endswith("/") or entry["type"] == "directory":
            continue  # an empty object that stands for a folder
        nbytes = entry["size"]
        check_listed(what, "an object", "the store", name or "it", nbytes)
        at = f"{url.rstrip('/')}/{name}" if name else url
        files[name] = ObjectFile(at, nbytes, _version(entry))
    return files


def locate(ref: str, role: str) -> Place:
    """List the objects below a URL, or the one at it, fetch the describing ones, address all.

    These come into a folder of the cache that is theirs by URL and by the version of each, so what
    has changed is never served from there; a store that says no versions is asked every time.
    `role` names the input in errors. Raises UsageError for what is not there or may not be read,
    FormatError for a listing that cannot be, SkillvecError where the store cannot be reached.
    """
    what = f"{role} {printable(ref)}"
    listed = _list_objects(what, ref)
    if not listed:
        raise UsageError(f"{what}: no such bucket or object, and none below it")
    if UNFINISHED in listed:
        raise FormatError(f"{what}: is being written, or an upload broke off: run that again")
    member = None
    if "" in listed:
        member = PurePosixPath(ref).name
        listed = {member: listed[""]}
    small = {n: f for n, f in listed.items() if member is None and describes(n, f.nbytes)}
    states = [(name, *file.identity()) for name, file in sorted(small.items())]
    folder = cache_folder("objects", ref, *states)
    if member is None:
        make_folder(folder)
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda name: _keep(small[name], folder / name), small))
    for file in listed.values():
        register_remote(file.url, file)
    files = {n: os.fspath(folder / n) if n in small else f.url for n, f in listed.items()}
    return Place(ref, folder, files, None, member)


def cache_folder(kind: str, *identity: object) -> Path:
    """Return the folder of the user's cache for what is identified so; perhaps it is not there.

    It lies below `$XDG_CACHE_HOME/skillvec`, or `~/.cache/skillvec`, named by a digest.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "skillvec" / kind / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}") from None


def _keep(file: ObjectFile, path: Path) -> None:
    """Bring a small object to a path of the cache, whole or not at all."""
    if file.version[1] and path.exists():
        return
    content = file.read_range(0, file.nbytes)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as kept:
            kept.write(content)
        os.replace(kept.name, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be kept: {error.strerror}") from None


# --------------------------------------------------------------------------------------- outputs


def names(url: str) -> frozenset[str] | None:
    """Return the names of what an output to a URL (hf:// too) meets there; None for nothing.

    They are those of files and folders right below it, "" alone for one object. What an upload
    left that broke off counts as nothing.
    """
    if url.startswith(SCHEME):
        return hub.list_replaced(url)
    found = _list_objects(f"output {url}", url)
    if UNFINISHED in found:
        return None
    return frozenset(name.partition("/")[0] for name in found) or None


def upload(source: Path, url: str, told: Told = lambda nbytes: None) -> None:
    """Put a file to a URL, or all files of a folder below it; what lay there before goes.

    Of an old folder these objects go: first, before anything is sent, those of `MANIFESTS`; at the
    end weights and describing files right below the URL (`is_replaced`). Hidden ones and what
    lies deeper stay. Large files are sent in parts, which the store puts together at the end;
    every size is checked. The file of `MANIFESTS` that the new folder is read by comes last; until
    all is done an object `UNFINISHED` lies beside. `told` gets the bytes sent so far. To hf://
    everything goes in one commit. Raises UsageError, SkillvecError; nothing that looks whole is
    then at the URL, unless a single file was there.
    """
    files = {"": source}
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.is_file())
        files = {path.relative_to(source).as_posix(): path for path in found}
    if url.startswith(SCHEME):
        return hub.commit_files(files, url)
    url = url.rstrip("/")
    old = _list_objects(f"output {url}", url)
    mark, last = "", ""
    if "" not in files:
        mark = f"{url}/{UNFINISHED}"
        _patiently(f"output {url}", url, lambda store: store.pipe_file(mark, b"by skillvec\n"))
        last = next((name for name in MANIFESTS if name in files), "")
    for name, file in old.items():
        if name in MANIFESTS or (name == "" and mark):
            _delete(file.url)
    first = [name for name in files if name != last]
    done = sum(files[name].stat().st_size for name in first)
    each = IN_FLIGHT_NBYTES // max(1, min(len(first), AT_ONCE))
    side_by_side([partial(_put, files[n], f"{url}/{n}", each) for n in first], told)
    if last in files:
        send = partial(_put, files[last], f"{url}/{last}" if last else url, IN_FLIGHT_NBYTES)
        side_by_side([send], lambda nbytes: told(done + nbytes))
    for name, file in old.items():
        stale = name == UNFINISHED and not mark  # of a folder whose upload broke off
        if stale or (name not in {*files, *MANIFESTS, ""} and is_replaced(name)):
            _delete(file.url)
    if mark:
        _delete(mark)


def _put(source: Path, url: str, in_flight: int, told: Told) -> None:
    """Send one file, in parts where it is large, and check that the store has all of it.

    `in_flight` bytes of parts may be on their way at once, but at least one part is.
    """
    from fsspec.callbacks import Callback

    nbytes = source.stat().st_size
    part = max(PART_NBYTES, -(-nbytes // MOST_PARTS // MiB) * MiB)  # Google wants whole 256 KiB
    wanted = {"chunksize": part, "max_concurrency": max(1, in_flight // part)}

    def put(store: Any) -> int:
        sent = Callback(hooks={"told": lambda size, value: told(value)})
        taken = inspect.signature(getattr(store, "_put_file", store.put_file)).parameters
        options = {name: value for name, value in wanted.items() if name in taken}
        store.put_file(os.fspath(source), url, callback=sent, **options)
        size: int = store.info(url)["size"]
        return size

    size = _patiently(f"output {url}", url, put)
    if size != nbytes:
        raise SkillvecError(f"output {url}: {nbytes} bytes were sent, the store says {size}")


def _delete(url: str) -> None:
    _patiently(f"output {url}", url, lambda store: store.rm_file(url))
