"""What an adapter adds to a weight: s B A, DoRA, sums and pieces of them, made where they are read.

Hides the arithmetic of adapters and the shapes of factors: nothing is ever held whole, and the
bytes depend on no block, thread or library. Rows that are put into a weight are here as well.
"""

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from math import prod
from operator import itemgetter, mul
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.files.tensors import Derived, Source, digest_values, read_values, values_of
from skillvec.files.views import Box, View, row_major, whole
from skillvec.ops.kernels import STORAGE_DTYPE, Array, F32Array, narrow, widen

TILE = 1 << 18  # values multiplied at a time: near the cores, whatever the rank
FIRST = itemgetter(0)


def product(left: Array, right: Array, scaling: float) -> F32Array:
    """Return scaling * (left @ right), float64 m x r and r x n, rounded once to fp32; 0 is +0.

    Defined as the fp64 sum in the order of the ranks, so the bytes depend on no library, block or
    thread. BLAS adds in another order: where its sum is too near a rounding boundary to tell, by
    the bound on both (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), the sum is
    taken as defined. That is 10^-6 to 10^-1 of the values, and four times as fast at rank 64.
    """
    rank = left.shape[1]
    with np.errstate(all="ignore"):
        near = left @ right
        lengths = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=0)
        slack = np.outer(*lengths) * (2.1 * (rank + 1) * 2.0**-53)
        low: F32Array = ((near - slack) * scaling).astype(np.float32)
        at = np.flatnonzero(low != ((near + slack) * scaling).astype(np.float32))
        rows, columns = np.divmod(at, right.shape[1])
        total = np.zeros(at.size)
        for k in range(rank if at.size else 0):
            total += left[rows, k] * right[k, columns]
        low[rows, columns] = total * scaling
        return low + np.float32(0)


@dataclass(frozen=True)
class LoraDelta(Derived):
    """What an adapter adds to the weight `name`, as F32: values that leave fp32 are not finite."""

    name: str
    dtype = "F32"

    def part(self, name: str, shape: tuple[int, ...], box: Box) -> "LoraDelta | None":
        """Return a box of it, which covers all of a tensor of `shape`, as a delta of its own.

        `box` counts this tensor's elements in row-major order. None where only reading it does.
        """
        return None


