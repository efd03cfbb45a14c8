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
from skillvec.ops import device
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.codecs import Encoded, decode_block, encode_block
from skillvec.ops.kernels import STORAGE_DTYPE, Array, Bytes
from skillvec.ops.special import bit_pattern

COMPUTING = {"cuda"}  # types of devices that do the arithmetic on what lies there; others lack fp64
# zstd halves what is kept of a sparse vector, but is a fifth of the time of a change; without it
# ranks of 17 % of 16-bit values and their bitmap take less than this share
LOOSE = 0.15
SAMPLE_NBYTES = 4096  # reads of at most so many bytes of a block are of samples: remembered


class Spot:
    """A parameter or buffer of a module; where it lies is asked anew each time, for models move.

    `why` says why it cannot be changed where it lies, "" where it can.
    """

    def __init__(self, name: str, module: Any, leaf: str, why: str) -> None:
        self.name, self._module, self._leaf, self.why = name, module, leaf, why
        held = self.tensor()
        self.shape: Index = () if hasattr(held, "materialize") else tuple(held.shape)  # lazy: none
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
        if raw.is_contiguous():
            return torch.as_strided(raw, box.sizes, box.strides, raw.storage_offset() + box.start)
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
    """What undoes a block: old ^ new, packed; and the digest of what was written.

    The digest is one of leaf_digests, or the checksum of what was computed on a device.
    """

    packed: bytes
    digest: bytes


