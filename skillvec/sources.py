"""Tensors that no file holds as they are: views of others, and the root of those that are computed.

A source has a name, dtype and shape, and gives any range of its values in row-major order. A
`TensorSpec` reads them from a file; a `Derived` makes them of other sources, block by block, so
that nothing is ever held whole. A `View` says how a tensor is put together from boxes of others
(fused and split experts, shards, transposes, common rows) and can be sliced, stacked and turned
without a byte being read. What lies turned in its sources a `Gatherer` reads for many blocks at
once, and for all threads.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from skillvec.kernels import STORAGE_DTYPE, Array, widen
from skillvec.storage import (
    ITEMSIZE,
    LEAF_NBYTES,
    TensorSpec,
    fold_digest,
    leaf_digests,
    read_into,
)

Index = tuple[int, ...]
Reader = Callable[[Any, int, Array], None]  # of a source: fills an array with values from one on
SPAN = 4  # times the wanted values that one read may take, before many short reads are better
GATHERED_NBYTES = 1 << 26  # of a turned view, put together at a time
UNIT = 1 << 20  # values of a source that are read at a time for it: what deltas are decoded in
PAGE = 1 << 12  # bytes; columns of rows that are a multiple of it fall into the same cache lines


class Derived(ABC):
    """A tensor that is made of others when it is read; frozen and picklable.

    `nbytes` is what its values take, not what its parts take on the disk.
    """

    name: str
    dtype: str
    shape: Index

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def nbytes_read(self) -> int:
        """What reading all its values reads, as plans count it."""
        return self.nbytes

    @property
    def path(self) -> str:
        """The file where its first part lies."""
        return next(files_of(self), "")

    @property
    @abstractmethod
    def parts(self) -> "tuple[Source, ...]":
        """What it is read from."""

    @abstractmethod
    def read(self, begin: int, out: Array) -> None:
        """Fill `out`, 1-D in the storage dtype, with values begin.. in row-major order."""


Source = TensorSpec | Derived


def as_integers(source: Source) -> Source:
    """Return a tensor of a dtype that nothing computes with as integers of the same bytes."""
    if source.dtype in STORAGE_DTYPE:
        return source
    width = ITEMSIZE.get(source.dtype, 1)
    dtype = f"U{8 * width}"
    if isinstance(source, TensorSpec):
        shape = source.shape if source.dtype in ITEMSIZE else (source.nbytes,)
        return source._replace(dtype=dtype, shape=shape)
    assert isinstance(source, Viewed)
    boxes = tuple(box._replace(source=as_integers(box.source)) for box in source.view.boxes)
    return Viewed(source.name, dtype, source.view._replace(boxes=boxes))


def value_range(spec: TensorSpec, begin: int, numel: int) -> tuple[str, int, int]:
    """Return where some values of a tensor lie: path, offset and bytes."""
    width = ITEMSIZE[spec.dtype]
    return spec.path, spec.start + begin * width, numel * width


def read_values(source: Source, begin: int, out: Array) -> None:
    """Fill `out`, 1-D in the storage dtype, with the values of a source from `begin` on."""
    if isinstance(source, TensorSpec):
        where = source.start + begin * ITEMSIZE[source.dtype]
        read_into(source.path, where, out.view(np.uint8).data)
    else:
        source.read(begin, out)


def values_of(source: Source, begin: int, numel: int) -> Array:
    """Return some values of a source as a new array."""
    out = np.empty(numel, STORAGE_DTYPE[source.dtype])
    read_values(source, begin, out)
    return out


def read_raw(source: Source, begin: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of a source's values from byte `begin` on."""
    if isinstance(source, TensorSpec):
        read_into(source.path, source.start + begin, buffer)
        return
    source = as_integers(source)
    width = ITEMSIZE[source.dtype]
    first, last = begin // width, -(-(begin + len(buffer)) // width)
    held = values_of(source, first, last - first).view(np.uint8)
    buffer[:] = held[begin - first * width :][: len(buffer)].data


def files_of(source: Source) -> Iterator[str]:
    """Yield the files that a source is read from, first part first, perhaps one more than once."""
    if isinstance(source, TensorSpec):
        yield source.path
    else:
        for part in source.parts:
            yield from files_of(part)


