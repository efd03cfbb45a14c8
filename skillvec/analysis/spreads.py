"""How far chance moves the inner product of two deltas: sums over whole rows, and their variances.

All nulls share the numerator S = <a, b> and differ in what they hold for random:

- rows: the signs of the inner products T of rows. Var = sum of T^2. Rows are those that a tensor is
  stored in (the weights of one output), or the slices across the hidden axis: what varies more.
- channels: the signs of the T of the hidden axis, each over all tensors that have the axis.
- rotation: a is turned by one random orthogonal matrix R of the hidden axis, the same in all
  tensors. S = tr(R M), M the sum of A'B of matrices whose columns are the axis and of AB' of those
  whose rows are; E over R of S^2 = |M|^2 / h.

|M|^2 is exact up to h = K. Beyond, channels with random signs are added into K buckets on either
side of M (count sketch, Charikar, Chen and Farach-Colton 2002): entries between different buckets
have the right mean square, the diagonal of M is the T of channels, and what one bucket holds counts
like the rest. The relative variance is 4 / (K r) for M of rank r.

The hidden axis is the size that most tensors have as an axis. A tensor without it has channels and
a rotation of its own. Memory is that of a chunk and of K sums for each value across the axis.
Nothing here knows paths or threads.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import NamedTuple

import numpy as np

from skillvec.ops.kernels import Array
from skillvec.ops.lanes import Sums
from skillvec.ops.philox import draw_uint32

BUCKETS = 128  # K
EXACT = 1e9  # degrees of freedom of a variance that is no estimate
LONGEST = 1 << 16  # an axis that channels are told apart on
FLAT = 1024  # values a row of what is flat and longer
CLEAR = 1.001  # both axes of a square are alike where a delta meets itself


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


def draw_signs(key: str, size: int) -> Sums:
    """Return a random sign, +1 or -1, for each channel, addressed by `key`."""
    bits = np.unpackbits(draw_uint32(key, 0, -(-size // 32)).view(np.uint8), count=size)
    return bits.astype(np.float64) * 2 - 1


class Turned(NamedTuple):
    """The variance of S over rotations; the rank that M seems to have, and degrees of freedom."""

    variance: float = 0.0
    rank: float = 1.0
    degrees: float = EXACT


@np.errstate(over="ignore", under="ignore", invalid="ignore")  # None in the end
def turn(sketch: Sums, channels: Sums) -> Turned:
    """Return what rotations make of M, from its sketch and the T of channels, its diagonal.

    r = |M|^4 / |M'M|^2: that of the sketch is 1/r + 2/K. The variance has K r / 2 degrees, from the
    mean and the variance of its estimate (Satterthwaite 1946).
    """
    size, buckets = channels.size, len(sketch)
    square = float(np.vdot(sketch, sketch))
    if not 0 < square < np.inf:
        return Turned()
    off = square - float(np.square(sketch.diagonal()).sum())
    most, more = divmod(size, buckets)
    within = more * (most + 1) ** 2 + (buckets - more) * most**2
    lost = (size**2 - size) / (size**2 - within) if size > buckets else 1.0
    unit = (sketch / sqrt(square)).astype(np.float32)
    both = unit.T @ unit
    fourth = float(np.vdot(both, both))
    if size > buckets:
        fourth = max(fourth - 2 / buckets, 8 / buckets**2)
    variance, rank = (float(channels @ channels) + lost * off) / size, max(1.0, 1 / fourth)
    return Turned(variance, rank, buckets * rank / 2 if size > buckets else EXACT)


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

    is_shared: bool  # whether channels are those of the hidden axis
    stored: Units  # rows as they are stored
    across: Units  # slices across the axis of channels
    channels: Sums  # inner product of each
    sketch: Sums  # K x K, or whole


class Variances(NamedTuple):
    """The variances of S by null, with the units that have random signs; a control's product."""

    rows: Units = NO_UNITS
    channels: Units = NO_UNITS
    rotation: Turned = Turned()
    control: float | None = None


@dataclass(slots=True)
class Totals:
    """Spreads of several tensors, added up one after the other."""

    stored: Units = NO_UNITS
    across: Units = NO_UNITS
    own: Units = NO_UNITS  # channels of tensors without the hidden axis
    turned: list[Turned] = field(default_factory=list)  # of these tensors
    channels: Sums | None = None
    sketch: Sums | None = None
    control: float | None = None

    def add(self, spread: Spread, signs: Sums | None = None) -> None:
        """Add the spread of a tensor; with `signs` of its channels, a control's product too."""
        self.stored = self.stored.plus(spread.stored)
        self.across = self.across.plus(spread.across)
        if signs is not None:
            self.control = (self.control or 0.0) + float(spread.channels @ signs)
        if not spread.is_shared:
            self.own = self.own.plus(Units.of(spread.channels))
            self.turned.append(turn(spread.sketch, spread.channels))
        elif self.channels is None or self.sketch is None:
            self.channels, self.sketch = spread.channels.copy(), spread.sketch.copy()
        else:
            self.channels += spread.channels
            self.sketch += spread.sketch

    def variances(self) -> Variances:
        channels, turned = self.own, self.turned.copy()
        if self.channels is not None and self.sketch is not None:
            channels = channels.plus(Units.of(self.channels))
            turned.append(turn(self.sketch, self.channels))
        whole = sum(one.variance for one in turned)
        shares = [(one.variance / whole) ** 2 if whole > 0 else 1.0 for one in turned]
        rank, degrees = (
            1 / sum(share / each for share, each in zip(shares, kind, strict=True))
            for kind in zip(*((one.rank, one.degrees) for one in turned), strict=True)
        )
        rows = max(self.stored, self.across)
        return Variances(rows, channels, Turned(whole, rank, degrees), self.control)