@dataclass(eq=False, repr=False)
class Kept:
    """The records of a tensor by block; `samples` are values of the original that were looked at.

    `leaves` are digests of original blocks, by number, of a tensor that a device computes with.
    While it `is_closed` nothing is written: a thread that a second Ctrl-C left behind might.
    """

    records: dict[int, Record] = field(default_factory=dict)
    samples: dict[tuple[int, int], Array] = field(default_factory=dict)
    leaves: dict[int, bytes] = field(default_factory=dict)
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
        samples = self.kept.samples
        if out.nbytes > SAMPLE_NBYTES or out.size >= self._size_of(begin // BLOCK_NUMEL):
            self._read_original(begin, out)
            return
        if (begin, out.size) not in samples:
            self._read_original(begin, out)
            samples[begin, out.size] = out.copy()
        out[:] = samples[begin, out.size]

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

    @property
    def _is_run(self) -> bool:
        """Whether its values are neighbours, in order, in one parameter if that is contiguous."""
        (first, *others), steps = self.view.boxes, row_major(self.shape)
        same = (n == 1 or a == b for n, a, b in zip(self.shape, first.strides, steps, strict=True))
        return not others and all(same)

    def _size_of(self, index: int) -> int:
        return min(BLOCK_NUMEL, self.numel - index * BLOCK_NUMEL)

    def _changed_bits(self, index: int, record: Record) -> Array:
        bits = np.empty(self._size_of(index), f"<u{ITEMSIZE[self.dtype]}")
        decode_block(Encoded(np.frombuffer(record.packed, np.uint8)), "packed", bits)
        return bits

    def _lost(self) -> str:
        return f"{self.name}: something else changed it while a vector was attached"

    def place(self) -> Any:
        """Return the device that does the arithmetic where it lies, None where the host does."""
        first, *others = {spot.tensor().device for spot in self.view.sources}
        return first if not others and first.type in COMPUTING else None

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def original_there(self, begin: int, place: Any) -> Any:
        """Return the original bits of a block as a torch tensor of integers, where it lies."""
        import torch

        signed = getattr(torch, device.SIGNED[self.dtype])
        patterns = torch.empty(self._size_of(begin // BLOCK_NUMEL), dtype=signed, device=place)
        for held, room in self._boxes(begin, patterns):
            room.copy_(held)
        record = self.kept.records.get(begin // BLOCK_NUMEL)
        if record is not None:
            if not _is_of(record, patterns):
                raise VerificationError(self._lost())
            patterns ^= device.from_host(self._changed_bits(begin // BLOCK_NUMEL, record), place)
        return patterns

    def leaves_of(self, begin: int, patterns: Any) -> bytes:
        """Return the digests of an original block; it comes to the host for the first of them."""
        index = begin // BLOCK_NUMEL
        if index not in self.kept.leaves:
            content = device.to_host(patterns, self.dtype).view(np.uint8).data
            self.kept.leaves[index] = leaf_digests(content)
        return self.kept.leaves[index]

    def change(
        self, begin: int, changed: Array, before: Any, after: Any, digest: bytes,
        room: Bytes | None = None,
    ) -> None:  # fmt: skip
        """Write a block in place of `before`, its original bits, and keep what undoes it.

        `before` and `after` are integers, on the host or where the tensor lies, `changed` their
        exclusive or on the host. `digest` is that of `after`, `room` as of encode_block. Where the
        write fails the block holds its original values. Of a block that is as it was nothing is
        kept.
        """
        index, records = begin // BLOCK_NUMEL, self.kept.records
        packed = encode_block(bit_pattern(changed), "packed", room, LOOSE).payload
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
            for index in list(self.kept.records):
                begin = index * BLOCK_NUMEL
                try:
                    place = self.place()
                    if place is not None:
                        original = self.original_there(begin, place)
                    else:
                        original = np.empty(self._size_of(index), f"<u{self.itemsize}")
                        self._read_original(begin, original.view(STORAGE_DTYPE[self.dtype]))
                except SkillvecError:  # changed, of another dtype or shape, or gone
                    whole = False
                else:
                    self._write(begin, original)
                del self.kept.records[index]
        return whole

    def _read_now(self, begin: int, out: Array) -> None:
        """Fill `out` with the values that the parameters hold now."""
        for held, room in self._boxes(begin, bit_pattern(out)):
            if held.device.type == "cpu":
                room[...] = held.numpy().view(room.dtype)
            else:
                _as_torch(room, held.dtype).copy_(held)

    def _write(self, begin: int, patterns: Any) -> None:
        """Write integers, which lie on the host or where the tensor does."""
        import torch

        for held, room in self._boxes(begin, patterns):
            if not isinstance(room, np.ndarray):
                with torch.inference_mode():  # it may be a tensor of inference
                    held.copy_(room)
            elif held.device.type == "cpu":
                held.numpy().view(room.dtype)[...] = room
            else:
                with torch.inference_mode():
                    held.copy_(_as_torch(room, held.dtype))
        for spot in self.view.sources:
            spot.note_change()

    def _boxes(self, begin: int, out: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the torch tensors that values begin.. lie in, each with its place in `out`."""
        first = self.view.boxes[0]
        if self._is_run and first.source.tensor().is_contiguous():
            run = Box((0,), (len(out),), first.source, first.start + begin, (1,))
            yield run.source.patterns(run), out
            return
        for box, room in self.view.parts(begin, out):
            yield box.source.patterns(box), room


def _as_torch(room: Array, dtype: Any) -> Any:
    """Return an array of unsigned integers as a torch tensor of signed ones, of the same memory."""
    import torch

    return torch.from_numpy(room.view(f"i{room.itemsize}")).view(dtype)


def _is_of(record: Record, patterns: Any) -> bool:
    """Return whether a block, on the host or a device, holds what was written with the record."""
    if len(record.digest) == device.CHECKSUM_NBYTES:
        held = device.from_host(patterns, "cpu") if isinstance(patterns, np.ndarray) else patterns
        return device.checksum(held) == record.digest
    held = patterns if isinstance(patterns, np.ndarray) else patterns.cpu().numpy()
    return leaf_digests(held.view(np.uint8).data) == record.digest


def put_all_back(tensors: Sequence[LiveTensor], workers: int) -> list[str]:
    """Put the original values of tensors back; return those of which some are lost."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        done = [pool.submit(LiveTensor.put_back, tensor) for tensor in tensors]
    return [held.name for held, found in zip(tensors, done, strict=True) if not found.result()]
