"""Kinds of deltas: where the values of one tensor come from. One contract, a class a kind.

A delta is stored, subtracted, computed, seen through a view or merged. All kinds are frozen,
picklable addresses and numbers, which plans hold, and read any block of their values. Nothing
else asks what kind a delta is: a new kind is a class that says what `DeltaSource` asks for.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from skillvec import operators
from skillvec.block import BLOCK_NUMEL, block_count
from skillvec.blocks import BASE, NO_RECORDS, REPLACEMENT, TUNED, Block, StoredReader, Workspace
from skillvec.errors import FormatError, NonfiniteError, UsageError
from skillvec.kernels import DTYPE_NAMES, HALVES, Array
from skillvec.merging import Operator, Position
from skillvec.operators import NO_POSITIONS, STEP, Delta, Exactness
from skillvec.sources import (
    Derived,
    Gatherer,
    Source,
    View,
    files_of,
    fill,
    gathering,
    whole,
)
from skillvec.storage import ITEMSIZE, TensorSpec, fold_digest

NO_DIGEST = fold_digest(b"")
VIEW = ".view"  # what the role of a delta read through a view has more
Decoded = tuple[Delta, npt.NDArray[Any]]  # a block, and the replacements that go with it


class DeltaSource(ABC):
    """A tensor's delta: what it is read from, and how a block of it is made.

    A kind is a frozen dataclass with slots; where a field of it stands for a property of this
    contract it is declared with `field()`, or the property would be taken for its default.
    """

    __slots__ = ()
    is_stored: ClassVar[bool] = False  # in a vector file, whose manifest has its digest and counts
    is_relaid: ClassVar[bool] = False  # its values lie in another layout than its vector's own

    @property
    @abstractmethod
    def spec(self) -> Source:
        """The tensor's name and shape, and where it or the first of its parts lies."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What reading all of it reads."""

    @abstractmethod
    def read(self, block: Block, role: str) -> Decoded:
        """Return a block of it; `role` names its buffer, and its digests in `block.leaves`."""

    @property
    def dtype(self) -> str:
        """The safetensors dtype of its values."""
        return self.spec.dtype

    def files(self) -> Iterator[str]:
        """Yield the files that its tensors lie in, perhaps one more than once; no vector files."""
        for part in self.parts:
            yield from part.files()

    @property
    def parts(self) -> "tuple[DeltaSource, ...]":
        """The deltas that it is made of."""
        return ()

    @property
    def merged(self) -> int:
        """How many deltas of one shape are held to make it, 0 where none is merged."""
        return 0

    @property
    def pair(self) -> "PairDelta | None":
        """The two tensors that are subtracted for it, None where it is no difference."""
        return None

    @property
    def is_zero(self) -> bool:
        """Whether it is known to be zero without being read."""
        return False

    def stored_parts(self, role: str) -> "Iterator[tuple[str, StoredDelta]]":
        """Yield the stored deltas that are read whole for it, with their roles."""
        yield from ()

    @property
    def names(self) -> list[str]:
        """The names under which its vector holds what it is made of."""
        return [self.spec.name]

    def name_in_manifest(self, name: str) -> str:
        """Return where its manifest speaks of it if a vector calls it `name`; "" for nowhere."""
        return name

    @property
    def key(self) -> str:
        """What tells it from the others that views read in one run."""
        return f"{self.spec.path}\n{self.spec.name}"

    @property
    def way(self) -> Any:
        """How its values are made: equal ways of equal parts give equal values; None: not sure."""
        return None

    @property
    def passes(self) -> int:
        """How many measuring passes come before it can be read."""
        return 0

    def informed(self, known: Mapping[str, Any]) -> Self:
        """Return it with what measuring passes have found by now, by scope."""
        return self

    def stored_as(self, dtype: str) -> "DeltaSource":
        """Return it as it is read in order to be stored in a dtype."""
        return self

    def as_view(self) -> View:
        """Return it as a view of what it is read from."""
        return whole(self, self.spec.shape)


@dataclass(frozen=True, slots=True)
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

    def stored_parts(self, role: str) -> "Iterator[tuple[str, StoredDelta]]":
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


@dataclass(frozen=True, slots=True)
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
        return replace(self, dtype=dtype)

    def read(self, block: Block, role: str) -> Decoded:
        tuned = block.read("tuned", self.tuned)
        base = block.read("base", self.base)
        if role == "delta0":  # not the second of two pairs, nor part of a combination
            block.digest("tuned", tuned)
            block.digest("base", base)
        found = operators.subtract(
            tuned,
            self.tuned.dtype,
            base,
            self.base.dtype,
            self.dtype,
            self.exactness,
            block.array(role, self.dtype),
            block.array("scratch", "U16"),
            block.measure,
            block.casts,
        )
        block.tuned_nonfinite += found.nonfinite[0]
        block.base_nonfinite += found.nonfinite[1]
        if found.lost.size:
            sides = [(tuned, self.tuned.dtype, TUNED), (base, self.base.dtype, BASE)]
            codes = [where * operators.are_nonfinite(values[found.lost], dtype)
                     for values, dtype, where in sides]  # fmt: skip
            block.lose(found.lost, codes[0] | codes[1])
        if role == "delta0":
            block.subtracted = found
        records = np.zeros(found.replaced.size, REPLACEMENT)
        records["position"], records["bits"] = found.replaced, found.bits
        return found.delta, records


