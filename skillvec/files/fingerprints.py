"""Fingerprints of inputs: whether a file changed while it was read, or since."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from xxhash import xxh3_64

from skillvec.errors import FormatError, SkillvecError, up_to_five
from skillvec.files.file import forget_open_file, remote_of

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
