"""One block of one tensor: its buffers, reading it, digesting what was read.

Hides the buffers of a worker, which are reused for every block. What a delta is made of say the
kinds of deltas, which read a block; nothing here knows where results go.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from skillvec.files.file import LEAF_NBYTES, allocate, leaf_digests, remote_of
from skillvec.files.header import ITEMSIZE, TensorSpec
from skillvec.files.tensors import Source, read_values
from skillvec.ops.arithmetic import Subtraction
from skillvec.ops.block import BLOCK_NUMEL, block_count
from skillvec.ops.kernels import STORAGE_DTYPE, Array, Bytes

REPLACEMENT = np.dtype([("position", "<u4"), ("bits", "<u8")])
NO_RECORDS: npt.NDArray[Any] = np.zeros(0, REPLACEMENT)
TUNED, BASE, LOST = 1, 2, 4  # of a value without a finite delta: which sides are not finite


class StoredBlock(NamedTuple):
    """What a file holds of one block besides its values; `digest` is of the stored bytes."""

    exceptions: npt.NDArray[Any]
    replacements: npt.NDArray[Any]
    digest: bytes
    is_zero: bool


class StoredReader(Protocol):
    """What reads the stored deltas of a file."""

    def read(self, delta: Any, block: int, out: Array, scratch: Bytes) -> StoredBlock: ...


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


@dataclass(slots=True, eq=False, repr=False)
class Block:
    """Block `index` of a tensor of `numel` values.

    `leaves` collect the digests of the tensor by role, in the place of each block, `seen` those of
    the deltas that views read, by key; `holes` are those of which a value has no finite
    delta. `subtracted` is what was found when the first delta is a
    pair, for which the bits `casts` of arithmetic.CASTS are looked for. `tuned_nonfinite` and
    `base_nonfinite` add up over all pairs that the block reads; `lost_codes` are LOST with
    the sides that are why where what it reads has no finite delta, which is 0 there; or None.
    """

    index: int
    numel: int
    workspace: Workspace
    readers: Mapping[str, StoredReader]  # by file
    leaves: dict[str, bytearray]
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

    def read(self, slot: str, source: Source, role: str = "") -> Array:
        """Return the block of a tensor, read into the slot's buffer; digested for a `role`."""
        values = self.array(slot, source.dtype)
        digests, step = b"", max(values.size, 1)
        if role and isinstance(source, TensorSpec) and remote_of(source.path) is None:
            step = LEAF_NBYTES // values.itemsize  # digested while it is in the processor's cache
        for at in range(0, values.size, step):
            piece = values[at : at + step]
            read_values(source, self.begin + at, piece)
            if role:
                digests += leaf_digests(piece.view(np.uint8).data)
        if role:
            self.keep(role, values.itemsize, digests)
        return values

    def keep(self, role: str, itemsize: int, digests: bytes) -> None:
        """Keep the digests of the leaves of the block's bytes."""
        per_block = -(-BLOCK_NUMEL * itemsize // LEAF_NBYTES) * 16
        leaves = self.leaves.get(role)
        if leaves is None:  # setdefault is atomic, a lock here would be taken thrice a block
            total = -(-self.numel * itemsize // LEAF_NBYTES) * 16
            leaves = self.leaves.setdefault(role, bytearray(total))
        leaves[self.index * per_block : self.index * per_block + len(digests)] = digests

    def stamp(self, role: str, digest: bytes) -> None:
        """Take the one digest of the block's stored bytes."""
        leaves = self.leaves.get(role)
        if leaves is None:
            leaves = self.leaves.setdefault(role, bytearray(16 * block_count(self.numel)))
        leaves[16 * self.index : 16 * (self.index + 1)] = digest

    def lose(self, at: Array, sides: Array | int = 0) -> None:
        """Note positions without a finite delta, and which sides are not finite there."""
        if self.lost_codes is None:
            self.lost_codes = np.zeros(self.size, np.uint8)
        self.lost_codes[at] |= np.uint8(LOST) | np.asarray(sides, np.uint8)

    def of_another(self, index: int, numel: int, leaves: dict[str, bytearray]) -> "Block":
        """Return a block of another tensor, which is read for this one by the same worker."""
        return Block(
            index, numel, self.workspace, self.readers, leaves, seen=self.seen, holes=self.holes
        )
