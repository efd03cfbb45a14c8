"""The header of a GGUF file: its keys, and where its tensors lie.

Every number is compared with the file before anything is done with it; texts of arrays and long
arrays are passed over.
"""

import struct
from typing import Any, NamedTuple

from skillvec.errors import printable
from skillvec.files.file import file_nbytes, read_bytes
from skillvec.files.header import MAX_HEADER_NBYTES
from skillvec.files.views import Index

MAGIC = b"GGUF"
AHEAD = 1 << 20  # bytes of a header read at a time
KEPT = 1 << 12  # values of an array that are kept: layers have fewer, vocabularies more
MOST_DIMENSIONS = 4  # of llama.cpp
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
TEXT, ARRAY = 8, 9


class GgufHeader(NamedTuple):
    """What a header says: its keys, and name -> (type, shape, offset after the header)."""

    said: dict[str, Any]
    tensors: dict[str, tuple[int, Index, int]]
    nbytes: int


class BrokenError(Exception):
    """What is wrong with a file."""


class _Cursor:
    """A place in a header, which is read ahead a little."""

    def __init__(self, address: str) -> None:
        self.address, self.position, self.begin, self.held = address, 0, 0, b""
        self.nbytes = file_nbytes(address)

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > min(self.nbytes, MAX_HEADER_NBYTES):
            limit = "the file ends" if end > self.nbytes else f"over {MAX_HEADER_NBYTES} bytes"
            raise BrokenError(f"header of more than {self.position} bytes: {limit}")
        if end > self.begin + len(self.held):
            self.begin = self.position
            self.held = read_bytes(self.address, self.begin, max(count, AHEAD))
        piece = self.held[self.position - self.begin : end - self.begin]
        self.position = end
        return piece

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise BrokenError("a text of the header is no UTF-8") from None

    def value(self, kind: int) -> Any:
        """Return a value; of an array its numbers, None where it is of texts or of very many."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise BrokenError(f"a value of the unknown type {kind} in the header")
        of, count = self.number("I"), self.number("Q")
        if of in NUMBERS:
            raw = self.take(count * struct.calcsize(f"<{NUMBERS[of]}"))
            return None if count > KEPT else list(struct.unpack(f"<{count}{NUMBERS[of]}", raw))
        if of != TEXT:
            raise BrokenError(f"an array of the unknown type {of} in the header")
        for _ in range(count):  # each takes 8 bytes at least, so that this ends with the file
            self.take(self.number("Q"))
        return None


def read_gguf_header(address: str) -> GgufHeader:
    cursor = _Cursor(address)
    cursor.take(len(MAGIC))
    version = cursor.number("I")
    if version not in (2, 3):
        order = ", or of the other byte order" if version & 0xFFFF == 0 else ""
        raise BrokenError(f"GGUF of version {version}{order}: 2 and 3 are read")
    count, keys = cursor.number("Q"), cursor.number("Q")
    said: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in said:
            raise BrokenError(f"the key {printable(key):.200} twice")
        said[key] = cursor.value(cursor.number("I"))
    tensors: dict[str, tuple[int, Index, int]] = {}
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if name in tensors or not 0 < dimensions <= MOST_DIMENSIONS:
            wrong = "twice" if name in tensors else f"of {dimensions} dimensions"
            raise BrokenError(f"the tensor {printable(name):.200} {wrong}")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        tensors[name] = cursor.number("I"), shape, cursor.number("Q")
    return GgufHeader(said, tensors, cursor.position)