class SpreadSums:
    """Adds up the spreads of pairs of deltas of one tensor, from chunks of whole rows in order."""

    def __init__(self, seen: Seen, signs: Sequence[Sums], pairs: Sequence[tuple[int, int]]) -> None:
        self._rows, self._pairs = seen.rows, pairs
        self._stored = [NO_UNITS] * len(pairs)
        self._axes = [
            (_Columns if axis.is_last else _Rows)(axis, seen.columns, drawn, pairs)
            for axis, drawn in zip(seen.axes, signs, strict=True)
        ]

    def add(self, first: int, deltas: Sequence[Array]) -> None:
        """Take the rows from `first` on of each delta."""
        for axis in self._axes:
            axis.begin(first, deltas)
        for n, (i, j) in enumerate(self._pairs):
            products = deltas[i] * deltas[j]
            rows = products.sum(axis=1).astype(np.float64)
            units = _units_of_one(deltas[i][0], deltas[j][0]) if self._rows == 1 else Units.of(rows)
            self._stored[n] = self._stored[n].plus(units)
            for axis in self._axes:
                axis.add(n, products, rows)

    def spread(self, n: int, factor: float) -> Spread:
        """Return that of pair `n`, along the axis whose rotations make more of it.

        Products are `factor` times those of what was added.
        """
        stored = self._stored[n]
        across = [axis.across[n] if isinstance(axis, _Rows) else stored for axis in self._axes]
        axis = self._axes[0]
        if len(self._axes) > 1:
            turned = [turn(axis.sketch[n], axis.channels[n]).variance for axis in self._axes]
            axis = self._axes[turned[1] > CLEAR * turned[0]]
        most = max(across)
        return Spread(
            axis.is_shared, Units(stored.square * factor**2, stored.number),
            Units(most.square * factor**2, most.number), axis.channels[n] * factor,
            axis.sketch[n] * factor,
        )  # fmt: skip


def _units_of_one(a: Array, b: Array) -> Units:
    """Return the units of one row: its mean, which may have one sign, and each value off it."""
    one, other = (side.astype(np.float64) for side in (a, b))
    means = one.mean(), other.mean()
    products = (one - means[0]) * (other - means[1])
    return Units.of(np.append(products, means[0] * means[1] * a.size))


class _Channels:
    """Sums of all pairs along one axis."""

    def __init__(
        self, axis: Axis, columns: int, signs: Sums, pairs: Sequence[tuple[int, int]]
    ) -> None:
        self.is_shared, self.size, self.pairs = axis.is_shared, axis.size, pairs
        self.buckets = min(axis.size, BUCKETS)
        self.signs = signs.astype(np.float32)
        self.channels = np.zeros((len(pairs), axis.size))
        self.sketch = np.zeros((len(pairs), self.buckets, self.buckets))


class _Columns(_Channels):
    """Channels that are the columns of a matrix."""

    def begin(self, first: int, deltas: Sequence[Array]) -> None:
        """Add up the rows of each delta by buckets."""
        parts = -(-self.size // self.buckets)
        self._sketched = []
        for delta in deltas:
            turned = np.zeros((len(delta), parts * self.buckets), delta.dtype)
            np.multiply(delta, self.signs, out=turned[:, : self.size])
            self._sketched.append(turned.reshape(-1, parts, self.buckets).sum(axis=1))

    def add(self, n: int, products: Array, sums: Sums) -> None:
        """Take the products of pair `n`, with their sums over rows."""
        i, j = self.pairs[n]
        self.channels[n] += products.sum(axis=0)
        self.sketch[n] += self._sketched[i].T @ self._sketched[j]


class _Rows(_Channels):
    """Channels that are the rows of a matrix, or of several of one size below each other."""

    def __init__(
        self, axis: Axis, columns: int, signs: Sums, pairs: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(axis, columns, signs, pairs)
        self.across = [NO_UNITS] * len(pairs)
        self._slices = np.zeros((len(pairs), columns))  # of the matrix at work
        self._held: list[Array] = []  # its rows by buckets, of each delta

    def begin(self, first: int, deltas: Sequence[Array]) -> None:
        """Add up the rows of each delta by buckets, matrix by matrix."""
        self._parts: list[tuple[slice, slice, list[Array]]] = []  # what is whole beside the last
        begin, count = 0, len(deltas[0])
        while begin < count:
            at = (first + begin) % self.size
            rows = slice(begin, min(count, begin + self.size - at))
            channels = slice(at, at + rows.stop - begin)
            if not at:
                self._held = [np.zeros((self.buckets, d.shape[1]), d.dtype) for d in deltas]
            for held, delta in zip(self._held, deltas, strict=True):
                self._gather(delta[rows], channels, held)
            is_whole = channels.stop == self.size
            self._parts.append((rows, channels, self._held if is_whole else []))
            begin = rows.stop

    def _gather(self, rows: Array, channels: slice, held: Array) -> None:
        turned = rows * self.signs[channels, None]
        at = channels.start
        while at < channels.stop:
            bucket = at % self.buckets
            some = turned[at - channels.start :][: self.buckets - bucket]
            held[bucket : bucket + len(some)] += some
            at += len(some)

    def add(self, n: int, products: Array, sums: Sums) -> None:
        """Take the products of pair `n`, with their sums over rows."""
        i, j = self.pairs[n]
        for rows, channels, held in self._parts:
            self.channels[n, channels] += sums[rows]
            self._slices[n] += products[rows].sum(axis=0)
            if held:
                self.sketch[n] += held[i] @ held[j].T
                self.across[n] = self.across[n].plus(Units.of(self._slices[n]))
                self._slices[n] = 0