def digest_values(source: Source, begin: int = 0, numel: int | None = None) -> str:
    """Return the digest of some values of a source (all, if not said how many), 8 MiB at a time."""
    source = as_integers(source)
    end = source.numel if numel is None else begin + numel
    width = ITEMSIZE[source.dtype]
    step = 8 * LEAF_NBYTES // width
    buffer = np.empty(min(step, max(end - begin, 1)), STORAGE_DTYPE[source.dtype])
    leaves = bytearray()
    with gathering(Gatherer()) if end - begin > step else contextlib.nullcontext():
        for at in range(begin, end, step):
            piece = buffer[: min(step, end - at)]
            read_values(source, at, piece)
            leaves += leaf_digests(piece.view(np.uint8).data)
    return fold_digest(leaves)


# ---------------------------------------------------------------------------------------- views


class Box(NamedTuple):
    """A part of a view: view[offset + i] = source[start + strides . i] for every i below sizes.

    `start` and `strides` count elements of the source in row-major order; `source` is anything
    that whoever reads the view knows how to read.
    """

    offset: Index
    sizes: Index
    source: Any
    start: int
    strides: Index


class View(NamedTuple):
    """A tensor made of boxes that do not overlap; what none of them covers is 0."""

    shape: Index
    boxes: tuple[Box, ...]

    def slice(self, dim: int, begin: int, end: int, step: int = 1) -> "View":
        """Return view[..., begin:end:step, ...] along a dimension; `step` is 1 or more."""
        boxes = []
        for box in self.boxes:
            low = max(-(-(box.offset[dim] - begin) // step), 0)
            high = -(-(min(box.offset[dim] + box.sizes[dim], end) - begin) // step)
            if low < high:
                first = begin + low * step - box.offset[dim]
                start = box.start + first * box.strides[dim]
                offset, sizes = _put(box.offset, dim, low), _put(box.sizes, dim, high - low)
                strides = _put(box.strides, dim, box.strides[dim] * step)
                boxes.append(Box(offset, sizes, box.source, start, strides))
        return View(_put(self.shape, dim, -(-(end - begin) // step)), tuple(boxes))

    def transpose(self, one: int, other: int) -> "View":
        """Return the view with two dimensions swapped."""

        def swapped(index: Index) -> Index:
            order = list(range(len(index)))
            order[one], order[other] = order[other], order[one]
            return tuple(index[i] for i in order)

        boxes = tuple(
            b._replace(offset=swapped(b.offset), sizes=swapped(b.sizes), strides=swapped(b.strides))
            for b in self.boxes
        )
        return View(swapped(self.shape), boxes)

    def unsqueeze(self) -> "View":
        """Return the view with a first dimension of 1 more."""
        boxes = tuple(
            box._replace(offset=(0, *box.offset), sizes=(1, *box.sizes), strides=(0, *box.strides))
            for box in self.boxes
        )
        return View((1, *self.shape), boxes)

    def squeeze(self) -> "View":
        """Return the view without its first dimension, which is 1."""
        assert self.shape[0] == 1
        boxes = tuple(
            box._replace(offset=box.offset[1:], sizes=box.sizes[1:], strides=box.strides[1:])
            for box in self.boxes
        )
        return View(self.shape[1:], boxes)

    @property
    def sources(self) -> tuple[Any, ...]:
        """What its boxes are read from, each once."""
        return tuple({id(box.source): box.source for box in self.boxes}.values())

    def fill(self, begin: int, out: Array, read: Reader) -> None:
        """Fill `out` with values begin..; read(source, begin, out) gives those of a source."""
        for part, room in self.parts(begin, out):
            copy_box(part, room, read)

    def parts(self, begin: int, out: Array) -> "Iterator[tuple[Box, Array]]":
        """Yield what fills `out` with values begin.., each with its place in it; zeros are set."""
        if sum(prod(box.sizes) for box in self.boxes) < prod(self.shape):
            out[:] = 0
        for low, sizes in _rectangles(self.shape, begin, begin + out.size):
            at = sum(map(_times, low, row_major(self.shape))) - begin
            room = out[at : at + prod(sizes)].reshape(sizes)
            for box in self.boxes:
                part = _common(low, sizes, box)
                if part is not None:
                    begins = [o - c for o, c in zip(part.offset, low, strict=True)]
                    yield part, part_of(room, begins, part.sizes)


def _times(a: int, b: int) -> int:
    return a * b


def part_of(room: Array, begins: Sequence[int], sizes: Index) -> Array:
    """Return a box of an array, also one without dimensions, as a view of it."""
    inside: list[Any] = [slice(b, b + n) for b, n in zip(begins, sizes, strict=True)]
    return room[(*inside, ...)]


def _put(index: Index, dim: int, value: int) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


def row_major(shape: Sequence[int]) -> Index:
    """Return the strides, in elements, of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def whole(source: Any, shape: Sequence[int]) -> View:
    """Return a view that is all of one source."""
    shape = tuple(shape)
    if not prod(shape):
        return View(shape, ())
    return View(shape, (Box((0,) * len(shape), shape, source, 0, row_major(shape)),))


def concatenate(views: Sequence[View], dim: int) -> View:
    """Return views laid end to end along a dimension; ValueError where their shapes differ."""
    shapes = {_put(view.shape, dim, 0) for view in views}
    if len(shapes) != 1:
        raise ValueError(f"shapes that cannot be joined: {[list(view.shape) for view in views]}")
    boxes, at = [], 0
    for view in views:
        for box in view.boxes:
            boxes.append(box._replace(offset=_put(box.offset, dim, box.offset[dim] + at)))
        at += view.shape[dim]
    return View(_put(views[0].shape, dim, at), tuple(boxes))


def stack(views: Sequence[View]) -> View:
    """Return views stacked along a new first dimension."""
    return concatenate([view.unsqueeze() for view in views], 0)


def _rectangles(shape: Index, begin: int, end: int) -> Iterator[tuple[Index, Index]]:
    """Cut a range of a row-major tensor into boxes, at most two a dimension: offsets and sizes."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    inner = prod(shape[1:])
    first, last = -(-begin // inner), end // inner  # whole rows
    if first > last:  # within one row
        row = begin // inner
        for offset, sizes in _rectangles(shape[1:], begin - row * inner, end - row * inner):
            yield (row, *offset), (1, *sizes)
        return
    for low, high in ((begin, first * inner), (last * inner, end)):
        if low == begin and first < last:
            rest = (0,) * (len(shape) - 1)
            yield (first, *rest), (last - first, *shape[1:])
        row = low // inner
        for offset, sizes in _rectangles(shape[1:], low - row * inner, high - row * inner):
            yield (row, *offset), (1, *sizes)


def _common(low: Index, sizes: Index, box: Box) -> Box | None:
    """Return the part of a box inside the box of `sizes` at `low`, None where there is none."""
    start, offset, common = box.start, [], []
    for a, n, b, m, stride in zip(low, sizes, box.offset, box.sizes, box.strides, strict=True):
        begin, end = max(a, b), min(a + n, b + m)
        if begin >= end:
            return None
        offset.append(begin)
        common.append(end - begin)
        start += (begin - b) * stride
    return box._replace(offset=tuple(offset), sizes=tuple(common), start=start)


def span_of(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many values lie from the first to the last of a box in its source."""
    return 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))


def strided(held: Array, sizes: Sequence[int], strides: Sequence[int]) -> Array:
    steps = [stride * held.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(held, sizes, steps)


def copy_box(box: Box, room: Array, read: Reader) -> None:
    """Read a box into an array of its sizes.

    One read where the values lie together, or nearly so; else one for each run of neighbours.
    """
    order = sorted(range(len(box.sizes)), key=lambda dim: -box.strides[dim])
    order = [dim for dim in order if box.sizes[dim] > 1]
    numel = prod(box.sizes)
    span = span_of(box.sizes, box.strides)
    if span == numel and room.flags.c_contiguous and order == sorted(order):
        read(box.source, box.start, room.reshape(-1))
        return
    if span <= SPAN * numel:
        held = np.empty(span, room.dtype)
        read(box.source, box.start, held)
        room[...] = strided(held, box.sizes, box.strides)
        return
    far = order[0]  # the dimension whose neighbours lie farthest apart in the source
    for i in range(box.sizes[far]):
        part = box._replace(sizes=_put(box.sizes, far, 1), start=box.start + i * box.strides[far])
        copy_box(part, room[(slice(None),) * far + (slice(i, i + 1),)], read)


# ---------------------------------------------------------------------------------- turned views


class Gatherer:
    """What reads turned views for the threads that go through them block by block.

    A block of a turned view has values of its whole source, so that each would read, or decode, all
    of it. A gatherer puts many blocks together in one pass over the source, unit by unit, each by a
    thread that waits for one of them, and keeps them until all were taken. It holds two groups of
    `GATHERED_NBYTES` of a view where threads pass from one to the next, and `most` of all views.
    """

    def __init__(self, most: int = 4) -> None:
        self._most, self._lock = most, threading.Lock()
        self._groups: OrderedDict[tuple[int, str, int], _Group] = OrderedDict()
        self._turned: dict[int, tuple[Any, bool]] = {}  # owners live on, so that ids stay theirs

    def fill(self, owner: Any, view: View, begin: int, out: Array, read: Reader) -> None:
        """Do as `view.fill`; `owner` is the one object whose view it is, for all that read it."""
        if id(owner) not in self._turned:
            self._turned[id(owner)] = owner, is_turned(view)
        if not self._turned[id(owner)][1]:
            view.fill(begin, out, read)
            return
        at = 0
        while at < out.size:
            first, end = _group_of(view.shape, begin + at, GATHERED_NBYTES // out.itemsize)
            key = id(owner), out.dtype.str, first
            with self._lock:
                group = self._groups.get(key)
                if group is None:
                    group = self._groups[key] = _Group(view, first, end - first, out.dtype)
                self._groups.move_to_end(key)
                if len(self._groups) > self._most:
                    self._groups.popitem(last=False)
            group.complete(read)
            room = out[at : end - begin]
            room[:] = group.values[begin + at - first :][: room.size]
            at += room.size
            with self._lock:
                group.left -= room.size
                if group.left <= 0:
                    self._groups.pop(key, None)


class _Group:
    """Neighbours in a view, and what is still to be done until they are there."""

    def __init__(self, view: View, begin: int, numel: int, dtype: Any) -> None:
        self.values = np.empty(numel, dtype)
        self.left = numel  # values that nobody has taken yet
        self._units = _units(view, begin, self.values)
        self._begun = self._done = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def complete(self, read: Reader) -> None:
        """Return when all values are there; do of the work what no other thread has begun."""
        while True:
            with self._changed:
                number, self._begun = self._begun, self._begun + 1
            if number >= len(self._units):
                break
            try:
                _read_unit(*self._units[number], read)
            except BaseException as error:
                self._error = error
                raise
            finally:
                with self._changed:
                    self._done += 1
                    self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: self._done >= len(self._units))
        if self._error is not None:
            raise self._error


class _Active(threading.local):
    gatherer: Gatherer | None = None


_active = _Active()


@contextlib.contextmanager
def gathering(gatherer: Gatherer) -> Iterator[None]:
    """Let this thread read turned views through a gatherer: it goes on to what lies behind."""
    before, _active.gatherer = _active.gatherer, gatherer
    try:
        yield
    finally:
        _active.gatherer = before


def is_gathering() -> bool:
    """Return whether this thread reads turned views through a gatherer."""
    return _active.gatherer is not None


def fill(owner: Any, view: View, begin: int, out: Array, read: Reader) -> None:
    """Fill `out` with values begin.. of the view of `owner`: through this thread's gatherer."""
    if _active.gatherer is None:
        view.fill(begin, out, read)
    else:
        _active.gatherer.fill(owner, view, begin, out, read)


def is_turned(view: View) -> bool:
    """Return whether neighbours in a view lie far apart in its sources, and in an order."""
    turned = False
    for box in view.boxes:
        order = _source_order(box)
        inner = [span_of(*_only(box, order[i + 1 :])) for i in range(len(order))]
        if any(box.strides[dim] < n for dim, n in zip(order, inner, strict=True)):
            return False  # values that are there twice
        turned |= order != sorted(order)
    return turned


def _source_order(box: Box) -> list[int]:
    """Return the dimensions of a box as its source has them, the outermost first."""
    dims = [dim for dim, n in enumerate(box.sizes) if n > 1]
    return sorted(dims, key=lambda dim: -box.strides[dim])


def _only(box: Box, dims: Sequence[int]) -> tuple[list[int], list[int]]:
    return [box.sizes[dim] for dim in dims], [box.strides[dim] for dim in dims]


def _group_of(shape: Index, at: int, most: int) -> tuple[int, int]:
    """Return begin and end of the values that go with value `at`: whole rows, whole matrices.

    At most so many, and of what is larger equal shares.
    """
    dim = next(d for d in range(len(shape) + 1) if prod(shape[d:]) <= most)
    if dim == 0:
        return 0, prod(shape)
    inner, count = prod(shape[dim:]), shape[dim - 1]
    step = inner * -(-count // -(-count // (most // inner)))
    first = at - at % (count * inner)
    begin = first + (at - first) // step * step
    return begin, min(begin + step, first + count * inner)


Unit = tuple[int, list[tuple[Box, Array]]]  # its number in the source; boxes and their room


def _units(view: View, begin: int, out: Array) -> list[Unit]:
    """Return what fills `out`, by units of the sources."""
    found: dict[tuple[int, int], list[tuple[Box, Array]]] = {}
    for part, room in view.parts(begin, out):
        last = part.start + span_of(part.sizes, part.strides) - 1
        for number in range(part.start // UNIT, last // UNIT + 1):
            found.setdefault((id(part.source), number), []).append((part, room))
    return [(number, parts) for (_, number), parts in found.items()]


def _read_unit(number: int, parts: Sequence[tuple[Box, Array]], read: Reader) -> None:
    """Read the boxes of one source as far as they lie in a unit of it."""
    pieces = []
    for box, room in parts:
        order = _source_order(box)
        begin = number * UNIT - box.start
        for low, sizes in _boxes_between(*_only(box, order), begin, begin + UNIT):
            begins, counts, start = [0] * len(box.sizes), [1] * len(box.sizes), box.start
            for dim, a, n in zip(order, low, sizes, strict=True):
                begins[dim], counts[dim] = a, n
                start += a * box.strides[dim]
            piece = box._replace(sizes=tuple(counts), start=start)
            pieces.append((piece, part_of(room, begins, piece.sizes)))
    if not pieces:
        return
    first = min(piece.start for piece, _ in pieces)
    end = max(piece.start + span_of(piece.sizes, piece.strides) for piece, _ in pieces)
    source, dtype = parts[0][0].source, parts[0][1].dtype
    few = end - first > SPAN * sum(prod(piece.sizes) for piece, _ in pieces)
    if few and isinstance(source, TensorSpec):  # else it costs more to read less
        for piece, room in pieces:
            copy_box(piece, room, read)
        return
    held = np.empty(end - first, dtype)
    read(source, first, held)
    for piece, room in pieces:
        _turn(held[piece.start - first :], piece, room)


def _turn(held: Array, piece: Box, room: Array) -> None:
    """Copy values that begin with those of a box into an array of its sizes."""
    strides = list(piece.strides)
    far, *inner = _source_order(piece) or [0]
    if strides and strides[far] * held.itemsize % PAGE == 0:
        width = span_of(*_only(piece, inner))
        rows = np.empty((piece.sizes[far], width + PAGE // 64), held.dtype)
        rows[:, :width] = strided(held, (piece.sizes[far], width), (strides[far], 1))
        held, strides[far] = rows, rows.shape[1]
    room[...] = strided(held, piece.sizes, strides)


def _boxes_between(
    sizes: Sequence[int], strides: Sequence[int], begin: int, end: int
) -> Iterator[tuple[Index, Index]]:
    """Cut what of a box lies at begin.. before `end` into boxes: offsets and sizes.

    Its dimensions are those of the source, the outermost first.
    """
    if not sizes:
        if begin <= 0 < end:
            yield (), ()
        return
    inner = span_of(sizes[1:], strides[1:])
    first = min(max(-(-begin // strides[0]), 0), sizes[0])
    last = max(min((end - inner) // strides[0] + 1, sizes[0]), first)
    if first < last:
        yield (first, *[0] * (len(sizes) - 1)), (last - first, *sizes[1:])
    for i in {first - 1, last}:  # of which a part may lie there
        if 0 <= i < sizes[0]:
            at = i * strides[0]
            for low, counts in _boxes_between(sizes[1:], strides[1:], begin - at, end - at):
                yield (i, *low), (1, *counts)


@dataclass(frozen=True)
class Viewed(Derived):
    """A tensor that is a view of other sources, all of its dtype."""

    name: str
    dtype: str
    view: View

    @property
    def shape(self) -> Index:  # type: ignore[override]
        return self.view.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return self.view.sources

    def read(self, begin: int, out: Array) -> None:
        fill(self, self.view, begin, out, read_values)


@dataclass(frozen=True)
class Widened(Derived):
    """A tensor of floats in a wider dtype, F32 or F64, which holds all its values."""

    name: str
    dtype: str
    source: Source

    @property
    def shape(self) -> Index:  # type: ignore[override]
        return self.source.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self.source,)

    def read(self, begin: int, out: Array) -> None:
        out[:] = widen(values_of(self.source, begin, out.size), self.source.dtype)
