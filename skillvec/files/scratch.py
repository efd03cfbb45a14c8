"""Values that a run keeps on the disk, for as long as something refers to them."""

import os
import tempfile
import threading
import weakref
from typing import Any

from skillvec.errors import OutputError
from skillvec.files.file import read_into


class Scratch:
    """A file in the folder for temporary files (TMPDIR), which goes with its last reference.

    Other processes and, where the folder is shared, other machines read it by what pickle says.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path, self._end, self._lock = path or "", 0, threading.Lock()
        if path is None:
            fd, self.path = tempfile.mkstemp(prefix="skillvec-")
            self._fd = fd
            weakref.finalize(self, _discard, fd, self.path)

    def __reduce__(self) -> Any:
        return Scratch, (self.path,)

    def add(self, content: memoryview) -> int:
        """Append bytes, from any thread, and return where they lie; OutputError without room."""
        with self._lock:
            begin, self._end = self._end, self._end + len(content)
        done = 0
        try:
            while done < len(content):
                done += os.pwrite(self._fd, content[done:], begin + done)
        except OSError as error:
            folder = os.path.dirname(self.path)
            raise OutputError(
                f"{folder}: no room for what is found of matrices ({error.strerror}): TMPDIR names"
                " another folder"
            ) from None
        return begin

    def read(self, begin: int, out: memoryview) -> None:
        """Fill `out` from where `add` has put it."""
        read_into(self.path, begin, out)


def _discard(fd: int, path: str) -> None:
    os.close(fd)
    if os.path.exists(path):
        os.unlink(path)
