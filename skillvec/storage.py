"""Bytes on disk: safetensors headers, positioned reads, staged and durable writes, digests.

Hides the file system. Headers written by others are hostile until every rule of the format holds:
offsets tile the data exactly, sizes equal shape times dtype, the file ends where the header says.
Nothing here knows what a tensor means, and nothing imports torch.
"""

import contextlib
import errno
import json
import mmap
import os
import re
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
from xxhash import xxh3_64, xxh3_128

from skillvec.errors import FormatError, OutputError, SkillvecError, up_to_five
from skillvec.kernels import Bytes

MAX_HEADER_NBYTES = 100_000_000  # the cap of the official reader
MAX_DIMENSIONS = 64  # where numpy and torch end
MAX_SIZE = (1 << 63) - 1  # of a dimension and of an offset
LEAF_NBYTES = 1 << 20  # a digest is a tree of leaves, so that blocks can be hashed in any order
MiB = 1 << 20
REQUESTS = 16  # for small ranges of remote files, at once

# dtype name -> bytes per element; the packed and 8-bit float kinds are known so they can be named
ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
SUBBYTE = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # dtype name -> bits per element


class TensorSpec(NamedTuple):
    """Where a tensor lies: `start` is the absolute byte offset in the file at `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Header(NamedTuple):
    """A checked safetensors header: tensors in file order, and the string metadata."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    data_start: int


# -------------------------------------------------------------------------------- remote files


class RemoteFile(Protocol):
    """A file that is not on this disk; `local` is where its bytes lie once it was fetched.

    One that is `ranged` is never fetched: the engine reads the ranges that it needs.
    """

    nbytes: int
    local: str | None
    ranged: bool

    def current_identity(self) -> tuple[int, str]:
        """Return size and version as its place has them now."""

    def read_range(self, offset: int, nbytes: int) -> bytes:
        """Return some of its bytes without fetching it."""


class Place(NamedTuple):
    """Where a reference leads: a folder or a file of this disk, or a repository on the Hub.

    `path` is the folder or file, of the Hub the folder of its small files in the cache. `files`
    maps names in the folder to addresses: paths of this disk, or of remote files. `member` is the
    one file of it that is meant, `revision` the commit on the Hub.
    """

    ref: str
    path: Path
    files: dict[str, str]
    revision: str | None = None
    member: str | None = None


def shown(ref: str, path: Path) -> str:
    """Return where something lies, as reports say it: a URL as it was written, else its path."""
    return ref if "://" in ref else os.fspath(path)


_remotes: dict[str, RemoteFile] = {}  # by the path that stands for it in plans


def register_remote(path: str, remote: RemoteFile) -> None:
    """Let `path` (such as hf://org/name@COMMIT/file) stand for a file that is not here yet."""
    _remotes[path] = remote


def remote_of(path: str) -> RemoteFile | None:
    """Return the remote file that a path stands for, None for a path of this disk."""
    return _remotes.get(path)


_prefetched: dict[tuple[str, int, int], bytes] = {}  # what read_into will ask for, and takes out


def prefetch(ranges: Sequence[tuple[str, int, int]]) -> None:
    """Read small ranges (path, offset, bytes) of remote files side by side, for `read_into`."""
    away = [r for r in ranges if r[0] in _remotes and _remotes[r[0]].local is None and r[2]]
    if away:
        with ThreadPoolExecutor(REQUESTS) as pool:
            pieces = pool.map(lambda r: _remotes[r[0]].read_range(r[1], r[2]), away)
            _prefetched.update(zip(away, pieces, strict=True))


def local_path(path: str) -> str:
    """Return where the bytes of a path lie on this disk; SkillvecError where they are not here."""
    remote = _remotes.get(path)
    if remote is None:
        return path
    if remote.local is None:
        raise SkillvecError(f"{path}: not fetched")
    return remote.local


