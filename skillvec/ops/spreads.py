"""How far chance moves the inner product of two deltas: sums over whole rows, and their variances.

All nulls share the numerator S = <a, b> and differ in what they hold for random:

- rows: the signs of the inner products T of rows. Var = sum of T^2. Rows are those that a tensor is
  stored in (the weights of one output), or the slices across the hidden axis: what varies more.
- channels: the signs of the T of the hidden axis, each over all tensors that have the axis.
- rotation: a is turned by one random orthogonal matrix R of the hidden axis, the same in all
  tensors. S = tr(R M), M the sum of A'B of matrices whose columns are the axis and of AB' of those
  whose rows are; E over R of S^2 = |M|^2 / h. It is estimated by K random sign vectors f: the mean
  of (f_k' M f_l)^2 over k != l is unbiased, and its relative variance is 4 / (K r) for M of rank r.

The hidden axis is the size that most tensors have as an axis. A tensor without it has channels and
a rotation of its own. Memory is that of a chunk and of one sketch, K values for each value across
the axis. Nothing here knows paths or threads.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from skillvec.ops.kernels import Array, F32Array
from skillvec.ops.lanes import Sums
from skillvec.ops.philox import draw_uint32

SKETCH = 64  # K
LONGEST = 1 << 16  # an axis that channels are told apart on
FLAT = 1024  # values a row of what is flat and longer


class Axis(NamedTuple):
    """An axis of channels: columns of a matrix, or its rows, once or for each of some blocks."""

    size: int
    is_last: bool
    is_shared: bool


class Seen(NamedTuple):
    """A tensor as a matrix of `rows` x `columns`, and the axes that may be that of channels."""

    rows: int
    columns: int
    axes: tuple[Axis, ...]


def hidden_size(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the size that most tensors have as an axis, of as many the one that more end in."""
    held: Counter[int] = Counter()
    last: Counter[int] = Counter()
    for shape in shapes:
        held.update({size for size in shape if 1 < size <= LONGEST})
        last.update(shape[-1:])
    return max(held, key=lambda size: (held[size], last[size], size), default=0)


