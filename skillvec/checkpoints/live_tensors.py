"""Tensors of a model in memory, as a file would hold them, and what undoes what is written to them.

Hides where parameters lie (which device, strides, views of one storage, several in one fused
parameter) and that their values may have been changed: `LiveTensor.read` always gives the original.
What was changed is kept block by block, as the exclusive or of the old and the new bit patterns in
the codec "packed", with a digest of what was written.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from skillvec.errors import SkillvecError, VerificationError
from skillvec.files.file import leaf_digests
from skillvec.files.header import ITEMSIZE
from skillvec.files.tensors import Derived, Source
from skillvec.files.views import Box, Index, View, row_major
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.codecs import Encoded, decode_block, encode_block
from skillvec.ops.kernels import STORAGE_DTYPE, Array, Bytes
from skillvec.ops.special import bit_pattern

SAMPLE_NBYTES = 4096  # reads of at most so many bytes are remembered: they are those of samples


class Spot:
    """A parameter or buffer of a module; where it lies is asked anew each time, for models move."""

    def __init__(self, name: str, module: Any, leaf: str) -> None:
        self.name, self._module, self._leaf = name, module, leaf
        held = self.tensor()
        self.shape: Index = tuple(held.shape)
        self._dtype = held.dtype

    def tensor(self) -> Any:
        """Return the tensor that the module has there now; SkillvecError where it has none."""
        for kind in (self._module._parameters, self._module._buffers):
            if kind.get(self._leaf) is not None:
                return kind[self._leaf]
        raise SkillvecError(f"{self.name}: the model no longer has it")

    def note_change(self) -> None:
        """Tell autograd that values changed: a graph made before must not be walked back."""
        import torch

        held = self.tensor()
        if not held.is_inference():
            torch.autograd.graph.increment_version(held)

    def patterns(self, box: Box) -> Any:
        """Return a box of its values, as a torch tensor of integers that shares their memory.

        Raises SkillvecError where the tensor is no longer of the dtype and shape that it was of.
        """
        import torch

        held = self.tensor()
        if (held.dtype, tuple(held.shape)) != (self._dtype, self.shape):
            raise SkillvecError(
                f"{self.name}: {held.dtype} {list(held.shape)}, it was {self._dtype}"
                f" {list(self.shape)}"
            )
        widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        raw = held.detach().view(widths[held.element_size()])
        steps = row_major(self.shape)
        offset, rest = raw.storage_offset(), box.start
        for step, stride in zip(steps, raw.stride(), strict=True):
            index, rest = divmod(rest, step) if step else (0, rest)
            offset += index * stride
        strides = [self._stride(n, step, steps, raw) for n, step in _pairs(box)]
        return torch.as_strided(raw, box.sizes, strides, offset)

    def _stride(self, numel: int, step: int, steps: Index, raw: Any) -> int:
        """Return the stride in memory of a box's dimension, of which `step` is the row-major one.

        It runs along one dimension of the tensor: the outermost whose own step divides it.
        """
        if numel == 1:
            return 0
        dim = next(d for d, own in enumerate(steps) if self.shape[d] > 1 and step % own == 0)
        return step // steps[dim] * int(raw.stride(dim))


def _pairs(box: Box) -> Iterator[tuple[int, int]]:
    return zip(box.sizes, box.strides, strict=True)


class Record(NamedTuple):
    """What undoes a block: old ^ new, packed; and the digest of what was written."""

    packed: bytes
    digest: bytes


@dataclass(eq=False, repr=False)
class Kept:
    """The records of a tensor by block; `samples` are values of the original that were looked at.

    While it `is_closed` nothing is written: a thread that a second Ctrl-C left behind might.
    """

    records: dict[int, Record] = field(default_factory=dict)
    samples: dict[tuple[int, int], Array] = field(default_factory=dict)
    is_closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        return sum(len(r.packed) + len(r.digest) for r in list(self.records.values()))


@dataclass(frozen=True, eq=False, repr=False)
class LiveTensor(Derived):
    """A tensor of a model in memory as save_pretrained would write it: a view over its parameters.

    `read` gives what it held before anything was written by `change`.
    """

    name: str
    dtype: str
    view: View  # over Spots; its boxes cover it
    kept: Kept

    @property
    def shape(self) -> Index:  # type: ignore[override]
        return self.view.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return ()

    def of_integers(self, dtype: str) -> Source:
        return replace(self, dtype=dtype)

    def read(self, begin: int, out: Array) -> None:
        """Fill `out` with the original values begin..; VerificationError where they are lost."""
        key = begin, out.size
        if out.nbytes <= SAMPLE_NBYTES and self.kept.records:
            if key not in self.kept.samples:
                self.kept.samples[key] = np.empty_like(out)
                self._read_original(begin, self.kept.samples[key])
            out[:] = self.kept.samples[key]
            return
        self._read_original(begin, out)
        if out.nbytes <= SAMPLE_NBYTES:
            self.kept.samples[key] = out.copy()

    def _read_original(self, begin: int, out: Array) -> None:
        self._read_now(begin, out)
        if not self.kept.records:
            return
        end = begin + out.size
        for index in range(begin // BLOCK_NUMEL, -(-end // BLOCK_NUMEL)):
            record = self.kept.records.get(index)
            if record is None:
                continue
            first = index * BLOCK_NUMEL
            low, high = max(first, begin), min(first + self._size_of(index), end)
            piece = bit_pattern(out[low - begin : high - begin])
            if piece.size == self._size_of(index) and not _is_of(record, piece):
                raise VerificationError(self._lost())
            piece ^= self._changed_bits(index, record)[low - first : high - first]

    def _size_of(self, index: int) -> int:
        return min(BLOCK_NUMEL, self.numel - index * BLOCK_NUMEL)

    def _changed_bits(self, index: int, record: Record) -> Array:
        bits = np.empty(self._size_of(index), f"<u{ITEMSIZE[self.dtype]}")
        decode_block(Encoded(np.frombuffer(record.packed, np.uint8)), "packed", bits)
        return bits

    def _lost(self) -> str:
        return f"{self.name}: something else changed it while a vector was attached"

    def change(
        self, begin: int, before: Array, after: Array, digest: bytes, room: Bytes | None = None
    ) -> None:
        """Write a block in place of `before`, its original values, and keep what undoes it.

        `digest` is that of `after` by leaf_digests, `room` as of encode_block. Where the write
        fails the block holds its original values. Of a block that is as it was nothing is kept.
        """
        index, records = begin // BLOCK_NUMEL, self.kept.records
        packed = encode_block(bit_pattern(before) ^ bit_pattern(after), "packed", room).payload
        with self.kept.lock:
            if self.kept.is_closed:
                raise SkillvecError(f"{self.name}: written to after its originals were put back")
            if not packed.size and index not in records:
                return
            try:
                if packed.size:
                    records[index] = Record(packed.tobytes(), digest)
                self._write(begin, after)
                if not packed.size:
                    del records[index]
            except BaseException:
                self._write(begin, before)
                records.pop(index, None)
                raise

    def put_back(self) -> bool:
        """Put the original values back; return whether all were there to be had.

        Of blocks that something else has changed since, the values stay what they are.
        """
        whole = True
        with self.kept.lock:
            self.kept.is_closed = True
            for index, record in list(self.kept.records.items()):
                values = np.empty(self._size_of(index), STORAGE_DTYPE[self.dtype])
                begin, patterns = index * BLOCK_NUMEL, bit_pattern(values)
                try:
                    self._read_now(begin, values)
                    known = _is_of(record, patterns)
                except SkillvecError:  # of another dtype or shape, or gone
                    known = False
                if known:
                    patterns ^= self._changed_bits(index, record)
                    self._write(begin, values)
                whole &= known
                del self.kept.records[index]
            self.kept.samples.clear()
        return whole

    def _read_now(self, begin: int, out: Array) -> None:
        """Fill `out` with the values that the parameters hold now."""
        for held, room in self._boxes(begin, bit_pattern(out)):
            if held.device.type == "cpu":
                room[...] = held.numpy().view(room.dtype)
            else:
                _as_torch(room, held.dtype).copy_(held)

    def _write(self, begin: int, values: Array) -> None:
        import torch

        for held, room in self._boxes(begin, bit_pattern(values)):
            if held.device.type == "cpu":
                held.numpy().view(room.dtype)[...] = room
            else:
                with torch.inference_mode():  # it may be a tensor of inference
                    held.copy_(_as_torch(room, held.dtype))
        for spot in self.view.sources:
            spot.note_change()

    def _boxes(self, begin: int, out: Array) -> Iterator[tuple[Any, Array]]:
        """Yield the torch tensors that values begin.. lie in, each with its place in `out`."""
        for box, room in self.view.parts(begin, out):
            yield box.source.patterns(box), room


def _as_torch(room: Array, dtype: Any) -> Any:
    """Return an array of unsigned integers as a torch tensor of signed ones, of the same memory."""
    import torch

    return torch.from_numpy(room.view(f"i{room.itemsize}")).view(dtype)


def _is_of(record: Record, patterns: Array) -> bool:
    """Return whether a block holds what was written when the record was made."""
    return leaf_digests(patterns.view(np.uint8).data) == record.digest


def put_all_back(tensors: Sequence[LiveTensor], workers: int) -> list[str]:
    """Put the original values of tensors back; return those of which some are lost."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        done = pool.map(LiveTensor.put_back, tensors)
        return [held.name for held, whole in zip(tensors, done, strict=True) if not whole]
