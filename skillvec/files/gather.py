"""Filling a block of a view: which boxes meet it.

What lies turned in its sources a `Gatherer` reads for many blocks at once, and for all threads.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from skillvec.files.header import TensorSpec
from skillvec.files.views import SPAN, Box, Index, Reader, View, copy_box, part_of, span_of, strided
from skillvec.ops.kernels import Array

GATHERED_NBYTES = 1 << 26  # of a turned view, put together at a time
UNIT = 1 << 20  # values of a source that are read at a time for it: what deltas are decoded in
PAGE = 1 << 12  # bytes; columns of rows that are a multiple of it fall into the same cache lines


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
