"""A file that is written at any place: in which pieces, and what a short write leaves."""

import os
from pathlib import Path

import pytest

from skillvec.files.output_file import OutputFile


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
