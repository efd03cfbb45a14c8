"""A file that is written at any place: its pieces, short writes, systems without some calls."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skillvec.files.output_file import OutputFile, fsync_path, put_on_disk


@pytest.mark.parametrize("taken", [1.0, 0.4])
def test_large_buffers_go_to_the_disk_in_pieces(
    taken: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger writes cost ext4 three times the system time; what one leaves is written next."""
    nbytes = 5 * OutputFile.PIECE // 2
    content = os.urandom(nbytes)
    file, seen, write = OutputFile(os.fspath(tmp_path / "f"), nbytes + 7), [], os.pwrite

    def watched(fd: int, data: memoryview, offset: int) -> int:
        seen.append(len(data))
        return write(fd, data[: max(int(taken * len(data)), 1)], offset)

    monkeypatch.setattr(os, "pwrite", watched)
    file.write(7, content)
    file.close()
    assert (tmp_path / "f").read_bytes() == bytes(7) + content
    assert max(seen) == OutputFile.PIECE
    assert taken < 1 or seen == [OutputFile.PIECE, OutputFile.PIECE, OutputFile.PIECE // 2]


@pytest.fixture
def without_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    for name in ("posix_fallocate", "posix_fadvise", "POSIX_FADV_DONTNEED", "copy_file_range"):
        monkeypatch.delattr(os, name)


def test_without_calls_of_linux_a_file_is_written_read_and_cut(
    without_calls: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputFile, "START", 4)  # so that pages would be dropped
    monkeypatch.setattr(OutputFile, "DROP", 8)
    path = tmp_path / "f"
    file = OutputFile(os.fspath(path), 6, windowed=True)
    assert path.stat().st_size == 6
    file.write(0, b"abcdef")
    assert file.reserve(6) == 6
    file.write(6, b"ghijkl")
    with path.open("rb") as source:
        file.copy(0, source.fileno(), 8, 2)
    file.hand_over()
    file.sync()
    file.close()
    assert path.read_bytes() == b"ijcdefghijkl"
    shared = OutputFile(os.fspath(path), 0, shared=True)
    shared.write(1, b"-")
    shared.close()
    assert path.read_bytes() == b"i-cdefghijkl"


def test_without_extents_what_an_interrupted_run_left_stays_until_the_end(
    without_calls: None, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(90) + b"left there")
    file = OutputFile(os.fspath(path), 0)
    file.reserve(10)
    found = bytearray(10)
    assert file.holds(90, memoryview(found)) and found == b"left there"
    file.sync()
    file.close()
    assert path.read_bytes() == bytes(10)


@pytest.mark.parametrize("refused", [False, True])
def test_where_fsync_is_not_enough_the_disk_is_asked(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def control(fd: int, command: int) -> int:
        asked.append(command)
        if refused:
            raise OSError(45, "Operation not supported")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)  # macOS has it
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append("fsync"))
    file = OutputFile(os.fspath(tmp_path / "f"), 1)
    calls: list[Callable[[], None]] = [
        file.sync, file.flush, lambda: put_on_disk(0), lambda: fsync_path(os.fspath(tmp_path)),
    ]  # fmt: skip
    for call in calls:
        asked.clear()
        call()
        assert asked == ([51, "fsync"] if refused else [51])
    file.close()
