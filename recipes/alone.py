"""One process a pipeline: two that ran the stages of one folder would mix what they write.

Hides the lock, which goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made; ValueError where one is in there.

    On a file system without locks nobody is kept out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process runs these stages, perhaps one that was left over when"
                " a run was killed: wait for it, or stop it"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(lock)