def see(shape: tuple[int, ...], hidden: int) -> Seen:
    """Return how the rows and channels of a tensor lie; axes of one value are none."""
    shape = tuple(size for size in shape if size != 1) or (1,)
    if len(shape) > 3 and shape[-1] != hidden:
        shape = shape[0], prod(shape[1:])
    if len(shape) == 1 and shape[0] > LONGEST:
        return Seen(-(-shape[0] // FLAT), FLAT, (Axis(FLAT, True, False),))
    if len(shape) == 3 and shape[0] == hidden and hidden not in shape[1:]:
        shape = shape[0], prod(shape[1:])
    rows, columns = prod(shape[:-1]), shape[-1]
    places = [(columns, True)] + [(size, False) for size in shape[-2:-1]]
    axes = tuple(Axis(size, last, True) for size, last in places if size == hidden)
    if not axes:
        size, last = places[0] if columns <= LONGEST else min(places)
        axes = (Axis(size, last, False),)
    return Seen(rows, columns, axes)


def draw_sketch(seed: int, size: int) -> F32Array:
    """Return K random sign vectors for an axis, `size` x K."""
    drawn = draw_uint32(f"{seed}:sketch:{size}", 0, size * SKETCH // 32)
    bits = np.unpackbits(drawn.view(np.uint8)).reshape(size, SKETCH)
    return bits.astype(np.float32) * 2 - 1


def draw_channel_signs(key: str, size: int) -> Sums:
    """Return a random sign for each channel, addressed by `key`."""
    bits = np.unpackbits(draw_uint32(key, 0, -(-size // 32)).view(np.uint8), count=size)
    return bits.astype(np.float64) * 2 - 1


def rotation_of(sketch: Sums, size: int) -> tuple[float, float]:
    """Return the variance over rotations of an axis of `size`, and the rank r that M seems to have.

    r = |M|^4 / |M'M|^2; that of the sketch is 1/r + 2/K over K^2 pairs of vectors.
    """
    square = float((sketch**2).sum())
    if not square > 0:
        return 0.0, 1.0
    off = square - float((np.diag(sketch) ** 2).sum())
    fourth = float(((sketch.T @ sketch) ** 2).sum()) / square**2
    rank = 1 / max(fourth - 2 / SKETCH, 8 / SKETCH**2)
    return off / (SKETCH * (SKETCH - 1)) / size, max(rank, 1.0)


class Units(NamedTuple):
    """The sum of T^2 over the units whose signs are random, and how many have a T that is not 0."""

    square: float = 0.0
    number: int = 0

    @classmethod
    def of(cls, products: Sums) -> "Units":
        return cls(float(products @ products), int(np.count_nonzero(products)))

    def plus(self, other: "Units") -> "Units":
        return Units(self.square + other.square, self.number + other.number)


NO_UNITS = Units()


class Spread(NamedTuple):
    """What is known of a pair in one tensor."""

    axis: Axis
    stored: Units  # rows as they are stored
    across: Units  # slices across the axis of channels
    channels: Sums  # inner product of each
    sketch: Sums  # K x K


class Variances(NamedTuple):
    """The variances of S by null, the units of each, and the rank of M; a control's product."""

    rows: Units
    channels: Units
    rotation: float
    rank: float
    control: float | None = None


@dataclass(slots=True)
class Totals:
    """Spreads of several tensors, added up one after the other."""

    stored: Units = NO_UNITS
    across: Units = NO_UNITS
    own: Units = NO_UNITS  # channels of tensors without the hidden axis
    own_rotation: float = 0.0
    own_doubt: float = 0.0  # sum of variance^2 / rank
    size: int = 0
    channels: Sums = field(default_factory=lambda: np.zeros(0))
    sketch: Sums = field(default_factory=lambda: np.zeros((SKETCH, SKETCH)))
    control: float | None = None

    def add(self, spread: Spread, signs: Sums | None = None) -> None:
        """Add the spread of a tensor; with `signs` of its channels, a control's product too."""
        self.stored = self.stored.plus(spread.stored)
        self.across = self.across.plus(spread.across)
        if signs is not None:
            self.control = (self.control or 0.0) + float(spread.channels @ signs)
        if spread.axis.is_shared:
            if not self.size:
                self.size, self.channels = spread.axis.size, np.zeros(spread.axis.size)
            self.channels += spread.channels
            self.sketch += spread.sketch
            return
        variance, rank = rotation_of(spread.sketch, spread.axis.size)
        self.own = self.own.plus(Units.of(spread.channels))
        self.own_rotation += variance
        self.own_doubt += variance**2 / rank

    def variances(self) -> Variances:
        shared, rank = rotation_of(self.sketch, max(self.size, 1))
        rotation = shared + self.own_rotation
        doubt = shared**2 / rank + self.own_doubt
        return Variances(
            max(self.stored, self.across), self.own.plus(Units.of(self.channels)),
            rotation, rotation**2 / doubt if doubt > 0 else 1.0, self.control,
        )  # fmt: skip


class SpreadSums:
    """Adds up the spreads of pairs of deltas of one tensor, from chunks of whole rows in order."""

    def __init__(
        self, seen: Seen, sketches: Sequence[F32Array], pairs: Sequence[tuple[int, int]]
    ) -> None:
        self._rows, self._pairs = seen.rows, pairs
        self._stored = [NO_UNITS] * len(pairs)
        self._axes = [
            _AxisSums(axis, seen.columns, sketch, pairs)
            for axis, sketch in zip(seen.axes, sketches, strict=True)
        ]

    def add(self, first: int, deltas: Sequence[Array]) -> None:
        """Take the rows from `first` on of each delta."""
        sketched = [axis.sketch_rows(first, deltas) for axis in self._axes]
        for n, (i, j) in enumerate(self._pairs):
            products = deltas[i] * deltas[j]
            rows = products.sum(axis=1).astype(np.float64)
            units = _units_of_one(deltas[i][0], deltas[j][0]) if self._rows == 1 else Units.of(rows)
            self._stored[n] = self._stored[n].plus(units)
            for axis, blocks in zip(self._axes, sketched, strict=True):
                axis.add(n, products, rows, blocks)

    def spread(self, n: int, factor: float) -> Spread:
        """Return that of pair `n`, along the axis whose rotations make more of it.

        Products are `factor` times those of what was added.
        """
        stored = self._stored[n]
        across = [stored if held.axis.is_last else held.across[n] for held in self._axes]
        turned = [rotation_of(held.sketch[n], 1)[0] for held in self._axes]
        held = self._axes[int(np.argmax(turned))]
        square, count = stored if self._rows == 1 else max(across)
        return Spread(
            held.axis, Units(stored.square * factor**2, stored.number),
            Units(square * factor**2, count), held.channels[n] * factor, held.sketch[n] * factor,
        )  # fmt: skip


def _units_of_one(a: Array, b: Array) -> Units:
    """Return the units of one row: its mean, which may have one sign, and each value off it."""
    one, other = (side.astype(np.float64) for side in (a, b))
    means = one.mean(), other.mean()
    products = (one - means[0]) * (other - means[1])
    return Units.of(np.append(products, means[0] * means[1] * a.size))


_Block = tuple[slice, slice, bool, Sequence[Array]]  # rows of a chunk, channels, whole, sketched


class _AxisSums:
    """Sums of all pairs along one axis; where it is that of rows, block by block of its size."""

    def __init__(
        self, axis: Axis, columns: int, sketch: F32Array, pairs: Sequence[tuple[int, int]]
    ) -> None:
        self.axis, self._signs, self._pairs = axis, sketch, pairs
        self.channels = np.zeros((len(pairs), axis.size))
        self.sketch = np.zeros((len(pairs), SKETCH, SKETCH))
        self.across = [NO_UNITS] * len(pairs)
        self._slices = np.zeros((len(pairs), 0 if axis.is_last else columns))
        self._held: list[Array] = []  # of each delta, of the block at work

    def sketch_rows(self, first: int, deltas: Sequence[Array]) -> list[_Block]:
        """Return the parts of a chunk that lie in one block, with A F or A'F of each delta."""
        count = len(deltas[0])
        if self.axis.is_last:
            whole = slice(0, self.axis.size)
            return [(slice(0, count), whole, True, [delta @ self._signs for delta in deltas])]
        parts: list[_Block] = []
        begin = 0
        while begin < count:
            at = (first + begin) % self.axis.size
            rows = slice(begin, min(count, begin + self.axis.size - at))
            channels = slice(at, at + rows.stop - begin)
            found = [delta[rows].T @ self._signs[channels] for delta in deltas]
            if at:
                found = [held + more for held, more in zip(self._held, found, strict=True)]
            self._held, begin = found, rows.stop
            parts.append((rows, channels, channels.stop == self.axis.size, found))
        return parts

    def add(self, n: int, products: Array, sums: Sums, parts: Sequence[_Block]) -> None:
        """Take the products of pair `n`, with their sums over rows."""
        i, j = self._pairs[n]
        for rows, channels, is_whole, sketched in parts:
            slices = products[rows].sum(axis=0)
            if self.axis.is_last:
                self.channels[n] += slices
            else:
                self.channels[n, channels] += sums[rows]
                self._slices[n] += slices
            if is_whole:
                self.sketch[n] += sketched[i].T @ sketched[j]
            if is_whole and not self.axis.is_last:
                self.across[n] = self.across[n].plus(Units.of(self._slices[n]))
                self._slices[n] = 0
