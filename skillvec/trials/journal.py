"""The journal of a sweep: which points are done, line by line, each on the disk before the next.

The first line says what was asked, by digests, so that a sweep goes on only where its points are
those of the same model, vector and evaluation. JSON lines, for whoever wants to read them.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from skillvec.errors import FormatError, OutputError, UsageError, up_to_five
from skillvec.files.output_file import explain, fsync_path, put_on_disk

Line = dict[str, Any]


class Journal:
    """What is done, in a file that one process at a time may hold.

    `found` are the lines that an earlier run has left. Its last one may have been cut off: then it
    counts as not written. Raises UsageError where that run was asked for something else.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], force: bool = False) -> None:
        self.path, self.found = path, list[Line]()
        said: Line = json.loads(json.dumps(asked))
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise explain(error, os.fspath(path)) from None
        try:
            self._hold()
            if force:
                os.ftruncate(self._fd, 0)
            lines, nbytes = self._read()
            os.ftruncate(self._fd, nbytes)
            if lines:
                self._refuse_others(lines[0], said)
                self.found = lines[1:]
            else:
                self.add(said)
                fsync_path(os.fspath(path.parent))
        except BaseException:
            self.close()
            raise

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line; it is on the disk when this returns."""
        text = memoryview(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        try:
            os.lseek(self._fd, 0, os.SEEK_END)
            while text:
                text = text[os.write(self._fd, text) :]
            put_on_disk(self._fd)
        except OSError as error:
            raise explain(error, os.fspath(self.path)) from None

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _hold(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{self.path}: another run is at work on it") from None
        except OSError:  # a file system without locks
            pass

    def _read(self) -> tuple[list[Line], int]:
        """Return the lines that are whole, and their bytes."""
        lines, nbytes = list[Line](), 0
        pieces = self.path.read_bytes().splitlines(keepends=True)
        for number, piece in enumerate(pieces, 1):
            try:
                if not piece.endswith(b"\n") or not isinstance(line := json.loads(piece), dict):
                    raise ValueError
            except ValueError:
                if number == len(pieces):
                    break
                raise FormatError(
                    f"{self.path}: line {number} is broken; --force begins anew"
                ) from None
            lines.append(line)
            nbytes += len(piece)
        return lines, nbytes

    def _refuse_others(self, there: Line, here: Line) -> None:
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        shown = [f"{key}: {_short(there, key)} then, {_short(here, key)} now" for key in keys]
        if shown:
            raise UsageError(
                f"{self.path.parent}: holds points that were asked for in another way; give that"
                " command to go on with them, --force to begin anew, or another output:\n"
                + up_to_five(shown)
            )


def _short(said: Line, key: str) -> str:
    return json.dumps(said[key])[:60] if key in said else "nothing"
