"""A delta as boxes of those of another layout."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from skillvec.files.gather import fill
from skillvec.files.header import ITEMSIZE, TensorSpec
from skillvec.files.views import View
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import Array
from skillvec.vectors.block_reader import BASE, NO_RECORDS, TUNED, Block
from skillvec.vectors.deltas.base import Decoded, DeltaSource

VIEW = ".view"  # what the role of a delta read through a view has more


@dataclass(frozen=True, slots=True, repr=False)
class ViewDelta(DeltaSource):
    """A tensor's delta as boxes of those of another layout; what no box covers is 0."""

    is_relaid: ClassVar[bool] = True

    spec: TensorSpec = field()  # F32, or F64 where a source is
    view: View

    @property
    def nbytes(self) -> int:
        return self.spec.numel * ITEMSIZE[self.spec.dtype]

    @property
    def parts(self) -> tuple[DeltaSource, ...]:
        return self.view.sources

    @property
    def names(self) -> list[str]:
        return [part.spec.name for part in self.parts]

    def name_in_manifest(self, name: str) -> str:
        return ""

    def as_view(self) -> View:
        return self.view

    def read(self, block: Block, role: str) -> Decoded:
        """Put it together from those of another layout, each decoded where it is needed."""
        values = block.array(role, self.spec.dtype)
        held: dict[tuple[str, int], tuple[Block, Array]] = {}  # the last one that was decoded

        def read(part: DeltaSource, begin: int, out: Array) -> None:
            key = part.key
            while out.size:
                index, at = divmod(begin, BLOCK_NUMEL)
                if (key, index) not in held:
                    leaves = block.seen.setdefault(key, {})
                    other = block.of_another(index, part.spec.numel, leaves)
                    wide = part.read(other, f"{role}{VIEW}")[0].wide(0, other.size)
                    if other.lost_codes is not None:
                        block.holes.add(key)
                    held.clear()
                    held[key, index] = other, wide
                other, wide = held[key, index]
                found = other.lost_codes if out.dtype == np.uint8 else wide
                count = min(out.size, other.size - at)
                out[:count] = 0 if found is None else found[at : at + count]
                begin, out = begin + count, out[count:]

        fill(self, self.view, block.begin, values, read)
        if any(part.key in block.holes for part in self.parts):
            codes = np.zeros(block.size, np.uint8)  # once more, for where in this layout
            fill(self, self.view, block.begin, codes, read)
            at = np.flatnonzero(codes)
            if at.size:
                block.lose(at, codes[at])
            block.tuned_nonfinite += int(np.count_nonzero(codes & TUNED))
            block.base_nonfinite += int(np.count_nonzero(codes & BASE))
        return Delta(values, self.spec.dtype), NO_RECORDS
