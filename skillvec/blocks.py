"""One block of one tensor: reading it, decoding or computing its deltas, digesting what was read.

Hides where a delta comes from (stored, subtracted, merged). Buffers are those of one
worker and are reused for every block; nothing here knows where results go.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from skillvec import operators
from skillvec.deltas import (
    ComputedDelta,
    DeltaSource,
    MixDelta,
    PairDelta,
    ViewDelta,
    key_of,
)
from skillvec.errors import FormatError, NonfiniteError
from skillvec.kernels import STORAGE_DTYPE, Array
from skillvec.merging import Place
from skillvec.operators import NO_POSITIONS, STEP, Delta, Subtraction
from skillvec.sources import Derived, Gatherer, Source, fill, gathering, read_values
from skillvec.storage import ITEMSIZE, LEAF_NBYTES, TensorSpec, allocate, leaf_digests
from skillvec.vectorfile import BLOCK_NUMEL, REPLACEMENT, BlockReader, StoredDelta, block_count

NO_RECORDS: npt.NDArray[Any] = np.zeros(0, REPLACEMENT)
TUNED, BASE, LOST = 1, 2, 4  # of a value without a finite delta: which sides are not finite
VIEW = ".view"  # what the role of a delta read through a view has more


class Workspace:
    """The buffers of one worker, reused for every block."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, slot: str, dtype: str, numel: int) -> Array:
        """Return uninitialised room for `numel` values of a safetensors dtype."""
        nbytes = numel * ITEMSIZE[dtype]
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.size < nbytes:
            buffer = np.frombuffer(allocate(nbytes or 1), np.uint8)
            self._buffers[slot] = buffer
        return buffer[:nbytes].view(STORAGE_DTYPE[dtype])