@dataclass(frozen=True)
class LowRank(LoraDelta):
    """scaling * left @ right under the name of a weight, as F32; about 12 tiles of memory.

    `left` and `right` are views of the factors, experts x m x r and experts x r x n; `shape` is
    experts x m x n, or m x n of one.
    """

    shape: tuple[int, ...]
    left: View
    right: View
    scaling: float

    @property
    def parts(self) -> tuple[Source, ...]:
        return (*self.left.sources, *self.right.sources)

    def part(self, name: str, shape: tuple[int, ...], box: Box) -> "LowRank | None":
        """Return a box of it as a product of its own.

        None where it is no range, perhaps with steps, of experts, rows and columns, laid as
        experts x m x n, as m x n of one, or with the last two turned.
        """
        (m, n), experts = self.shape[-2:], self.left.shape[0]
        units, counts = (m * n, n, 1), (experts, m, n)
        begins = (box.start // (m * n), box.start // n % m, box.start % n)
        spans = [(begin, begin + 1, 1) for begin in begins]
        along: list[int | None] = []  # of each dimension: experts, rows, columns, or just one
        for size, stride in zip(shape, box.strides, strict=True):
            dim = next(i for i in range(3) if stride % units[i] == 0) if size > 1 else None
            along.append(dim)
            if dim is not None:
                step = stride // units[dim]
                spans[dim] = begins[dim], begins[dim] + (size - 1) * step + 1, step
                if step < 1 or spans[dim][1] > counts[dim]:
                    return None
        for turned in (False, True) if len(shape) in (2, 3) else ():
            roles = ((0, 2, 1) if turned else (0, 1, 2))[-len(shape) :]
            if all(dim in (None, role) for dim, role in zip(along, roles, strict=True)):
                (e, row, column), left, right = spans, self.left, self.right
                left, right = left.slice(0, *e).slice(1, *row), right.slice(0, *e).slice(2, *column)
                if turned:
                    left, right = right.transpose(1, 2), left.transpose(1, 2)
                return LowRank(name, shape, left, right, self.scaling)
        return None

    def named(self, name: str) -> "LowRank":
        return replace(self, name=name)

    def read(self, begin: int, out: Array) -> None:
        """Fill `out` (float32)."""
        (m, n), rank = self.shape[-2:], self.left.shape[2]
        done = 0
        while done < out.size:
            row, column = divmod(begin + done, n)
            expert, row = divmod(row, m)
            # the rest of a row that is begun, or rows of one expert that are whole
            rows = 1 if column else max(1, min(m - row, (out.size - done) // n))
            room = out[done : done + min(rows * n - column, out.size - done)].reshape(rows, -1)
            done += room.size
            width = min(room.shape[1], max(1, TILE // rank))
            height = max(1, TILE // max(width, rank))
            for at in range(0, room.shape[1], width):
                end = min(at + width, room.shape[1])
                right = _float64(self.right, expert, 2, column + at, column + end)
                for top in range(0, rows, height):
                    low = min(top + height, rows)
                    left = _float64(self.left, expert, 1, row + top, row + low)
                    room[top:low, at:end] = product(left, right, self.scaling)


def _float64(view: View, expert: int, dim: int, begin: int, end: int) -> npt.NDArray[np.float64]:
    """Return a part of one expert's factor, read and widened."""
    view = view.slice(0, expert, expert + 1).slice(dim, begin, end)
    (source,) = view.sources
    stored = np.empty(prod(view.shape), STORAGE_DTYPE[source.dtype])
    view.fill(0, stored, read_values)
    with np.errstate(invalid="ignore"):  # signalling NaNs, counted with the others
        return widen(stored, source.dtype).astype(np.float64).reshape(view.shape[1:])


class Pair(NamedTuple):
    """The factors of one module: A is rank x in, B is out x rank; an embedding's lie turned.

    Of all experts, as Tinker saves them, A is experts x rank x in and B experts x out x rank; one
    of the two may be of 1, and is shared.

    `magnitudes` of DoRA and the `bias` of B are of length out, None where there is none.
    """

    A: Source
    B: Source
    embedding: bool
    magnitudes: Source | None = None
    bias: Source | None = None

    def sides(self, turned: bool) -> tuple[int, int]:
        """Return the shape of B A, or of its transpose."""
        out, inner = self.B.shape[0], self.A.shape[1]
        return (inner, out) if turned else (out, inner)

    def delta(self, name: str, shape: tuple[int, ...], turned: bool, scaling: float) -> LowRank:
        """Return scaling * B A as a weight of `shape`, or its transpose where it is turned.

        Of E experts, PEFT keeps rank k of expert e in row e r + k of A and column k E + e of B.
        """
        (out, total), inner = self.B.shape, self.A.shape[1]
        experts = shape[0] if len(shape) == 3 else 1
        box = Box((0, 0, 0), (experts, out, total // experts), self.B, 0, (1, total, experts))
        left, right = View(box.sizes, (box,)), whole(self.A, (experts, total // experts, inner))
        if turned:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        return LowRank(name, shape, left, right, scaling)

    def stacked(self, name: str, scaling: float) -> LowRank:
        """Return scaling * B A of 3-D factors, experts x out x in."""
        experts = max(self.A.shape[0], self.B.shape[0])

        def seen(source: Source) -> View:
            view = whole(source, source.shape)
            (box,) = view.boxes
            if source.shape[0] == experts:
                return view
            sizes = (experts, *source.shape[1:])
            return View(sizes, (box._replace(sizes=sizes, strides=(0, *box.strides[1:])),))

        shape = (experts, self.B.shape[1], self.A.shape[2])
        return LowRank(name, shape, seen(self.B), seen(self.A), scaling)

    def merged(self, weight: Source, name: str, turned: bool, scaling: float) -> "LowRank | Dora":
        """Return what PEFT's merge adds to a matrix that fits."""
        added = self.delta(name, weight.shape, turned, scaling)
        if self.magnitudes is None:
            return added
        return Dora(name, weight, added, self.magnitudes, int(turned))


@dataclass(frozen=True)
class Summed(LoraDelta):
    """The sum of several deltas of one weight."""

    summands: tuple[LoraDelta, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.summands[0].shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return tuple(part for summand in self.summands for part in summand.parts)

    def part(self, name: str, shape: tuple[int, ...], box: Box) -> "Summed | None":
        """Return a box of it as a sum of its own, None where a summand has none."""
        found = [summand.part(name, shape, box) for summand in self.summands]
        parts = tuple(part for part in found if part is not None)
        return Summed(name, parts) if len(parts) == len(found) else None

    def read(self, begin: int, out: Array) -> None:
        """Fill `out` (float32)."""
        self.summands[0].read(begin, out)
        other = np.empty_like(out)
        for summand in self.summands[1:]:
            summand.read(begin, other)
            with np.errstate(over="ignore", invalid="ignore"):
                out += other


@dataclass(frozen=True)
class Joined(LoraDelta):
    """Products side by side in one tensor: boxes of them; what none covers is 0."""

    view: View

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.view.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return self.view.sources

    def part(self, name: str, shape: tuple[int, ...], box: Box) -> "LoraDelta | None":
        """Return a box of it as a box of the one product in which it lies, None if in several."""
        units, last = row_major(self.shape), box.start
        last += sum((n - 1) * stride for n, stride in zip(shape, box.strides, strict=True))
        first, end = _index(box.start, self.shape), _index(last, self.shape)
        for held in self.view.boxes:
            edges = zip(held.offset, held.sizes, first, end, strict=True)
            if not all(low <= a <= b < low + n for low, n, a, b in edges):
                continue
            strides = []
            for size, stride in zip(shape, box.strides, strict=True):
                dim = next(i for i, unit in enumerate(units) if stride % unit == 0)
                strides.append(stride // units[dim] * held.strides[dim] if size > 1 else 0)
            inside = (a - low for a, low in zip(first, held.offset, strict=True))
            start = held.start + sum(map(mul, inside, held.strides))
            found = held.source.part(
                name, shape, Box(box.offset, shape, held.source, start, tuple(strides))
            )
            return found if isinstance(found, LoraDelta) else None
        return None

    def read(self, begin: int, out: Array) -> None:
        """Fill `out` (float32)."""
        self.view.fill(begin, out, read_values)


def _index(at: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return where an element of a row-major tensor lies."""
    return tuple(at // unit % n for unit, n in zip(row_major(shape), shape, strict=True))


@dataclass(frozen=True)
class Woven(LoraDelta):
    """Two products whose columns take turns, the first's before the second's; None is 0."""

    shape: tuple[int, ...]
    pieces: tuple[LowRank | None, LowRank | None]

    @property
    def parts(self) -> tuple[Source, ...]:
        return tuple(part for piece in self.pieces if piece for part in piece.parts)

    def read(self, begin: int, out: Array) -> None:
        """Fill `out` (float32)."""
        for which, piece in enumerate(self.pieces):
            first = (which - begin) % 2
            room = out[first::2]
            room[:] = values_of(piece, (begin + first) // 2, room.size) if piece else 0


@dataclass(frozen=True)
class Dora(LoraDelta):
    """m (W + D) / |W + D| - W of a matrix W, magnitudes m and a delta D; a tile or a row of memory.

    `dim` is along what the magnitudes lie: 0 has one for each row, of whose length they take the
    place, 1 one for each column. All in fp64, from D in fp32, rounded once: PEFT, which divides
    and multiplies in fp32, differs by some units of fp32's last place.
    """

    base: Source
    added: LowRank
    magnitudes: Source
    dim: int
    held: dict[str, npt.NDArray[np.float64]] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.added.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return (*self.added.parts, self.magnitudes, self.base)

    def read(self, begin: int, out: Array) -> None:
        """Fill `out` (float32); where W + D is 0 so is its length, and nothing finite comes out."""
        done, (_, n) = 0, self.shape
        while done < out.size:
            row, column = divmod(begin + done, n)
            weight, tuned = self._rows(row, column + out.size - done)
            with np.errstate(all="ignore"):
                made = tuned * self._factors(row, tuned) - weight
                made = made.reshape(-1)[column : column + out.size - done]
                out[done : done + made.size] = made
            done += made.size

    def _rows(self, row: int, wanted: int) -> tuple[npt.NDArray[np.float64], ...]:
        """Return whole rows of W and of W + D, up to `wanted` values or a tile, one at least."""
        m, n = self.shape
        rows = min(m - row, -(-wanted // n), max(1, TILE // n))
        with np.errstate(invalid="ignore"):
            weight = _widened(self.base, row * n, rows * n).reshape(rows, n)
            return weight, weight + values_of(self.added, row * n, rows * n).reshape(rows, n)

    def _factors(self, row: int, tuned: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return m / |W + D| as it is to be multiplied with rows that begin at `row`."""
        if self.dim == 0:
            lengths = np.sqrt((tuned * tuned).sum(axis=1))
            factors: npt.NDArray[np.float64] = _widened(self.magnitudes, row, len(tuned)) / lengths
            return factors[:, None]
        with _columns:  # one pass over the matrix, by whoever comes first
            if "factors" not in self.held:
                (m, n), at = self.shape, 0
                total = np.zeros(n)
                while at < m:
                    _, some = self._rows(at, TILE)
                    total += (some * some).sum(axis=0)
                    at += len(some)
                self.held["factors"] = _widened(self.magnitudes, 0, n) / np.sqrt(total)
        return self.held["factors"]


_columns = Lock()


def _widened(source: Source, begin: int, numel: int) -> npt.NDArray[np.float64]:
    """Return values of a source of floats in fp64."""
    wide = np.empty(numel)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide[:] = widen(values_of(source, begin, numel), source.dtype)
    return wide


@dataclass(frozen=True)
class Times(LoraDelta):
    """A tensor times a number, as what the bias of a factor adds to that of the layer."""

    source: Source
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self.source,)

    def read(self, begin: int, out: Array) -> None:
        """Fill `out` (float32)."""
        with np.errstate(over="ignore", invalid="ignore"):
            out[:] = _widened(self.source, begin, out.size) * self.factor


class Row(NamedTuple):
    """A row of a matrix."""

    source: Source
    at: int


def digest_of_row(row: Row) -> str:
    width = row.source.shape[1]
    return digest_values(row.source, row.at * width, width)


@dataclass(frozen=True)
class RowsPut(Derived):
    """A matrix with some of its rows replaced, rounded to its dtype.

    `rows` are their numbers, in ascending order, and where their values lie.
    """

    name: str
    base: Source
    rows: "tuple[tuple[int, Row], ...]"

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return (*dict.fromkeys(source for _, (source, _) in self.rows), self.base)

    def read(self, begin: int, out: Array) -> None:
        read_values(self.base, begin, out)
        n = self.shape[1]
        first = bisect_left(self.rows, begin // n, key=FIRST)
        for row, (source, at) in self.rows[first:]:
            low, high = max(row * n, begin), min((row + 1) * n, begin + out.size)
            if low >= high:
                break
            values = values_of(source, at * n + low - row * n, high - low)
            if source.dtype != self.dtype:
                values = narrow(widen(values, source.dtype), self.dtype)
            out[low - begin : high - begin] = values
