"""A delta as two tensors that are subtracted where it is read."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from skillvec.files.tensors import Derived, Source, files_of
from skillvec.ops import arithmetic, special
from skillvec.ops.arithmetic import Exactness
from skillvec.ops.kernels import HALVES
from skillvec.vectors.block_reader import BASE, REPLACEMENT, TUNED, Block
from skillvec.vectors.deltas.base import Decoded, DeltaSource


@dataclass(frozen=True, slots=True, repr=False)
class PairDelta(DeltaSource):
    """A tensor's delta as two tensors to subtract into values of `dtype`."""

    tuned: Source
    base: Source
    dtype: str = field()
    exactness: Exactness = Exactness.WHOLE

    @property
    def spec(self) -> Source:
        return self.base

    @property
    def nbytes(self) -> int:
        tuned = self.tuned
        read = tuned.nbytes_read if isinstance(tuned, Derived) else tuned.nbytes
        return read + self.base.nbytes

    def files(self) -> Iterator[str]:
        yield from files_of(self.tuned)
        yield from files_of(self.base)

    @property
    def pair(self) -> "PairDelta":
        return self

    def stored_as(self, dtype: str) -> "PairDelta":
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def read(self, block: Block, role: str) -> Decoded:
        digested = role == "delta0"  # not the second of two pairs, nor part of a combination
        tuned = block.read("tuned", self.tuned, "tuned" if digested else "")
        base = block.read("base", self.base, "base" if digested else "")
        found = arithmetic.subtract(
            tuned,
            self.tuned.dtype,
            base,
            self.base.dtype,
            self.dtype,
            self.exactness,
            block.array(role, self.dtype),
            block.workspace.array("found", "U8", 12 * block.size),
            block.casts,
        )
        block.tuned_nonfinite += found.nonfinite[0]
        block.base_nonfinite += found.nonfinite[1]
        if found.lost.size:
            sides = [(tuned, self.tuned.dtype, TUNED), (base, self.base.dtype, BASE)]
            codes = [where * special.are_nonfinite(values[found.lost], dtype)
                     for values, dtype, where in sides]  # fmt: skip
            block.lose(found.lost, codes[0] | codes[1])
        if digested:
            block.subtracted = found
        records = np.zeros(found.replaced.size, REPLACEMENT)
        records["position"], records["bits"] = found.replaced, found.bits
        return found.delta, records


def value_dtype(tuned: str, base: str, dtype: str = "auto") -> tuple[str, Exactness]:
    """Return the storage dtype of a delta and how exact it is.

    `auto` stores BF16 - BF16 as BF16 and F16 - F16 as F16 (exceptions in fp32), any F64 as F64,
    every other pair as F32, and restores every value of tuned.
    """
    if dtype == "auto":
        if "F64" in (tuned, base):
            return "F64", Exactness.WHOLE
        return (tuned if tuned == base and tuned in HALVES else "F32"), Exactness.WHOLE
    fits = dtype == "F32" and "F64" not in (tuned, base)
    return dtype, Exactness.EXCEPTIONS if fits else Exactness.ROUNDED
