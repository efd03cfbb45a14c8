"""A delta as what of its matrices is a product of low rank, or as what is left of them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from skillvec.errors import SkillvecError
from skillvec.files.header import TensorSpec
from skillvec.files.scratch import Scratch
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.delta import STEP, Delta
from skillvec.ops.kernels import Array
from skillvec.ops.low_rank import Product, find_inside, find_leading
from skillvec.vectors.block_reader import NO_RECORDS, Block
from skillvec.vectors.deltas.base import Decoded, DeltaSource, InFile


class Subspace(NamedTuple):
    """Directions of a module's inputs: the leading ones of E[x x'], as many as are asked for."""

    path: str  # of the file of moments
    second: TensorSpec
    side: int  # the dimension of the weight that meets the inputs


class Factors(NamedTuple):
    """The products of a tensor's matrices, in their order; L and R lie in a scratch file, fp32."""

    scratch: Scratch
    products: tuple[Product, ...]

    def rows(self, begin: int, first: int, count: int, rank: int) -> Array:
        """Return rows of L or R, which begins there, in fp64."""
        values = np.empty((count, rank), np.float32)
        out = values.view(np.uint8).reshape(-1).data
        self.scratch.read(begin + first * rank * values.itemsize, out)
        return values.astype(np.float64)


@dataclass(frozen=True, slots=True, repr=False)
class LowRankDelta(DeltaSource):
    """What of a delta's matrices is a product of low rank (`inside`), or what is left of them.

    The matrices are the last two dimensions. The product is that of the leading singular triplets,
    or of what a subspace of the inputs meets. Values are fp64, for whoever adds them up to round
    once. `known` is what a pass over whole matrices has found.
    """

    is_read_again: ClassVar[bool] = True  # block by block, after the pass

    source: DeltaSource
    spec: TensorSpec = field()
    origin: str  # what tells its vector from others in one run
    rank: int
    energy: float
    inside: bool
    rescale: bool
    subspace: Subspace | None
    known: Factors | None = None

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def parts(self) -> tuple[DeltaSource, ...]:
        return (self.source,)

    def files(self) -> Iterator[str]:
        yield from self.source.files()
        if self.subspace is not None:
            yield self.subspace.path

    def stored_parts(self, role: str) -> Iterator[tuple[str, InFile]]:
        yield from self.source.stored_parts(f"{role}.0")

    @property
    def wanted(self) -> Any:
        """What has to be found: equal for deltas that share it."""
        return self.origin, self.spec.name, self.rank, self.energy, self.subspace

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of each matrix."""
        m, n = self.spec.shape[-2:]
        return m, n

    def find(self, matrix: Array, directions: Array | None) -> Product:
        """Return the product of a matrix; `directions` are those of its subspace, if it has one."""
        if self.subspace is None or directions is None:
            return find_leading(matrix, self.rank, self.energy)
        return find_inside(matrix, directions, self.subspace.side)

    def informed(self, known: Mapping[Any, Any]) -> Self:
        return replace(self, known=known.get(self.wanted, self.known))

    def read(self, block: Block, role: str) -> Decoded:
        if self.known is None:
            raise SkillvecError(f"{self.spec.name}: read before its matrices were looked at")
        delta, _ = self.source.read(block, f"{role}.0")
        values = block.array(role, "F64")
        for begin in range(0, block.size, STEP):
            values[begin : begin + STEP] = delta.wide(begin, min(begin + STEP, block.size))
        m, n = self.shape
        at, end = block.begin, block.begin + block.size
        while at < end:
            number, inside = divmod(at, m * n)
            stop = min(end, at - inside + m * n)
            self._part(self.known, number, inside, values[at - block.begin : stop - block.begin])
            at = stop
        return Delta(values, "F64"), NO_RECORDS

    def _part(self, known: Factors, number: int, begin: int, values: Array) -> None:
        """Turn values of one matrix, from its position `begin` on, into those of this delta."""
        rank, left, right, norm_sq, rest_sq, *_ = known.products[number]
        n = self.shape[1]
        if left is None:
            values *= self.inside
            return
        first, last = begin // n, -(-(begin + values.size) // n)
        rows, found = known.rows(left, first, last - first, rank), np.empty((last - first, n))
        step = max(1, BLOCK_NUMEL // rank)  # columns that keep R within a block
        for at in range(0, n, step):
            count = min(step, n - at)
            found[:, at : at + count] = rows @ known.rows(right, at, count, rank).T
        product = found.reshape(-1)[begin - first * n :][: values.size]
        values[:] = product if self.inside else values - product
        if self.rescale:
            held_sq = norm_sq - rest_sq if self.inside else rest_sq
            values *= (norm_sq / held_sq) ** 0.5 if held_sq > 0 else 1.0


def low_rank_in(deltas: Iterable[DeltaSource]) -> Iterator[LowRankDelta]:
    """Yield such deltas among deltas and in what they are made of."""
    for delta in deltas:
        if isinstance(delta, LowRankDelta):
            yield delta
        yield from low_rank_in(delta.parts)
