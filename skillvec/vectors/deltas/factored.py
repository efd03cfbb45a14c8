"""A delta as the product of its factors, which is what a file may keep of it.

A stack holds them: of each matrix (the last two dimensions) L, m x k, then R, n x k, row by row.
L R' is the fp64 sum in the order of the columns, rounded once to fp32, so the values depend on no
library, block or thread. Blocks are multiplied out of the rows that they need.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from skillvec.checkpoints.lora_deltas import LowRank
from skillvec.errors import FormatError, SkillvecError
from skillvec.files.header import TensorSpec
from skillvec.files.tensors import Derived, Source, Viewed
from skillvec.files.views import Box, View, concatenate, whole
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import Array
from skillvec.ops.low_rank import Product, find_coarse
from skillvec.vectors.block_reader import NO_RECORDS, Block
from skillvec.vectors.deltas.base import Decoded, DeltaSource, InFile, Stack
from skillvec.vectors.deltas.low_rank import LowRankDelta
from skillvec.vectors.deltas.stored import StoredDelta


def stack_numel(shape: tuple[int, ...], rank: int) -> int:
    """Return how many values the stack of a tensor's factors has."""
    return prod(shape[:-2]) * rank * sum(shape[-2:])


def multiplied(name: str, shape: tuple[int, ...], rank: int, stack: Source) -> LowRank:
    """Return the product of a stack of factors, which gives any range of its values."""
    count, (m, n) = prod(shape[:-2]), shape[-2:]
    left, right = (count, m, rank), (count, rank, n)
    each = rank * (m + n)
    boxes = (
        Box((0, 0, 0), left, stack, 0, (each, rank, 1)),
        Box((0, 0, 0), right, stack, m * rank, (each, 1, rank)),
    )
    return LowRank(name, shape, View(left, boxes[:1]), View(right, boxes[1:]), 1.0)


@dataclass(frozen=True, slots=True, repr=False)
class CoarseDelta(LowRankDelta):
    """The leading triplets of each matrix with short mantissas, multiplied out in fp32."""

    is_read_again: ClassVar[bool] = False

    bits: int = 23

    @property
    def wanted(self) -> Any:
        return self.origin, self.spec.name, self.rank, self.bits

    def find(self, matrix: Array, directions: Array | None) -> Product:
        return find_coarse(matrix, self.rank, self.bits)

    def stored_parts(self, role: str) -> Iterator[tuple[str, InFile]]:
        yield from ()  # who looks at whole matrices holds them against their digests

    @property
    def stack(self) -> "StackDelta":
        dtype = "BF16" if self.bits <= 7 else "F32"
        return StackDelta(self.spec._replace(dtype=dtype), self, self.rank)

    @property
    def found(self) -> Source:
        """The stack, in the scratch file."""
        if self.known is None:
            raise SkillvecError(f"{self.spec.name}: read before its matrices were looked at")
        views, path = [], self.known.scratch.path
        for product in self.known.products:
            for begin, size in zip((product.left, product.right), self.shape, strict=True):
                numel = size * self.rank
                side = TensorSpec(self.spec.name, "F32", (numel,), path, begin, 4 * numel)
                views.append(whole(side, side.shape))
        return Viewed(self.spec.name, "F32", concatenate(views, 0))

    def read(self, block: Block, role: str) -> Decoded:
        product = multiplied(self.spec.name, self.spec.shape, self.rank, self.found)
        return Delta(block.read(role, product), "F32"), NO_RECORDS

    def read_stack(self, block: Block, role: str) -> Decoded:
        return Delta(block.read(role, self.found), "F32"), NO_RECORDS


@dataclass(frozen=True)
class _Decoded(Derived):
    """The values of a stored stack, as one block of it after the other is decoded."""

    name: str
    shape: tuple[int, ...]
    block_of: Callable[[int], Array]
    dtype = "F32"

    @property
    def parts(self) -> tuple[Source, ...]:
        return ()

    def read(self, begin: int, out: Array) -> None:
        while out.size:
            index, at = divmod(begin, BLOCK_NUMEL)
            values = self.block_of(index)[at : at + out.size]
            out[: values.size] = values
            begin, out = begin + values.size, out[values.size :]


@dataclass(frozen=True, slots=True, repr=False)
class FactoredDelta(DeltaSource):
    """A delta of a vector file that keeps the factors: `payload` is their stack, stored."""

    is_stored: ClassVar[bool] = True
    codec: ClassVar[str] = "factors"

    spec: TensorSpec = field()  # of the product
    payload: StoredDelta
    rank: int

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes

    @property
    def stack(self) -> "StackDelta":
        return StackDelta(self.spec._replace(dtype=self.payload.dtype), self, self.rank)

    def stored_parts(self, role: str) -> Iterator[tuple[str, InFile]]:
        yield role, self.payload

    def read(self, block: Block, role: str) -> Decoded:
        held: dict[int, Array] = {}  # the last block that was decoded

        def block_of(index: int) -> Array:
            if index not in held:
                held.clear()
                other = block.of_another(index, self.payload.spec.numel, block.leaves)
                held[index] = self.read_stack(other, role)[0].wide(0, other.size)
            return held[index]

        stack = _Decoded(self.spec.name, self.payload.spec.shape, block_of)
        product = multiplied(self.spec.name, self.spec.shape, self.rank, stack)
        return Delta(block.read(f"{role}.product", product), "F32"), NO_RECORDS

    def read_stack(self, block: Block, role: str) -> Decoded:
        delta, replaced = self.payload.read(block, role)
        if delta.positions.size or replaced.size:
            raise FormatError(f"{self.spec.path}: {self.spec.name}: factors with exceptions")
        return delta, replaced


@dataclass(frozen=True, slots=True, repr=False)
class StackDelta(Stack):
    """The factors of a delta, to be stored; `spec` has the name and shape of the product."""

    spec: TensorSpec = field()
    source: CoarseDelta | FactoredDelta
    rank: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def parts(self) -> tuple[DeltaSource, ...]:
        return (self.source,)

    def stored_parts(self, role: str) -> Iterator[tuple[str, InFile]]:
        yield from self.source.stored_parts(role)

    def informed(self, known: Any) -> "StackDelta":
        return replace(self, source=self.source.informed(known))

    def read(self, block: Block, role: str) -> Decoded:
        return self.source.read_stack(block, role)

    def measured(self) -> tuple[int, float]:
        """Return how many values of the product are not 0, at most, and its norm."""
        known = self.source.known if isinstance(self.source, CoarseDelta) else None
        products = known.products if known is not None else ()
        changed, held_sq = (sum(p.changed for p in products), sum(p.held_sq for p in products))
        return changed, float(np.sqrt(held_sq))