@dataclass
class Block:
    """Block `index` of a tensor of `numel` values.

    `leaves` collect the digests of the tensor by role, in the place of each block, `seen` those of
    the deltas that views read, by key; `holes` are those of which a value has no finite
    delta. `subtracted` is what was found when the first delta is a
    pair, for which the bits `casts` of operators.CASTS are looked for. `tuned_nonfinite` and
    `base_nonfinite` add up over all pairs that the block reads; `lost_codes` are LOST with
    the sides that are why where what it reads has no finite delta, which is 0 there; or None.
    """

    index: int
    numel: int
    workspace: Workspace
    readers: Mapping[str, BlockReader]  # by file
    leaves: dict[str, bytearray]
    measure: bool = False  # whether the norm of a difference is wanted
    seen: dict[str, dict[str, bytearray]] = field(default_factory=dict)
    holes: set[str] = field(default_factory=set)
    subtracted: Subtraction | None = None
    casts: int = 0
    tuned_nonfinite: int = 0
    base_nonfinite: int = 0
    lost_codes: npt.NDArray[np.uint8] | None = None

    @property
    def lost(self) -> int:
        """How many values have no finite delta."""
        return 0 if self.lost_codes is None else int(np.count_nonzero(self.lost_codes))

    @property
    def begin(self) -> int:
        return self.index * BLOCK_NUMEL

    @property
    def size(self) -> int:
        return min(BLOCK_NUMEL, self.numel - self.begin)

    def array(self, slot: str, dtype: str) -> Array:
        """Return uninitialised room for the block's values."""
        return self.workspace.array(slot, dtype, self.size)

    def read(self, slot: str, source: Source) -> Array:
        """Return the block of a tensor, read into the slot's buffer."""
        values = self.array(slot, source.dtype)
        read_values(source, self.begin, values)
        return values

    def digest(self, role: str, values: Array) -> None:
        """Take the leaves of the block's bytes."""
        per_block = -(-BLOCK_NUMEL * values.itemsize // LEAF_NBYTES) * 16
        leaves = self.leaves.get(role)
        if leaves is None:  # setdefault is atomic, a lock here would be taken thrice a block
            total = -(-self.numel * values.itemsize // LEAF_NBYTES) * 16
            leaves = self.leaves.setdefault(role, bytearray(total))
        digests = leaf_digests(values.view(np.uint8).data)
        leaves[self.index * per_block : self.index * per_block + len(digests)] = digests

    def stamp(self, role: str, digest: bytes) -> None:
        """Take the one digest of the block's stored bytes."""
        leaves = self.leaves.get(role)
        if leaves is None:
            leaves = self.leaves.setdefault(role, bytearray(16 * block_count(self.numel)))
        leaves[16 * self.index : 16 * (self.index + 1)] = digest

    def delta(self, source: DeltaSource, role: str) -> tuple[Delta, npt.NDArray[Any]]:
        """Return the block of a delta, and the replacements that go with it."""
        if isinstance(source, MixDelta):
            return self._merged(source, role), NO_RECORDS
        if isinstance(source, StoredDelta):
            return self._stored(source, role)
        if isinstance(source, ViewDelta):
            return self._viewed(source, role), NO_RECORDS
        if isinstance(source, ComputedDelta):
            return self._computed(source, role), NO_RECORDS
        return self._difference(source, role)

    def _computed(self, source: ComputedDelta, role: str) -> Delta:
        values = self.read(role, source.source)
        wrong = ~np.isfinite(values)
        if wrong.any():
            self.lose(np.flatnonzero(wrong))
            values[wrong] = 0
        values += 0  # no negative zeros
        return Delta(values, source.source.dtype)

    def lose(self, at: Array, sides: Array | int = 0) -> None:
        """Note positions without a finite delta, and which sides are not finite there."""
        if self.lost_codes is None:
            self.lost_codes = np.zeros(self.size, np.uint8)
        self.lost_codes[at] |= np.uint8(LOST) | np.asarray(sides, np.uint8)

    def _viewed(self, source: ViewDelta, role: str) -> Delta:
        """Put a delta together from those of another layout, each decoded where it is needed."""
        values = self.array(role, source.spec.dtype)
        held: dict[tuple[str, int], tuple[Block, Array]] = {}  # the last one that was decoded

        def read(part: DeltaSource, begin: int, out: Array) -> None:
            key = key_of(part)
            while out.size:
                index, at = divmod(begin, BLOCK_NUMEL)
                if (key, index) not in held:
                    leaves = self.seen.setdefault(key, {})
                    block = Block(
                        index, part.spec.numel, self.workspace, self.readers, leaves,
                        seen=self.seen, holes=self.holes,
                    )  # fmt: skip
                    wide = block.delta(part, f"{role}{VIEW}")[0].wide(0, block.size)
                    if block.lost_codes is not None:
                        self.holes.add(key)
                    held.clear()
                    held[key, index] = block, wide
                block, wide = held[key, index]
                found = block.lost_codes if out.dtype == np.uint8 else wide
                count = min(out.size, block.size - at)
                out[:count] = 0 if found is None else found[at : at + count]
                begin, out = begin + count, out[count:]

        fill(source, source.view, self.begin, values, read)
        if any(key_of(part) in self.holes for part in source.view.sources):
            codes = np.zeros(self.size, np.uint8)  # once more, for where in this layout
            fill(source, source.view, self.begin, codes, read)
            at = np.flatnonzero(codes)
            if at.size:
                self.lose(at, codes[at])
            self.tuned_nonfinite += int(np.count_nonzero(codes & TUNED))
            self.base_nonfinite += int(np.count_nonzero(codes & BASE))
        return Delta(values, source.spec.dtype)

    def _difference(self, source: PairDelta, role: str) -> tuple[Delta, npt.NDArray[Any]]:
        tuned = self.read("tuned", source.tuned)
        base = self.read("base", source.base)
        if role == "delta0":  # not the second of two pairs, nor part of a combination
            self.digest("tuned", tuned)
            self.digest("base", base)
        found = operators.subtract(
            tuned,
            source.tuned.dtype,
            base,
            source.base.dtype,
            source.dtype,
            source.exactness,
            self.array(role, source.dtype),
            self.array("scratch", "U16"),
            self.measure,
            self.casts,
        )
        self.tuned_nonfinite += found.nonfinite[0]
        self.base_nonfinite += found.nonfinite[1]
        if found.lost.size:
            sides = [(tuned, source.tuned.dtype, TUNED), (base, source.base.dtype, BASE)]
            codes = [where * operators.are_nonfinite(values[found.lost], dtype)
                     for values, dtype, where in sides]  # fmt: skip
            self.lose(found.lost, codes[0] | codes[1])
        if role == "delta0":
            self.subtracted = found
        records = np.zeros(found.replaced.size, REPLACEMENT)
        records["position"], records["bits"] = found.replaced, found.bits
        return found.delta, records

    def _stored(self, source: StoredDelta, role: str) -> tuple[Delta, npt.NDArray[Any]]:
        dtype = source.spec.dtype
        values = self.array(role, dtype)
        if source.codec == "zero":
            values.fill(0)
            return Delta(values, dtype, is_zero=True), NO_RECORDS
        scratch = self.workspace.array("scratch", "U8", values.nbytes + values.size // 8 + 1)
        found = self.readers[source.spec.path].read(source, self.index, values, scratch)
        self.stamp(role, found.digest)
        at = (
            np.ascontiguousarray(found.exceptions["position"])
            if found.exceptions.size
            else NO_POSITIONS
        )
        exact = np.ascontiguousarray(found.exceptions["value"])
        delta = Delta(values, dtype, at, exact, found.is_zero and not at.size)
        return delta, found.replacements

    def _merged(self, source: MixDelta, role: str) -> Delta:
        values = self.array(role, source.spec.dtype)
        for place, wide in self.pieces(source, role):
            at = place.begin - self.begin
            values[at : at + wide[0].size] = source.operator.combine(
                wide, source.weights, source.parameters, place, source.known
            )
        if not np.isfinite(values).all():
            raise FormatError(f"{source.spec.name}: {source.operator.name} left the range of fp32")
        return Delta(values, source.spec.dtype)

    def pieces(self, source: MixDelta, role: str) -> Iterator[tuple[Place, list[Array]]]:
        """Yield the parts of a combination piece by piece, widened, with their place."""
        parts = [self.delta(part, f"{role}.{i}")[0] for i, part in enumerate(source.sources)]
        for begin in range(0, self.size, STEP):
            wide = [part.wide(begin, begin + STEP) for part in parts]
            yield Place(source.spec.name, self.begin + begin, source.seed, source.streams), wide


def pieces_of(
    source: DeltaSource | Source,
    readers: Mapping[str, BlockReader],
    lost: dict[str, int] | None = None,
) -> Iterator[tuple[int, Array]]:
    """Yield begin and values, in fp32 or fp64, of the pieces of a delta or a tensor of a model.

    Where a delta is not finite the values are 0. `lost` takes how many that are, by name; without
    it NonfiniteError is raised behind the last piece.
    """
    spec = source if isinstance(source, TensorSpec | Derived) else source.spec
    workspace, gatherer, count = Workspace(), Gatherer(), 0
    for index in range(block_count(spec.numel)):
        block = Block(index, spec.numel, workspace, readers, {})
        with gathering(gatherer):
            if isinstance(source, TensorSpec | Derived):
                delta = Delta(block.read("point", source), source.dtype)
            else:
                delta = block.delta(source, "delta0")[0]
        count += block.lost
        for begin in range(0, block.size, STEP):
            yield block.begin + begin, delta.wide(begin, min(begin + STEP, block.size))
    if count and lost is None:
        raise NonfiniteError(f"{spec.name}: {count} of {spec.numel} differences are not finite")
    if count and lost is not None:
        lost[spec.name] = count


def add_values(
    source: DeltaSource | Source, readers: Mapping[str, BlockReader], out: Array,
    factor: float = 1.0,
) -> None:  # fmt: skip
    """Add a whole delta times `factor`, or a tensor of a model, to `out`, flat and in fp32.

    Where a delta is not finite it counts as 0: who runs its jobs has counted and refused that.
    """
    for begin, values in pieces_of(source, readers, {}):
        out[begin : begin + values.size] += factor * values