@dataclass(frozen=True, slots=True)
class ComputedDelta(DeltaSource):
    """A tensor's delta as a formula in fp32 or fp64, such as s B A of the adapter `ref`."""

    source: Derived
    ref: str

    @property
    def spec(self) -> Derived:
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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class MixDelta(DeltaSource):
    """A tensor's delta as several to merge by an operator; `known` is what its passes measured."""

    spec: TensorSpec = field()
    sources: tuple[DeltaSource, ...]
    weights: tuple[float, ...]
    parameters: tuple[dict[str, Any], ...]
    operator: Operator
    streams: tuple[str, ...]  # identities, which address random numbers
    origins: tuple[str, ...]  # what tells these vectors from others in one run
    seed: int
    known: Any = None

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    @property
    def parts(self) -> tuple[DeltaSource, ...]:
        return self.sources

    @property
    def merged(self) -> int:
        return len(self.sources)

    def stored_parts(self, role: str) -> Iterator[tuple[str, StoredDelta]]:
        for n, part in enumerate(self.sources):
            yield from part.stored_parts(f"{role}.{n}")

    @property
    def key(self) -> str:
        return f"{self.scope}\n{self.spec.name}"

    @property
    def way(self) -> Any:
        if getattr(self.operator, "random", True):  # other numbers for tensors of other names
            return None
        return self.weights, self.parameters, self.spec.shape

    @property
    def passes(self) -> int:
        return self.operator.passes(self.parameters)

    @property
    def scope(self) -> str:
        """What its measurements are summed over: the tensor, or all with the same parameters."""
        key = [self.operator.name, self.origins, self.seed, self.parameters]
        return json.dumps([*key, self.spec.name, self.weights] if self.per_tensor else key)

    @property
    def per_tensor(self) -> bool:
        return self.operator.scope(self.parameters) == "tensor"

    def measure(self, block: Block, role: str, number: int) -> Array:
        """Return what pass `number` finds in a block: counts (int64), or float64 to be summed."""
        total: Array | None = None
        for place, wide in self._pieces(block, role):
            found = self.operator.measure(
                number, wide, self.weights, self.parameters, place, self.known
            )
            total = found if total is None else total + found
        assert total is not None
        return total

    def settle(self, number: int, total: Array) -> Any:
        """Return what is known when pass `number` over its scope has given `total`."""
        return self.operator.settle(number, total, self.weights, self.parameters, self.known)

    def informed(self, known: Mapping[str, Any]) -> Self:
        return replace(self, known=known.get(self.scope, self.known))

    def read(self, block: Block, role: str) -> Decoded:
        values = block.array(role, self.spec.dtype)
        for place, wide in self._pieces(block, role):
            at = place.begin - block.begin
            values[at : at + wide[0].size] = self.operator.combine(
                wide, self.weights, self.parameters, place, self.known
            )
        if not np.isfinite(values).all():
            raise FormatError(f"{self.spec.name}: {self.operator.name} left the range of fp32")
        return Delta(values, self.spec.dtype), NO_RECORDS

    def _pieces(self, block: Block, role: str) -> Iterator[tuple[Position, list[Array]]]:
        """Yield the parts piece by piece, widened, with their place."""
        parts = [part.read(block, f"{role}.{i}")[0] for i, part in enumerate(self.sources)]
        for begin in range(0, block.size, STEP):
            wide = [part.wide(begin, begin + STEP) for part in parts]
            yield Position(self.spec.name, block.begin + begin, self.seed, self.streams), wide


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


def dtype_of(name: str) -> str:
    """Return the safetensors dtype of a name such as bf16; UsageError for others."""
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype {name!r}: expected one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def views_in(deltas: Iterable[DeltaSource]) -> Iterator[DeltaSource]:
    """Yield the views among deltas, in combinations, and in what views are of."""
    for delta in deltas:
        if delta.is_relaid:
            yield delta
        yield from views_in(delta.parts)


def mixes_in(deltas: Iterable[DeltaSource]) -> list[MixDelta]:
    """Return the combinations among deltas, which may have to be measured before they are read."""
    return [delta for delta in deltas if isinstance(delta, MixDelta)]


def pieces_of(
    source: DeltaSource | Source,
    readers: Mapping[str, StoredReader],
    lost: dict[str, int] | None = None,
) -> Iterator[tuple[int, Array]]:
    """Yield begin and values, in fp32 or fp64, of the pieces of a delta or a tensor of a model.

    Where a delta is not finite the values are 0. `lost` takes how many that are, by name; without
    it NonfiniteError is raised behind the last piece.
    """
    spec = source.spec if isinstance(source, DeltaSource) else source
    workspace, gatherer, count = Workspace(), Gatherer(), 0
    for index in range(block_count(spec.numel)):
        block = Block(index, spec.numel, workspace, readers, {})
        with gathering(gatherer):
            if isinstance(source, DeltaSource):
                delta = source.read(block, "delta0")[0]
            else:
                delta = Delta(block.read("point", source), source.dtype)
        count += block.lost
        for begin in range(0, block.size, STEP):
            yield block.begin + begin, delta.wide(begin, min(begin + STEP, block.size))
    if count and lost is None:
        raise NonfiniteError(f"{spec.name}: {count} of {spec.numel} differences are not finite")
    if count and lost is not None:
        lost[spec.name] = count


def add_values(
    source: DeltaSource | Source, readers: Mapping[str, StoredReader], out: Array,
    factor: float = 1.0,
) -> None:  # fmt: skip
    """Add a whole delta times `factor`, or a tensor of a model, to `out`, flat and in fp32.

    Where a delta is not finite it counts as 0: who runs its jobs has counted and refused that.
    """
    for begin, values in pieces_of(source, readers, {}):
        out[begin : begin + values.size] += factor * values
