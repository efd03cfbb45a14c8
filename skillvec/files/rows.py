"""Rows of pieces of unknown size, placed in order and written without waiting."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64, xxh3_128

from skillvec.errors import FormatError
from skillvec.files.output_file import OutputFile
from skillvec.ops.kernels import Bytes


class Turns:
    """Lets workers in one after the other, in the order of their numbers from `first` on."""

    def __init__(self, first: int = 0) -> None:
        self._changed, self._next, self._stopped = threading.Condition(), first, False

    @contextlib.contextmanager
    def turn(self, number: int, count: int = 1) -> Iterator[bool]:
        """Wait for the turn of `number`, and hold it and those of all `count` from there.

        Gives False if the run has failed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._next == number or self._stopped)
            yield not self._stopped
            self._next += count
            self._changed.notify_all()

    def stop(self) -> None:
        """Let all who wait go."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Row(NamedTuple):
    """The pieces of a row with their sizes, and the digest of all."""

    sizes: list[int]
    mark: int
    pieces: Sequence[bytes | memoryview]


class RowWriter:
    """Takes rows of pieces from any thread and places them in the order of their numbers.

    What a row is, and where its pieces go, is for the classes below. A worker waits until the rows
    before its own have their places, then writes its own without waiting: so the bytes do not
    depend on the worker count, no size has to be known before, and nothing is held in memory.
    """

    def __init__(self, rows: int, pieces: int) -> None:
        self._turns = Turns()
        self.sizes = np.zeros((rows, pieces), np.uint32)  # bytes of each piece
        self.marks = np.zeros(rows, np.uint64)  # digests, for those who resume

    @property
    def files(self) -> list[OutputFile]:
        """The files that rows have been written to."""
        raise NotImplementedError

    def place(self, row: int, sizes: Sequence[int]) -> list[tuple[OutputFile, int]]:
        """Return file and offset of every piece of a row; for one caller at a time, in order."""
        raise NotImplementedError

    def add(self, row: int, pieces: Sequence[Bytes], digest: bytes | None = None) -> None:
        """Write the pieces of one row, in its turn; `digest` as in `mark_of`, where it is known."""
        sizes, mark = [piece.size for piece in pieces], mark_of(pieces, digest)
        self.add_rows(row, [Row(sizes, mark, [piece.data for piece in pieces])])

    def add_rows(self, first: int, rows: Sequence[Row]) -> None:
        """Write rows of consecutive numbers, in their turn; what lies end to end in one go."""
        with self._turn(first, len(rows)) as mine:
            if not mine:
                return
            places = [self.accept(first + i, row.sizes, row.mark) for i, row in enumerate(rows)]
        if len(rows) == 1:
            for (file, offset), piece in zip(places[0], rows[0].pieces, strict=True):
                if len(piece):
                    file.write(offset, piece)
            return
        joined: dict[OutputFile, tuple[int, bytearray]] = {}
        for row, placed in zip(rows, places, strict=True):
            for (file, offset), piece in zip(placed, row.pieces, strict=True):
                if not len(piece):
                    continue
                begin, held = joined.get(file) or (offset, bytearray())
                if begin + len(held) != offset:
                    file.write(begin, held)
                    begin, held = offset, bytearray()
                held += piece
                joined[file] = begin, held
        for file, (begin, held) in joined.items():
            file.write(begin, held)

    def _turn(self, row: int, count: int) -> contextlib.AbstractContextManager[bool]:
        return self._turns.turn(row, count)

    def accept(self, row: int, sizes: Sequence[int], mark: int) -> list[tuple[OutputFile, int]]:
        """Record and place the next row, which the caller sees written; return its places."""
        self.sizes[row], self.marks[row] = sizes, mark
        return self.place(row, sizes)

    def line(self, row: int) -> list[int]:
        """Return what a journal keeps of a row that was written."""
        return [*self.sizes[row].tolist(), int(self.marks[row])]

    def restore(self, row: int, line: Sequence[int]) -> None:
        """Place the next row, which an interrupted run has written; FormatError if it is not so."""
        *sizes, mark = line
        self._confirm(self.accept(row, sizes, mark), sizes, mark)
        self._turns = Turns(row + 1)

    def _confirm(
        self, places: Sequence[tuple[OutputFile, int]], sizes: Sequence[int], mark: int
    ) -> None:
        pieces = [np.empty(size, np.uint8) for size in sizes]
        there = [f.holds(at, p.data) for (f, at), p in zip(places, pieces, strict=True)]
        if not all(there) or mark_of(pieces) != mark:
            raise FormatError(
                f"{places[0][0].path}, or a file beside it, is not what the journal says, so all"
                " that was unfinished was removed: run the same command again"
            )

    def stop(self) -> None:
        """Let waiting workers go: the run has failed."""
        self._turns.stop()


def digest_of_two(first: Bytes, second: Bytes) -> bytes:
    """Return XXH3-128 over the second piece and then the first, as of a block and its bitmap."""
    hashed = xxh3_128(second.data)
    hashed.update(first.data)
    return hashed.digest()


def mark_of(pieces: Sequence[Bytes], digest: bytes | None = None) -> int:
    """Return XXH3-64 over pieces, of which the first two, the large ones, go in as their digest."""
    hashed = xxh3_64(digest or digest_of_two(*pieces[:2]))
    for piece in pieces[2:]:
        hashed.update(piece.data)
    return hashed.intdigest()


class Segment(RowWriter):
    """Keeps rows in one file in the order in which they come; `offsets` says where."""

    def __init__(self, path: str, rows: int, pieces: int) -> None:
        super().__init__(rows, pieces)
        self.offsets: dict[int, int] = {}
        self.file = OutputFile(path, 0)
        self._lock = threading.Lock()

    @property
    def files(self) -> list[OutputFile]:
        return [self.file]

    def place(self, row: int, sizes: Sequence[int]) -> list[tuple[OutputFile, int]]:
        offset = self.offsets[row] = self.file.reserve(sum(sizes))
        return self._places(offset, sizes)

    @contextlib.contextmanager
    def _turn(self, row: int, count: int) -> Iterator[bool]:
        with self._lock:
            yield True

    def _places(self, offset: int, sizes: Sequence[int]) -> list[tuple[OutputFile, int]]:
        return [(self.file, offset + sum(sizes[:i])) for i in range(len(sizes))]

    def line(self, row: int) -> list[int]:
        return [self.offsets[row], *super().line(row)]

    def restore(self, row: int, line: Sequence[int]) -> None:
        offset, *sizes, mark = line
        self.offsets[row], self.sizes[row], self.marks[row] = offset, sizes, mark
        self.file.reserve(max(offset + sum(sizes) - self.file.nbytes, 0))
        self._confirm(self._places(offset, sizes), sizes, mark)

    def read(self, row: int) -> list[Bytes]:
        """Return the pieces of a row."""
        content = np.empty(int(self.sizes[row].sum()), np.uint8)
        self.file.read_into(self.offsets[row], content.data)
        return np.split(content, np.cumsum(self.sizes[row])[:-1])
