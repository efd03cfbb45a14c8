"""What files hold, by digest: read once, and read again when their size or time of change differs.

Hides the index OUT/stages/contents.json, which maps an absolute path to [size in bytes, time of
change in ns, digest of all its bytes (XXH3-128)]. Invariants: the digest of a folder depends on the
names and bytes of its files and on nothing else, so a copy has the digest of the original; nothing
is written before `save`. Not covered: an edit that leaves a file's size and time as they were, and
what is no part of a model: checkpoint-N, runs (tensorboard) and .md files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import xxhash

CHUNK = 1 << 22  # bytes read at a time
LONG = 1 << 31  # bytes of a file whose reading is announced: seconds
ASIDE = re.compile(r"checkpoint-\d+|runs|.*\.md|\.cache")


class Contents:
    """Digests of files and folders, remembered in one index."""

    def __init__(self, index: Path) -> None:
        self._index = index
        try:
            self._known = json.loads(index.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self._known = {}

    def digest(self, path: Path, skip: Collection[Path] = ()) -> str | None:
        """Return the digest of a file, or of a folder's `files`; None where there is neither."""
        if path.is_file():
            return self._digest_file(path)
        if not path.is_dir():
            return None
        return xxhash.xxh3_128_hexdigest(json.dumps(self.files(path, skip)).encode())

    def files(self, path: Path, skip: Collection[Path] = ()) -> dict[str, str]:
        """Return name -> digest of every file below a folder, but for those below `skip`.

        A file alone is {"": digest}.
        """
        if path.is_file():
            return {"": self._digest_file(path)}
        found = _files_below(path, {*skip})
        return {file.relative_to(path).as_posix(): self._digest_file(file) for file in found}

    def save(self) -> None:
        """Write the index, without the files that are gone, whole or not at all."""
        known = {path: seen for path, seen in self._known.items() if Path(path).is_file()}
        self._index.parent.mkdir(parents=True, exist_ok=True)
        partial = self._index.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=0), encoding="utf-8")
        partial.replace(self._index)

    def _digest_file(self, path: Path) -> str:
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        name = str(path.resolve())
        known = self._known.get(name)
        if known is not None and known[:2] == seen:
            return str(known[2])
        if stat.st_size > LONG:
            print(f"reading {path} ({stat.st_size / 1e9:.1f} GB) for its digest", flush=True)
        state = xxhash.xxh3_128()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                state.update(chunk)
        self._known[name] = [*seen, state.hexdigest()]
        return state.hexdigest()


def _files_below(folder: Path, skip: set[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path in skip or ASIDE.fullmatch(path.name):
            continue
        if path.is_dir():
            yield from _files_below(path, skip)
        elif path.is_file():
            yield path
