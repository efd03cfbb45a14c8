"""The journal of a run: what is done and on the disk, line by line, each with a digest."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from skillvec.errors import UsageError, up_to_five
from skillvec.files.fingerprints import changes
from skillvec.files.output_file import OutputFile, explain, explained, fsync_path, put_on_disk

JOURNAL, OWNER, KEPT = "journal", "owner", "replaced"
OTHER = "of another command", "give that command to go on with it"
FORM = 2  # of the lines: with what is kept of a result; other forms are another command's
Line = dict[str, Any]


class Journal:
    """What is done and on the disk: a first line that says what for, then one for each job.

    `found` are the lines that an earlier run has left. Every line has a digest, which depends on
    the lines before: one that a power failure has cut, and all behind it, count as not written.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        said = {"request": _flat(request) | {"form of the journal": FORM}, "inputs": inputs}
        self._said: Line = json.loads(json.dumps(said))
        self._path, self._folder = folder / JOURNAL, folder
        lines, nbytes, seed = read_lines(self._path)
        self.found = lines[1:]
        self._nbytes, self._seed = (nbytes, seed) if self.found else (0, 0)
        if self.found:
            self._refuse_others(lines[0])

    @property
    def has_claims(self) -> bool:
        return self._nbytes > 0

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """The fingerprints of what is read, by path."""
        found: dict[str, list[Any]] = self._said["inputs"]
        return found

    def _refuse_others(self, said: Line) -> None:
        shown, why = changes(said["inputs"], self.inputs), "with inputs that have changed since"
        advice = "bring them back"
        if not shown:
            # what stands twice in a request, stands there as it was given and as it was meant
            there, here = (
                {key.removeprefix("request."): value for key, value in s["request"].items()}
                | dict.fromkeys(s["inputs"], "read")
                for s in (said, self._said)
            )
            differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
            why, advice = OTHER
            shown = [f"{k}: {_short(there, k)} then, {_short(here, k)} now" for k in differing]
        if shown:
            raise UsageError(f"{explain_refusal(self._folder, why, advice)}:\n{up_to_five(shown)}")

    def claim(self, lines: Sequence[Line], files: Iterable[OutputFile]) -> None:
        """Say that jobs are done, when all that was written to `files` is on the disk."""
        for file in files:
            file.flush()
        pieces, seed = [], self._seed
        for line in [*lines] if self.has_claims else [self._said, *lines]:
            encoded, seed = _encoded(line, seed)
            pieces.append(encoded)
        text = memoryview(b"".join(pieces))
        with explained(os.fspath(self._path)):
            # the names of the files first; shards come one after the other
            for folder in (self._folder / "made", self._folder, self._folder.parent):
                fsync_path(os.fspath(folder))
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(fd, self._nbytes)
                while text:
                    written = os.pwrite(fd, text, self._nbytes)
                    self._nbytes, text = self._nbytes + written, text[written:]
                put_on_disk(fd)
                self._seed = seed
            finally:
                os.close(fd)
            fsync_path(os.fspath(self._folder))

    @contextlib.contextmanager
    def laid_aside(self) -> Iterator[None]:
        """Take the journal away while what was made gets its name; it is back after an error.

        What lies in the folder from then on may be the output that was replaced.
        """
        aside = self._path.with_suffix(".aside")
        try:
            if self.has_claims:
                os.rename(self._path, aside)
                fsync_path(os.fspath(self._folder))
            yield
        except BaseException:
            if aside.exists():
                os.rename(aside, self._path)
            raise
        self._nbytes = 0


def explain_refusal(folder: Path, why: str, advice: str) -> str:
    return f"{folder}: left by an interrupted run {why} ({advice}, or delete the folder)"


def _flat(said: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested objects as one, keys joined by dots, so that what differs can be named."""
    flat: dict[str, Any] = {}
    for key, value in said.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _short(said: Mapping[str, Any], name: str) -> str:
    return json.dumps(said[name])[:60] if name in said else "nothing"


def _encoded(line: Line, seed: int) -> tuple[bytes, int]:
    """Return a line behind its digest, and the seed for the digest of the next one."""
    text = json.dumps(line, separators=(",", ":")).encode()
    digest = xxh3_64(text, seed=seed)
    return digest.hexdigest().encode() + b" " + text + b"\n", digest.intdigest()


def read_lines(path: Path) -> tuple[list[Line], int, int]:
    """Return the lines up to the first that is broken, their bytes, and the seed for the next."""
    lines, nbytes, seed = [], 0, 0
    try:
        with open(path, "rb") as file:
            for raw in file:
                digest = xxh3_64(raw[17:-1], seed=seed)
                if raw[:17] != digest.hexdigest().encode() + b" " or raw[-1:] != b"\n":
                    break
                lines.append(json.loads(raw[17:]))
                nbytes, seed = nbytes + len(raw), digest.intdigest()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise explain(error, os.fspath(path)) from None
    return lines, nbytes, seed
