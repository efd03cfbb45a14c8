"""Views: how a tensor is put together from boxes of others, with strides.

Fused and split experts, shards, transposes, common rows: slices, stacks, joins and transposes of
views are views again, without a byte being read.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from skillvec.ops.kernels import Array

Index = tuple[int, ...]
Reader = Callable[[Any, int, Array], None]  # of a source: fills an array with values from one on
SPAN = 4  # times the wanted values that one read may take, before many short reads are better


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
        for low, sizes in _rectangles(self.shape, begin, begin + len(out)):
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