def file_nbytes(path: str) -> int:
    """Return the size of a file, wherever it lies; FormatError for a folder, a pipe, a device."""
    remote = _remotes.get(path)
    if remote is not None:
        return remote.nbytes
    nbytes = os.path.getsize(path)
    if not os.path.isfile(path):  # a pipe would wait for whoever writes into it
        raise FormatError(f"{path}: a folder, a pipe or a device, expected a file")
    return nbytes


def is_plain_name(name: object) -> TypeGuard[str]:
    """Return whether a name that someone wrote is that of a file in the folder itself."""
    return type(name) is str and name == os.path.basename(name) and name not in ("", ".", "..")


def read_bytes(path: str, offset: int, nbytes: int) -> bytes:
    """Return at most `nbytes` of a file from `offset` on, wherever it lies."""
    remote = _remotes.get(path)
    if remote is not None and remote.local is None:
        return remote.read_range(offset, nbytes)
    with open(local_path(path), "rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON as a dict; ValueError for a key that stands twice, for readers of
    which some take the first and some the last."""
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return keys


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes a tensor takes; raise ValueError for a dtype the format does not have."""
    if dtype in ITEMSIZE:
        return ITEMSIZE[dtype] * prod(shape)
    if dtype in SUBBYTE:
        nbits = SUBBYTE[dtype] * prod(shape)
        if nbits % 8:
            raise ValueError(f"{dtype} x {list(shape)} does not fill whole bytes")
        return nbits // 8
    raise ValueError(f"unknown dtype {dtype!r}")


def _checked_spec(path: str, name: str, entry: Any, data_start: int) -> TensorSpec:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("expected exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        # checked before the sizes are multiplied, which takes long where they are many
        if not isinstance(numbers, list) or len(numbers) > MAX_DIMENSIONS or any(
            type(n) is not int or not 0 <= n <= MAX_SIZE for n in numbers
        ):  # fmt: skip
            raise ValueError(
                f"{key} is not a list of at most {MAX_DIMENSIONS} non-negative integers:"
                f" {str(numbers)[:80]}"
            )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {offsets} are not [begin, end]")
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    nbytes = tensor_nbytes(entry["dtype"], tuple(shape))
    if nbytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"{entry['dtype']} x {shape} takes {nbytes} bytes, data_offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorSpec(name, entry["dtype"], tuple(shape), path, data_start + offsets[0], nbytes)


# what else is found under the name of safetensors: bytes at an offset, what they begin, what to do
OTHERS = (
    (0, b"PK\3\4", "a zip archive", "if torch.save wrote it, name it .pt or .bin; a TorchScript"
     " module has to be loaded and its state dict saved as safetensors"),
    *((0, bytes([128, n]), "a pickle", "load it with torch, save it as safetensors")
      for n in (2, 3, 4, 5)),
    (0, b"GGUF", "GGUF", "diff and apply the safetensors that it was made from, then convert"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (0, b"BZh", "a bzip2 archive", "unpack it"),
    (0, b"\xfd7zXZ\0", "an xz archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"\x89HDF\r\n", "HDF5 (Keras, TensorFlow)", "load it with its library, then save"),
    (0, b"\x93NUMPY", "a numpy array", "save it by safetensors.numpy.save_file"),
    (0, b"version http", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
)  # fmt: skip
TEXT = re.compile(rb"(\xef\xbb\xbf)?[\t\n\r\x20-\x7e]+")


def seems(path: str, nbytes: int) -> str | None:
    """Return what a file is by its first bytes and what to do with it; None where they say nothing.

    For errors alone: it is asked when a file is not what its name says.
    """
    head = read_bytes(path, 0, min(512, nbytes))
    for at, magic, what, advice in OTHERS:
        if head.startswith(magic, at) and head[8:9] != b"{":  # there JSON would begin
            return f"{what} by its first bytes: {advice}"
    if head and TEXT.fullmatch(head[:64]):
        said = head[:40].decode("ascii", "replace").strip()
        return f"text that begins with {said!r}, perhaps an error page: download the file again"
    if len(head) > 8 and not any(head):
        return "zeros, as an interrupted download leaves them: download the file again"
    return None


def _no_header(path: str, nbytes: int, problem: str) -> FormatError:
    """Return the error for a file that does not begin like safetensors."""
    found = seems(path, nbytes)
    return FormatError(f"{path}: {f'not safetensors, but {found}' if found else problem}")


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file without touching its data.

    Returns tensors in the order of their data. Raises FormatError naming the file, the tensor and
    the broken rule, or what the file is instead; OSError where the file cannot be read.
    """
    path = os.fspath(path)
    witness(path)
    nbytes = file_nbytes(path)
    header, data_start = _parsed_header(path, nbytes)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null, as mlx writes it
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ is not a map of strings")
    specs = []
    for name, entry in header.items():
        try:
            specs.append(_checked_spec(path, name, entry, data_start))
        except ValueError as error:
            raise FormatError(f"{path}: tensor {name!r:.200}: {str(error)[:200]}") from None
    specs.sort(key=lambda spec: (spec.start, spec.nbytes))
    position = data_start
    for spec in specs:
        if spec.start != position:
            rule = "overlaps the tensor before it" if spec.start < position else "leaves a gap"
            raise FormatError(
                f"{path}: tensor {spec.name!r:.200} begins at byte {spec.start} and {rule}"
                f" (expected {position})"
            )
        position += spec.nbytes
    if position != nbytes:
        rule = "truncated" if position > nbytes else "bytes behind the last tensor"
        raise FormatError(f"{path}: expected {position} bytes, found {nbytes}: {rule}")
    return Header({spec.name: spec for spec in specs}, metadata, data_start)


def _parsed_header(path: str, nbytes: int) -> tuple[dict[str, Any], int]:
    """Return the JSON object that a file of safetensors begins with, and where its data begins."""
    prefix = read_bytes(path, 0, min(8, nbytes))
    if len(prefix) < 8:
        raise _no_header(path, nbytes, f"{nbytes} bytes are too few for a safetensors file")
    (header_nbytes,) = struct.unpack("<Q", prefix)
    if header_nbytes > MAX_HEADER_NBYTES:
        cap = f"header of {header_nbytes} bytes, over the cap of {MAX_HEADER_NBYTES}"
        raise _no_header(path, nbytes, f"{cap} (not a safetensors file?)")
    if 8 + header_nbytes > nbytes:
        problem = f"header of {header_nbytes} bytes in a file of {nbytes}: truncated"
        raise _no_header(path, nbytes, problem)
    raw = read_bytes(path, 8, header_nbytes)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=refuse_duplicates)
        if b"\\u" in raw:  # escaped lone surrogates are no text
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _no_header(path, nbytes, f"header is not valid JSON: {error}") from None
    if not raw.startswith(b"{") or not isinstance(header, dict):
        raise _no_header(path, nbytes, "header is not a JSON object")
    return header, 8 + header_nbytes


def encode_header(
    layout: list[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    reserved_nbytes: int | None = None,
) -> bytes:
    """Return length prefix and JSON header for tensors laid end to end in the given order.

    `layout` holds (name, dtype, shape). The header is padded with blanks to a multiple of 8, or to
    `reserved_nbytes` (prefix included), so that it can be rewritten when the digests are known.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in layout:
        end = position + tensor_nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    nbytes = -(-len(raw) // 8) * 8 if reserved_nbytes is None else reserved_nbytes - 8
    if nbytes > MAX_HEADER_NBYTES:
        raise OutputError(f"header of {nbytes} bytes, over the format's cap of {MAX_HEADER_NBYTES}")
    assert len(raw) <= nbytes, "the reserved header is too small"
    return struct.pack("<Q", nbytes) + raw.ljust(nbytes)


def header_layout(header: bytes) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, dtype, shape) of the tensors in what `encode_header` has made."""
    said = json.loads(header[8:])
    return [(n, e["dtype"], tuple(e["shape"])) for n, e in said.items() if n != "__metadata__"]


def refuse_misread(
    path: str,
    layout: Iterable[tuple[str, str, tuple[int, ...]]],
    error: type[SkillvecError] = OutputError,
) -> None:
    """Raise `error` where the safetensors package does not find the tensors of `layout` in a file.

    `layout` holds (name, dtype, shape); the package's own reader opens the file, and reads no more
    than its header. A dtype that this version of it does not know is no fault of the file: then
    nothing is said.
    """
    from safetensors import SafetensorError, safe_open

    expected = {name: (dtype, list(shape)) for name, dtype, shape in layout}
    try:
        with safe_open(path, framework="numpy") as file:  # which needs no torch
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except SafetensorError as problem:
        if all(_is_known_dtype(dtype) for dtype in {dtype for dtype, _ in expected.values()}):
            raise error(f"{path}: the safetensors package cannot open it: {problem}") from None
        return
    if found != expected:
        pairs = {name: (expected.get(name), found.get(name)) for name in expected | found}
        wrong = [
            f"{name}: expected {_described(one)}, found {_described(other)}"
            for name, (one, other) in pairs.items()
            if one != other
        ]
        raise error(f"{path}: the safetensors package reads other tensors:\n{up_to_five(wrong)}")


def _described(entry: tuple[str, list[int]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} {entry[1]}"


def _is_known_dtype(dtype: str) -> bool:
    """Return whether the installed safetensors package has a dtype, by an empty tensor of it."""
    library: Any = import_module("safetensors")
    try:
        library.deserialize(encode_header([("empty", dtype, (0,))], {}))
    except library.SafetensorError:
        return False
    return True


def refuse_misread_files(specs: Iterable[TensorSpec], error: type[SkillvecError]) -> None:
    """Raise `error` as `refuse_misread` does for the files of this disk that tensors lie in."""
    layouts: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for spec in specs:
        remote = remote_of(spec.path)
        if remote is None or remote.local is not None:
            layouts.setdefault(local_path(spec.path), []).append(spec[:3])
    for path, layout in layouts.items():
        refuse_misread(path, layout, error)


# ------------------------------------------------------------------------------------- digests


def leaf_digests(block: memoryview) -> bytes:
    """Return the XXH3-128 digests of each 1 MiB piece of `block`, end to end."""
    if len(block) <= LEAF_NBYTES:
        return xxh3_128(block).digest() if len(block) else b""
    return b"".join(
        xxh3_128(block[at : at + LEAF_NBYTES]).digest() for at in range(0, len(block), LEAF_NBYTES)
    )


def fold_digest(leaves: bytes | bytearray) -> str:
    """Return the digest of a byte range from its leaves: XXH3-128 over them, as 32 hex digits.

    Finds accidents (another checkpoint, a flipped bit); it is no proof against a forger.
    """
    return xxh3_128(leaves).hexdigest()


def digest_bytes(content: bytes) -> str:
    """Return the digest of bytes held in memory."""
    return fold_digest(leaf_digests(memoryview(content)))


def digest_file_range(path: str, start: int, nbytes: int) -> str:
    """Return the digest of a byte range of a file, reading 8 MiB at a time."""
    leaves = bytearray()
    step = 8 * LEAF_NBYTES
    buffer = memoryview(allocate(min(step, nbytes) or 1))
    for at in range(0, nbytes, step):
        piece = buffer[: min(step, nbytes - at)]
        read_into(path, start + at, piece)
        leaves += leaf_digests(piece)
    return fold_digest(leaves)


# --------------------------------------------------------------------------------------- reads


def allocate(nbytes: int) -> mmap.mmap:
    """Return zeroed anonymous memory on huge pages: first touch is 7 times cheaper than on small.

    The map is private to the process and is given back when the last view of it goes.
    """
    memory = mmap.mmap(-1, -(-nbytes // (2 * MiB)) * 2 * MiB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # no huge pages here: only slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _OpenFile:
    """A file descriptor that closes itself when the cache drops it."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.fd)


@lru_cache(maxsize=128)
def _open_file(path: str, identity: tuple[int, int, int]) -> _OpenFile:
    return _OpenFile(path)


_identities: dict[str, tuple[int, int, int]] = {}
_witnessed: dict[str, tuple[int, int]] = {}  # size and mtime of files whose headers were read
SAMPLES, SAMPLE_NBYTES = 16, 4096


def witness(path: str) -> None:
    """Remember the state of a file whose header is about to be read, for `fingerprints`."""
    if remote_of(path) is None:
        stat = os.stat(path)
        _witnessed[path] = stat.st_size, stat.st_mtime_ns
        forget_open_file(path)  # it may be of the file that was here before


def witnessed(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the states that files had when their headers were read."""
    return {path: _witnessed[path] for path in paths if path in _witnessed}


def refuse_stale(seen: Mapping[str, tuple[int, int]]) -> None:
    """Raise FormatError where a header was read again since, and the file was another then."""
    for path, state in seen.items():
        if _witnessed[path] != state:
            raise FormatError(f"{path}: changed since its header was read: open it again")


def fingerprints(paths: Iterable[str]) -> dict[str, list[Any]]:
    """Return size, time of the last change and digest of samples of files, by path.

    Of remote files: what their place says of them. Raises FormatError for a file that is not what
    it was when its header was read, SkillvecError for one that cannot be read.
    """
    found = {path: _fingerprint(path) for path in paths}
    for path, (nbytes, time, _) in ((p, f) for p, f in found.items() if p in _witnessed):
        if _witnessed[path] != (nbytes, time):
            raise FormatError(f"{path}: changed since its header was read")
    return found


def _fingerprint(path: str) -> list[Any]:
    remote = remote_of(path)
    if remote is not None:
        return list(remote.current_identity())
    hashed, buffer = xxh3_64(), bytearray(SAMPLE_NBYTES)
    try:
        with open(path, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            for number in range(SAMPLES):
                file.seek(max(stat.st_size - SAMPLE_NBYTES, 0) * number // (SAMPLES - 1))
                hashed.update(memoryview(buffer)[: file.readinto(buffer)])
    except OSError as error:
        raise SkillvecError(f"{path}: cannot be read: {error.strerror or error}") from None
    return [stat.st_size, stat.st_mtime_ns, hashed.hexdigest()]


def changes(before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> list[str]:
    """Say of files with two fingerprints what is no longer the same."""
    found = []
    for path in (path for path in before if path in after and before[path] != after[path]):
        kinds = (
            ("size", "modification time", "content") if "://" not in path else ("size", "version")
        )
        pairs = zip(kinds, before[path], after[path], strict=True)
        found.append(f"{path}: another {', '.join(k for k, old, new in pairs if old != new)}")
    return found


def refuse_changed(before: Mapping[str, list[Any]]) -> None:
    """Raise FormatError where a file is not what it was when its fingerprint was taken."""
    changed = changes(before, {path: _fingerprint(path) for path in before})
    if changed:
        raise FormatError(f"changed while they were read:\n{up_to_five(changed)}")


def read_into(path: str, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `path` at `offset`.

    Raises FormatError where the file ends before, SkillvecError where it cannot be read.
    """
    done = 0
    remote = _remotes.get(path)
    if remote is not None:
        if remote.local is None:
            held = _prefetched.pop((path, offset, len(buffer)), None)
            buffer[:] = remote.read_range(offset, len(buffer)) if held is None else held
            return
        path = remote.local
    try:
        status = _identities.get(path)
        if status is None:
            stat = os.stat(path)
            status = _identities[path] = (stat.st_dev, stat.st_ino, stat.st_mtime_ns)
        file = _open_file(path, status)
        while done < len(buffer):
            count = os.preadv(file.fd, [buffer[done:]], offset + done)
            if count == 0:
                raise FormatError(
                    f"{path}: the file ends at byte {os.fstat(file.fd).st_size}, expected"
                    f" {offset + len(buffer)}: did it change while it was read?"
                )
            done += count
    except OSError as error:
        raise SkillvecError(f"{path}: cannot be read: {error.strerror or error}") from None


def forget_open_file(path: str) -> None:
    """Have the next read of a path open the file that lies there then."""
    _identities.pop(path, None)


def forget_open_files() -> None:
    """Close every file held open for reading."""
    _open_file.cache_clear()
    _identities.clear()


# -------------------------------------------------------------------------------------- writes


def explain(error: OSError, path: str) -> OutputError:
    """Return what a failed write means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: the disk is full ({error.strerror}); nothing was published")
    return OutputError(f"{path}: {error.strerror or error}; nothing was published")


def available_memory_nbytes() -> int:
    """Return what the kernel says is available without swapping (Linux), else 8 GiB."""
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30


class OutputFile:
    """One file of known or growing size, written at planned offsets from any thread.

    One that an interrupted run has left is written over; `sync` cuts it to its size. Write-back
    starts after every 64 MiB, so that little is left for `sync`. With `windowed`, pages 512 MiB
    back are dropped too: a large writer is then never throttled for dirty pages. One that is
    `shared` lies there, other machines write to it too, and this one only writes.
    """

    START, DROP = 64 * MiB, 512 * MiB

    def __init__(
        self, path: str, nbytes: int, windowed: bool = False, shared: bool = False
    ) -> None:
        self.path, self.nbytes, self._windowed = path, nbytes, windowed
        self._lock, self._front, self._started, self._fd = threading.Lock(), 0, 0, -1
        self._allocated = 0
        # NFS writes a page that it has read back whole, with what others have changed in it since
        mode = os.O_WRONLY if shared else os.O_RDWR | os.O_CREAT
        try:
            self._fd = os.open(path, mode | os.O_NOFOLLOW, 0o666)
            if shared:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._allocate(nbytes)
        except OSError as error:
            self.close()
            raise explain(error, path) from None

    def _allocate(self, nbytes: int) -> None:
        """Give the file extents up to `nbytes`: writes are 1.8 times faster, a full disk shows."""
        if nbytes <= self._allocated:
            return
        try:
            os.posix_fallocate(self._fd, self._allocated, nbytes - self._allocated)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._fd, nbytes)
        self._allocated = nbytes

    def reserve(self, nbytes: int) -> int:
        """Return the offset of `nbytes` more at the end; for one caller at a time.

        Extents are taken up to 64 MiB ahead, to the byte where the disk has no more.
        """
        offset, self.nbytes = self.nbytes, self.nbytes + nbytes
        try:
            try:
                if self.nbytes > self._allocated:
                    self._allocate(self.nbytes + min(offset, self.START))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._allocate(self.nbytes)
        except OSError as error:
            raise explain(error, self.path) from None
        return offset

    def write(self, offset: int, buffer: memoryview | bytes) -> None:
        """Write `buffer` at the absolute `offset`; raise OutputError on a full disk."""
        view = memoryview(buffer)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise explain(error, self.path) from None
        self._advance(offset + len(view))

    def _advance(self, end: int) -> None:
        with self._lock:
            self._front = max(self._front, end)
            begin = self._started
            if self._front - begin < self.START:
                return
            self._started = front = self._front
        # on dirty pages the advice starts write-back without waiting, on clean ones it drops them
        os.posix_fadvise(self._fd, begin, front - begin, os.POSIX_FADV_DONTNEED)
        if self._windowed and front > self.DROP:
            os.posix_fadvise(self._fd, 0, front - self.DROP, os.POSIX_FADV_DONTNEED)

    def holds(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with what lies at `offset`; False where the file ends before."""
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
                if not count:
                    return False
                done += count
        except OSError as error:
            raise explain(error, self.path) from None
        return True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what was written at `offset`."""
        if not self.holds(offset, buffer):
            raise OutputError(f"{self.path}: is shorter than what was written to it")

    def copy(self, offset: int, source: int, start: int, nbytes: int) -> None:
        """Copy a range of an open file to `offset`: the file system itself does it where it can."""
        end = offset + nbytes
        try:
            while offset < end:
                done = _copy_range(source, self._fd, end - offset, start, offset)
                offset, start = offset + done, start + done
        except OSError as error:
            raise explain(error, self.path) from None

    def append(self, buffer: bytes | memoryview) -> None:
        """Write behind the end; for one caller at a time."""
        self.write(self.reserve(len(buffer)), buffer)

    def sync(self) -> None:
        """Give back what was allocated ahead and wait until every byte is on the disk."""
        try:
            if os.fstat(self._fd).st_size > self.nbytes:
                os.ftruncate(self._fd, self.nbytes)
            os.fsync(self._fd)
        except OSError as error:
            raise explain(error, self.path) from None

    def flush(self) -> None:
        """Wait until every byte written so far is on the disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise explain(error, self.path) from None

    def hand_over(self) -> None:
        """Flush, and keep no page in memory: other machines write to the file, or have done so."""
        self.flush()
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _copy_range(source: int, output: int, nbytes: int, start: int, offset: int) -> int:
    """Copy some of the bytes of a range and return how many; OSError where the source ends."""
    done = 0
    try:
        done = os.copy_file_range(source, output, nbytes, start, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    done = done or os.pwrite(output, os.pread(source, min(nbytes, 8 * MiB), start), offset)
    if not done:
        raise OSError(errno.EIO, "what is copied has fewer bytes than were written")
    return done


class Turns:
    """Lets workers in one after the other, in the order of their numbers from `first` on."""

    def __init__(self, first: int = 0) -> None:
        self._changed, self._next, self._stopped = threading.Condition(), first, False

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[bool]:
        """Wait for the turn of `number` and hold it; False if the run has failed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == number or self._stopped)
            yield not self._stopped
            self._next += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let all who wait go."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class RowWriter:
    """Takes rows of pieces from any thread and places them in the order of their numbers.

    What a row is, and where its pieces go, is for the classes below. A worker waits until the rows
    before its own have their places, then writes its own without waiting: so the bytes do not
    depend on the worker count, no size has to be known before, and nothing is held in memory.
    """

    def __init__(self, rows: int, pieces: int) -> None:
        self._turns = Turns()
        self.sizes = np.zeros((rows, pieces), np.uint32)  # bytes of each piece
        self.marks = np.zeros(rows, np.uint64)  # digests, for those who resume

    @property
    def files(self) -> list[OutputFile]:
        """The files that rows have been written to."""
        raise NotImplementedError

    def place(self, row: int, sizes: Sequence[int]) -> list[tuple[OutputFile, int]]:
        """Return file and offset of every piece of a row; for one caller at a time, in order."""
        raise NotImplementedError

    def add(self, row: int, pieces: Sequence[Bytes]) -> None:
        """Write the pieces of one row, in its turn."""
        sizes, mark = [piece.size for piece in pieces], mark_of(pieces)
        with self._turn(row) as mine:
            if not mine:
                return
            places = self.accept(row, sizes, mark)
        for (file, offset), piece in zip(places, pieces, strict=True):
            if piece.size:
                file.write(offset, piece.data)

    def _turn(self, row: int) -> contextlib.AbstractContextManager[bool]:
        return self._turns.turn(row)

    def accept(self, row: int, sizes: Sequence[int], mark: int) -> list[tuple[OutputFile, int]]:
        """Record and place the next row, which the caller sees written; return its places."""
        self.sizes[row], self.marks[row] = sizes, mark
        return self.place(row, sizes)

    def line(self, row: int) -> list[int]:
        """Return what a journal keeps of a row that was written."""
        return [*self.sizes[row].tolist(), int(self.marks[row])]

    def restore(self, row: int, line: Sequence[int]) -> None:
        """Place the next row, which an interrupted run has written; FormatError if it is not so."""
        *sizes, mark = line
        self._confirm(self.accept(row, sizes, mark), sizes, mark)
        self._turns = Turns(row + 1)

    def _confirm(
        self, places: Sequence[tuple[OutputFile, int]], sizes: Sequence[int], mark: int
    ) -> None:
        pieces = [np.empty(size, np.uint8) for size in sizes]
        there = [f.holds(at, p.data) for (f, at), p in zip(places, pieces, strict=True)]
        if not all(there) or mark_of(pieces) != mark:
            raise FormatError(
                f"{places[0][0].path}, or a file beside it, is not what the journal says, so all"
                " that was unfinished was removed: run the same command again"
            )

    def stop(self) -> None:
        """Let waiting workers go: the run has failed."""
        self._turns.stop()


def mark_of(pieces: Sequence[Bytes]) -> int:
    """Return XXH3-64 over pieces, end to end."""
    hashed = xxh3_64()
    for piece in pieces:
        hashed.update(piece.data)
    return hashed.intdigest()


class Segment(RowWriter):
    """Keeps rows in one file in the order in which they come; `offsets` says where."""

    def __init__(self, path: str, rows: int, pieces: int) -> None:
        super().__init__(rows, pieces)
        self.offsets: dict[int, int] = {}
        self.file = OutputFile(path, 0)
        self._lock = threading.Lock()

    @property
    def files(self) -> list[OutputFile]:
        return [self.file]

    def place(self, row: int, sizes: Sequence[int]) -> list[tuple[OutputFile, int]]:
        offset = self.offsets[row] = self.file.reserve(sum(sizes))
        return self._places(offset, sizes)

    @contextlib.contextmanager
    def _turn(self, row: int) -> Iterator[bool]:
        with self._lock:
            yield True

    def _places(self, offset: int, sizes: Sequence[int]) -> list[tuple[OutputFile, int]]:
        return [(self.file, offset + sum(sizes[:i])) for i in range(len(sizes))]

    def line(self, row: int) -> list[int]:
        return [self.offsets[row], *super().line(row)]

    def restore(self, row: int, line: Sequence[int]) -> None:
        offset, *sizes, mark = line
        self.offsets[row], self.sizes[row], self.marks[row] = offset, sizes, mark
        self.file.reserve(max(offset + sum(sizes) - self.file.nbytes, 0))
        self._confirm(self._places(offset, sizes), sizes, mark)

    def read(self, row: int) -> list[Bytes]:
        """Return the pieces of a row."""
        content = np.empty(int(self.sizes[row].sum()), np.uint8)
        self.file.read_into(self.offsets[row], content.data)
        return np.split(content, np.cumsum(self.sizes[row])[:-1])


def fsync_path(path: str) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_file(source: str, output: str) -> None:
    """Copy a file's bytes, and of a local one the permission bits, durably."""
    remote = remote_of(source)
    try:
        if remote is not None and remote.ranged:
            with open(output, "wb") as file:
                for at in range(0, remote.nbytes, 8 * MiB):
                    file.write(remote.read_range(at, min(8 * MiB, remote.nbytes - at)))
        else:
            shutil.copyfile(local_path(source), output)
            shutil.copymode(local_path(source), output)
        fsync_path(output)
    except OSError as error:
        if isinstance(error, SkillvecError):
            raise
        raise explain(error, output) from None
