"""A delta in a vector file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from skillvec.files.header import TensorSpec
from skillvec.ops.delta import NO_POSITIONS, Delta
from skillvec.vectors.block_reader import NO_RECORDS, Block
from skillvec.vectors.deltas.base import NO_DIGEST, Decoded, DeltaSource, InFile


@dataclass(frozen=True, slots=True, repr=False)
class StoredDelta(DeltaSource):
    """A delta in a vector file.

    `spec` has the delta's name, dtype and shape, and the place of its payload; `first_block` is
    its first row in the block table of its file, `digest` that of its stored bytes.
    """

    is_stored: ClassVar[bool] = True

    spec: TensorSpec = field()
    codec: str
    bitmap: TensorSpec | None = None
    first_block: int = 0
    digest: str = NO_DIGEST

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes + (self.bitmap.nbytes if self.bitmap else 0)

    @property
    def is_zero(self) -> bool:
        return self.codec == "zero"

    @property
    def payload(self) -> "StoredDelta":
        """What the block table speaks of."""
        return self

    def stored_parts(self, role: str) -> "Iterator[tuple[str, InFile]]":
        yield role, self

    def name_in_manifest(self, name: str) -> str:
        return self.spec.name  # in another layout too

    def read(self, block: Block, role: str) -> Decoded:
        dtype = self.spec.dtype
        values = block.array(role, dtype)
        if self.codec == "zero":
            values.fill(0)
            return Delta(values, dtype, is_zero=True), NO_RECORDS
        scratch = block.workspace.array("scratch", "U8", values.nbytes + values.size // 8 + 1)
        found = block.readers[self.spec.path].read(self, block.index, values, scratch)
        block.stamp(role, found.digest)
        at = (
            np.ascontiguousarray(found.exceptions["position"])
            if found.exceptions.size
            else NO_POSITIONS
        )
        exact = np.ascontiguousarray(found.exceptions["value"])
        delta = Delta(values, dtype, at, exact, found.is_zero and not at.size)
        return delta, found.replacements


def zero_delta(name: str, shape: tuple[int, ...]) -> StoredDelta:
    """Return the delta that changes nothing."""
    return StoredDelta(TensorSpec(name, "F32", shape, "", 0, 0), "zero")
