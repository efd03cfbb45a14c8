"""A file that is written at any place, by several threads, and put on the disk.

Calls that not every system has (macOS has neither `posix_fallocate` nor `posix_fadvise` nor
`copy_file_range`) may be missing: the same bytes are written without them.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator

from skillvec.errors import OutputError, SkillvecError
from skillvec.files.file import MiB, local_path, remote_of


def explain(error: OSError, path: str) -> OutputError:
    """Return what a failed write means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: the disk is full ({error.strerror}); nothing was published")
    return OutputError(f"{path}: {error.strerror or error}; nothing was published")


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Raise an OutputError for a call of the system that failed."""
    try:
        yield
    except SkillvecError:
        raise
    except OSError as error:
        raise explain(error, path) from None


def available_memory_nbytes() -> int:
    """Return what the kernel says is available without swapping (Linux), else 8 GiB."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30


class OutputFile:
    """One file of known or growing size, written at planned offsets from any thread.

    One that an interrupted run has left is written over; `sync` cuts it to its size. Write-back
    starts after every 64 MiB, so that little is left for `sync`. With `windowed`, pages 512 MiB
    back are dropped too: a large writer is then never throttled for dirty pages. One that is
    `shared` lies there, other machines write to it too, and this one only writes.
    """

    START, DROP = 64 * MiB, 512 * MiB
    PIECE = MiB // 2  # ext4 takes larger writes into folios as large, at 3 times the system time

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
                _drop_pages(self._fd)
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
        except (AttributeError, OSError) as error:  # macOS has none, nor have some file systems
            if getattr(error, "errno", errno.EINVAL) not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            # what an interrupted run has left behind that place is still to be read
            os.ftruncate(self._fd, max(nbytes, os.fstat(self._fd).st_size))
        self._allocated = nbytes

    def reserve(self, nbytes: int) -> int:
        """Return the offset of `nbytes` more at the end; for one caller at a time.

        Extents are taken up to 64 MiB ahead, to the byte where the disk has no more.
        """
        offset, self.nbytes = self.nbytes, self.nbytes + nbytes
        with explained(self.path):
            try:
                if self.nbytes > self._allocated:
                    self._allocate(self.nbytes + min(offset, self.START))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._allocate(self.nbytes)
        return offset

    def write(self, offset: int, buffer: memoryview | bytes | bytearray) -> None:
        """Write `buffer` at the absolute `offset`; raise OutputError on a full disk."""
        view = memoryview(buffer)
        done = 0
        with explained(self.path):
            while done < len(view):
                done += os.pwrite(self._fd, view[done : done + self.PIECE], offset + done)
        self._advance(offset + len(view))

    def _advance(self, end: int) -> None:
        with self._lock:
            self._front = max(self._front, end)
            begin = self._started
            if self._front - begin < self.START:
                return
            self._started = front = self._front
        # on dirty pages the advice starts write-back without waiting, on clean ones it drops them
        _drop_pages(self._fd, begin, front - begin)
        if self._windowed and front > self.DROP:
            _drop_pages(self._fd, 0, front - self.DROP)

    def holds(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with what lies at `offset`; False where the file ends before."""
        done = 0
        with explained(self.path):
            while done < len(buffer):
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
                if not count:
                    return False
                done += count
        return True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what was written at `offset`."""
        if not self.holds(offset, buffer):
            raise OutputError(f"{self.path}: is shorter than what was written to it")

    def copy(self, offset: int, source: int, start: int, nbytes: int) -> None:
        """Copy a range of an open file to `offset`: the file system itself does it where it can."""
        end = offset + nbytes
        with explained(self.path):
            while offset < end:
                done = _copy_range(source, self._fd, end - offset, start, offset)
                offset, start = offset + done, start + done

    def append(self, buffer: bytes | memoryview) -> None:
        """Write behind the end; for one caller at a time."""
        self.write(self.reserve(len(buffer)), buffer)

    def sync(self) -> None:
        """Give back what was allocated ahead and wait until every byte is on the disk."""
        with explained(self.path):
            if os.fstat(self._fd).st_size > self.nbytes:
                os.ftruncate(self._fd, self.nbytes)
            put_on_disk(self._fd)

    def flush(self) -> None:
        """Wait until every byte written so far is on the disk."""
        with explained(self.path):
            put_on_disk(self._fd)

    def hand_over(self) -> None:
        """Flush, and keep no page in memory: other machines write to the file, or have done so."""
        self.flush()
        _drop_pages(self._fd)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _drop_pages(fd: int, offset: int = 0, nbytes: int = 0) -> None:
    """Have dirty pages of a range written and clean ones dropped, without waiting; 0 is all."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _copy_range(source: int, output: int, nbytes: int, start: int, offset: int) -> int:
    """Copy some of the bytes of a range and return how many; OSError where the source ends."""
    done = 0
    try:
        done = os.copy_file_range(source, output, nbytes, start, offset)
    except (AttributeError, OSError) as error:  # macOS has none, nor have some file systems
        refused = errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP
        if getattr(error, "errno", errno.ENOSYS) not in refused:
            raise
    done = done or os.pwrite(output, os.pread(source, min(nbytes, 8 * MiB), start), offset)
    if not done:
        raise OSError(errno.EIO, "what is copied has fewer bytes than were written")
    return done


def put_on_disk(fd: int) -> None:
    """Wait until all that was written to a descriptor is on the disk.

    On macOS fsync stops at the drive's own memory, which a power failure empties; F_FULLFSYNC does
    not, and is refused by some file systems.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined,unused-ignore]
    except (AttributeError, OSError):
        os.fsync(fd)


def fsync_path(path: str) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        put_on_disk(fd)
    finally:
        os.close(fd)


def copy_file(source: str, output: str) -> None:
    """Copy a file's bytes, and of a local one the permission bits, durably."""
    remote = remote_of(source)
    with explained(output):
        if remote is not None and remote.ranged:
            with open(output, "wb") as file:
                for at in range(0, remote.nbytes, 8 * MiB):
                    file.write(remote.read_range(at, min(8 * MiB, remote.nbytes - at)))
        else:
            shutil.copyfile(local_path(source), output)
            shutil.copymode(local_path(source), output)
        fsync_path(output)
