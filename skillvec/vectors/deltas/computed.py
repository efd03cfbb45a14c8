"""A delta as a formula, such as s B A of an adapter."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from skillvec.files.tensors import Source, files_of
from skillvec.ops.delta import Delta
from skillvec.vectors.block_reader import NO_RECORDS, Block
from skillvec.vectors.deltas.base import Decoded, DeltaSource


@dataclass(frozen=True, slots=True, repr=False)
class ComputedDelta(DeltaSource):
    """A tensor's delta as a formula in fp32 or fp64, such as s B A of the adapter `ref`."""

    source: Source
    ref: str

    @property
    def spec(self) -> Source:
        return self.source

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def files(self) -> Iterator[str]:
        yield from files_of(self.source)

    @property
    def way(self) -> Any:
        return vars(self.source) | {"name": ""}

    def read(self, block: Block, role: str) -> Decoded:
        values = block.read(role, self.source)
        wrong = ~np.isfinite(values)
        if wrong.any():
            block.lose(np.flatnonzero(wrong))
            values[wrong] = 0
        values += 0  # no negative zeros
        return Delta(values, self.source.dtype), NO_RECORDS
