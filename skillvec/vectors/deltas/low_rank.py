"""A delta as what of its matrices is a product of low rank, or as what is left of them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from skillvec.errors import SkillvecError
from skillvec.files.header import TensorSpec
from skillvec.files.scratch import Scratch
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.delta import STEP, Delta
from skillvec.ops.kernels import Array
from skillvec.ops.low_rank import Product, multiply
from skillvec.vectors.block_reader import NO_RECORDS, Block
from skillvec.vectors.deltas.base import Decoded, DeltaSource, InFile


class Subspace(NamedTuple):
    """Directions of a module's inputs: the leading ones of E[x x'], as many as are asked for."""

    path: str  # of the file of moments
    second: TensorSpec
    side: int  # the dimension of the weight that meets the inputs


class Kept(NamedTuple):
    """Where the product of one matrix lies, its rank, and squared norms: all, what is left.

    A rank of None: all of the matrix belongs to the product, and nothing is kept.
    """

    rank: int | None
    left: int
    right: int
    norm_sq: float
    rest_sq: float


class Factors(NamedTuple):
    """The products of a tensor's matrices, in their order."""

    scratch: Scratch
    matrices: tuple[Kept, ...]

    @staticmethod
    def of(products: Iterable[Product], scratch: Scratch) -> "Factors":
        """Return products as they are kept: written as they come."""

        def put(values: Array) -> int:
            return scratch.add(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)

        kept = []
        for left, right, norm_sq, rest_sq in products:
            if left is None or right is None:
                kept.append(Kept(None, 0, 0, norm_sq, 0.0))
            else:
                kept.append(Kept(left.shape[1], put(left), put(right), norm_sq, rest_sq))
        return Factors(scratch, tuple(kept))

    def read(self, begin: int, rows: int, rank: int) -> Array:
        """Return rows of L or R, of `rank` values each, from where they lie."""
        values = np.empty((rows, rank), np.float32)
        self.scratch.read(begin, values.view(np.uint8).reshape(-1).data)
        return values


@dataclass(frozen=True, slots=True, repr=False)
class LowRankDelta(DeltaSource):
    """What of a delta's matrices is a product of low rank (`inside`), or what is left of them.

    The matrices are the last two dimensions. The product is that of the leading singular triplets,
    or of what a subspace of the inputs meets. Values are fp64, for whoever adds them up to round
    once. `known` is what a pass over whole matrices has found.
    """

    source: DeltaSource
    spec: TensorSpec = field()
    origin: str  # what tells its vector from others in one run
    rank: int
    energy: float
    inside: bool
    rescale: bool = False
    subspace: Subspace | None = None
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
            self._part(number, inside, values[at - block.begin : stop - block.begin])
            at = stop
        return Delta(values, "F64"), NO_RECORDS

    def _part(self, number: int, begin: int, values: Array) -> None:
        """Turn values of one matrix, from its position `begin` on, into those of this delta."""
        assert self.known is not None
        kept, n = self.known.matrices[number], self.shape[1]
        if kept.rank is None:
            if not self.inside:
                values[:] = 0
            return
        first, last = begin // n, -(-(begin + values.size) // n)
        left = self.known.read(kept.left + 4 * first * kept.rank, last - first, kept.rank)
        found, step = np.empty((last - first, n)), max(1, BLOCK_NUMEL // kept.rank)
        for column in range(0, n, step):  # as many as keep R within a block
            count = min(step, n - column)
            right = self.known.read(kept.right + 4 * column * kept.rank, count, kept.rank)
            found[:, column : column + count] = multiply(left, right)
        product = found.reshape(-1)[begin - first * n :][: values.size]
        if self.inside:
            values[:] = product
        else:
            values -= product
        if self.rescale:
            held_sq = kept.norm_sq - kept.rest_sq if self.inside else kept.rest_sq
            values *= (kept.norm_sq / held_sq) ** 0.5 if held_sq > 0 else 1.0


def low_rank_in(deltas: Iterable[DeltaSource]) -> Iterator[LowRankDelta]:
    """Yield such deltas among deltas and in what they are made of."""
    for delta in deltas:
        if isinstance(delta, LowRankDelta):
            yield delta
        yield from low_rank_in(delta.parts)
