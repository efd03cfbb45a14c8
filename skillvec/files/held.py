"""Many small writes as few large ones: what one worker has made of neighbouring small tensors.

Hides that nothing is written before `flush`: buffers of who writes may be used again at once.
"""

from collections.abc import Sequence

from skillvec.files.output_file import OutputFile
from skillvec.files.rows import Row, RowWriter, mark_of
from skillvec.ops.kernels import Bytes


class HeldFile:
    """Takes what is written to a file, and writes what lies end to end in one go."""

    def __init__(self, file: OutputFile) -> None:
        self._file, self._begin, self._pieces = file, 0, bytearray()

    def write(self, offset: int, buffer: memoryview) -> None:
        """Take a copy of `buffer` for its place at `offset`."""
        if offset != self._begin + len(self._pieces):
            self.flush()
            self._begin = offset
        self._pieces += buffer

    def flush(self) -> None:
        if self._pieces:
            self._file.write(self._begin, self._pieces)
            self._begin, self._pieces = self._begin + len(self._pieces), bytearray()


class HeldFiles:
    """Holds back what is written to any of some files."""

    def __init__(self, files: Sequence[OutputFile]) -> None:
        self._files = files
        self._held: dict[int, HeldFile] = {}

    def __getitem__(self, number: int) -> HeldFile:
        held = self._held.get(number)
        if held is None:
            held = self._held[number] = HeldFile(self._files[number])
        return held

    def flush(self) -> None:
        for held in self._held.values():
            held.flush()


class HeldRows:
    """Takes rows for a writer, which gets all of them in one turn."""

    def __init__(self, writer: RowWriter) -> None:
        self._writer = writer
        self._first, self._rows = 0, list[Row]()

    def add(self, row: int, pieces: Sequence[Bytes], digest: bytes | None = None) -> None:
        """Take copies of the pieces of a row."""
        if row != self._first + len(self._rows):
            self.flush()
            self._first = row
        held = [piece.tobytes() for piece in pieces]
        self._rows.append(Row([*map(len, held)], mark_of(pieces, digest), held))

    def flush(self) -> None:
        if self._rows:
            self._writer.add_rows(self._first, self._rows)
            self._first, self._rows = self._first + len(self._rows), []
