"""Values that a run keeps on the disk, for as long as something refers to them."""

import os
import threading
import weakref
from typing import Any

from skillvec.errors import OutputError
from skillvec.files.file import read_into


class Scratch:
    """A file in the folder for temporary files (TMPDIR), which goes with its last reference.

    Other processes and, where the folder is shared, other machines read it by what pickle says.
    """

    def __init__(self, path: str = "") -> None:
        self.path, self._lock = path, threading.Lock()
        if not path:
            import tempfile  # a few operators write one

            self._file = tempfile.NamedTemporaryFile(prefix="skillvec-")  # noqa: SIM115
            self.path = self._file.name
            weakref.finalize(self, self._file.close)  # a file that nobody closes is warned of

    def __reduce__(self) -> Any:
        return Scratch, (self.path,)

    def add(self, content: memoryview) -> int:
        """Append bytes, from any thread, and return where they lie; OutputError without room."""
        with self._lock:
            begin = self._file.tell()
            try:
                self._file.write(content)
                self._file.flush()
            except OSError as error:
                raise OutputError(
                    f"{os.path.dirname(self.path)}: no room for what is found of matrices"
                    f" ({error.strerror}): TMPDIR names another folder"
                ) from None
        return begin

    def read(self, begin: int, out: memoryview) -> None:
        """Fill `out` from where `add` has put it."""
        read_into(self.path, begin, out)
