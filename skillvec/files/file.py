"""Reading files of this disk and of others by ranges, and digests of what was read.

Hides where a path leads: to the disk, or to a remote file that stands under it.
"""

import contextlib
import mmap
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, TypeGuard

from xxhash import xxh3_128

from skillvec.errors import FormatError, SkillvecError

LEAF_NBYTES = 1 << 20  # a digest is a tree of leaves, so that blocks can be hashed in any order
MiB = 1 << 20
READ = 1 << 30  # bytes that one call is asked for: macOS refuses 2 GiB and more
REQUESTS = 16  # for small ranges of remote files, at once


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
        from concurrent.futures import ThreadPoolExecutor  # with logging

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
            count = os.preadv(file.fd, [buffer[done : done + READ]], offset + done)
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
