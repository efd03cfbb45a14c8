"""Scores of two supports added up over rows and over columns: what structure they have.

Of one value x says whether a changes it, y whether b does, p and q how often they change values of
its stratum. Its scores are (x - p)(y - q), x - p, y - q and, where both change it, +1 or -1 for
equal or opposite signs. They are integers, the first three in units of 2^-30, so that sums have one
value in any order. `numpy_scores` says what is summed; native/compare.c gives the same.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.analysis.spreads import Seen
from skillvec.ops import compiled
from skillvec.ops.kernels import Array
from skillvec.ops.lanes import Sums
from skillvec.ops.strata import STRATA, Strata, strata_of

UNIT = 1 << 30
OVERLAP, IN_A, IN_B, SIGNS = range(4)  # scores of a value
I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]
SELF_CHECK = "e702ae08ac51088b"  # of what numpy makes of the sample; a test compares


@np.errstate(all="ignore")
def by_chance(size: Any, in_a: Any, in_b: Any) -> tuple[Sums, Sums]:
    """Return mean and variance of how many of `in_a` and `in_b` of `size` values are the same.

    The hypergeometric law, elementwise.
    """
    size, in_a, in_b = (np.asarray(count, np.float64) for count in (size, in_a, in_b))
    mean = np.where(size > 0, in_a * in_b / size, 0.0)
    spread = mean * (size - in_a) * (size - in_b) / (size * (size - 1))
    return mean, np.where(size > 1, spread, 0.0)


def sizes_of(counts: npt.NDArray[Any]) -> tuple[Sums, Sums, Sums]:
    """Return values, values that a changes and values that b changes from counts (.., 4)."""
    held = counts.astype(np.float64)
    b, a, both = held[..., 1], held[..., 2], held[..., 3]
    return held.sum(axis=-1), a + both, b + both


def table_of(strata: Strata) -> I32Array:
    """Return the scores by stratum and by what happens there, (STRATA, 8, 4).

    Bit 0 of what happens: b changes the value, bit 1: a does, bit 2: with opposite signs.
    """
    size, in_a, in_b = (side[:, None] for side in sizes_of(strata.counts))
    events = np.arange(8)
    x, y, opposed = events >> 1 & 1, events & 1, events >> 2
    in_a, in_b = (x - in_a / size) * UNIT, y - in_b / size
    scores = np.stack([in_a * in_b, in_a, in_b * UNIT], axis=-1)
    table = np.zeros((STRATA, 8, 4), np.int32)
    table[strata.numbers, :, :SIGNS] = np.rint(scores)
    table[..., SIGNS] = (x & y) * (1 - 2 * opposed)
    return table


def add_scores(
    a: Array, b: Array, weights: Array | None, dtype: str, table: I32Array, columns: I64Array
) -> I64Array:
    """Return the scores of whole rows, (rows, 4), and add them to those of the columns.

    Deltas and weights are rows x columns, `columns` (columns, 4). Weights in fp32 are taken as the
    grid of `dtype` holds them; without any all values are of stratum 0.
    """
    kernel = _kernel()
    arrays = [a, b] if weights is None else [a, b, weights]
    if kernel is None or any(side.dtype != np.float32 for side in arrays):
        return numpy_scores(a, b, weights, dtype, table, columns)
    return call_scores(kernel, a, b, weights, dtype, table, columns)


def call_scores(
    kernel: compiled.Kernel, a: Array, b: Array, weights: Array | None, dtype: str,
    table: I32Array, columns: I64Array,
) -> I64Array:  # fmt: skip
    """Return and add what `numpy_scores` does, by a compiled kernel."""
    rows = np.empty((len(a), 4), np.int64)
    held = np.zeros(0, np.float32) if weights is None else weights
    kernel(a, b, held, compiled.CODES[dtype], table, rows, columns)
    return rows


def numpy_scores(
    a: Array, b: Array, weights: Array | None, dtype: str, table: I32Array, columns: I64Array
) -> I64Array:
    """Return the scores of whole rows and add them to those of the columns, by numpy."""
    codes = np.zeros(a.shape, np.int64)
    if weights is not None:
        codes = 8 * strata_of(weights, dtype)
    codes += 2 * (a != 0) + (b != 0)
    codes += 4 * (((a > 0) & (b < 0)) | ((a < 0) & (b > 0)))
    rows = np.empty((len(a), 4), np.int64)
    for n, by_code in enumerate(table.reshape(-1, 4).T.copy()):
        scores = by_code[codes]
        rows[:, n] = scores.sum(axis=1, dtype=np.int64)
        columns[:, n] += scores.sum(axis=0, dtype=np.int64)
    return rows


Run = Callable[[Array, Array, Array | None, str, I32Array, I64Array], I64Array]


def sample_scores(run: Run) -> bytes:
    """Return the bytes of what fixed rows give."""
    values = np.arange(12_000, dtype=np.uint32) * np.uint32(2654435761)
    weights = (values & 0xBFFFFFFF).view(np.float32).reshape(3, 4000)
    a, b = ((values >> n & 3).astype(np.float32).reshape(3, 4000) - 1 for n in (3, 9))
    table = (np.arange(STRATA * 32, dtype=np.int32) * 40503).reshape(STRATA, 8, 4)
    found = b""
    for held, dtype in ((weights, "BF16"), (weights, "F16"), (None, "F32")):
        columns = np.ones((4000, 4), np.int64)
        found += run(a, b, held, dtype, table, columns).tobytes() + columns.tobytes()
    return found


class Clusters(NamedTuple):
    """What the scores of a tensor, or of several, have of structure; (overlap, signs) each.

    `channels` are sums along the hidden axis, which tensors share, of `size`, or none; `own` the
    squared sums along an axis that a tensor has alone, `across` those along the other one.
    `effects` is what rows and columns of unequal densities add to the variance of the overlap.
    `cells` are the squared scores of values, `expected` what they are if values are independent.
    """

    across: Sums
    own: Sums
    channels: Sums  # (size, 2)
    effects: float
    cells: Sums
    expected: Sums

    def plus(self, other: "Clusters") -> "Clusters":
        """Return both together: channels are the same ones."""
        held, more = self.channels, other.channels
        if len(held) and len(more):
            held = held + more
        return Clusters(
            self.across + other.across, self.own + other.own, held if len(held) else more,
            self.effects + other.effects, self.cells + other.cells,
            self.expected + other.expected,
        )  # fmt: skip

    def closed(self) -> "Clusters":
        """Return the same without channels, which no other tensor will be added to."""
        own = self.own + (self.channels**2).sum(axis=0)
        return self._replace(own=own, channels=np.zeros((0, 2)))

    def variances(self, whole: Sums) -> Sums:
        """Return the variances of overlap and of signs, which are `whole` without structure.

        Clustered by both axes (Cameron, Gelbach and Miller 2011), and at least what unequal
        densities of rows and columns give, which few shared rows do not show.
        """
        both = self.across + self.closed().own - self.cells + (whole - self.expected)
        least = whole + np.array([self.effects, 0.0])
        return np.asarray(np.maximum(both, least))


class RowScores:
    """Adds up the scores of a pair of deltas of one tensor, from chunks of whole rows in order."""

    def __init__(self, seen: Seen, strata: Strata) -> None:
        self._numel = int(strata.counts.sum())
        self._seen, self._strata, self._table = seen, strata, table_of(strata)
        self._columns = np.zeros((seen.columns, 4), np.int64)
        self._squares = np.zeros(4)
        across = [axis.size for axis in seen.axes if not axis.is_last]
        self._cycle = np.zeros((across[0] if across else 0, 4), np.int64)  # of rows as channels

    def add(self, first: int, a: Array, b: Array, weights: Array | None, dtype: str) -> None:
        """Take the rows from `first` on, without what fills up the last one of a flat tensor."""
        columns = self._seen.columns
        whole = min(len(a), (self._numel - first * columns) // columns)
        rest = self._numel - (first + whole) * columns if whole < len(a) else 0
        found = self._score(a, b, weights, dtype, slice(whole), columns)
        if rest:
            last = self._score(a, b, weights, dtype, slice(whole, whole + 1), rest)
            found = np.concatenate([found, last])
        self._squares += (_scores(found) ** 2).sum(axis=0)
        if len(self._cycle):
            np.add.at(self._cycle, (first + np.arange(len(found))) % len(self._cycle), found)

    def _score(
        self, a: Array, b: Array, weights: Array | None, dtype: str, rows: slice, columns: int
    ) -> I64Array:
        def part(side: Array) -> Array:
            return np.ascontiguousarray(side[rows, :columns])

        held = None if weights is None else part(weights)
        return add_scores(part(a), part(b), held, dtype, self._table, self._columns[:columns])

    def clusters(self) -> Clusters:
        """Return what was found; where two axes may be that of channels, by the one that varies."""
        columns, (cells, expected) = _scores(self._columns), self._cells()
        by_column = (columns**2).sum(axis=0)
        effects = self._excess(self._squares, len(columns))
        effects += self._excess(by_column, self._seen.rows)
        pick, found = [OVERLAP, SIGNS], []
        for axis in self._seen.axes:
            channels = (columns if axis.is_last else _scores(self._cycle))[:, pick]
            across = (self._squares if axis.is_last else by_column)[pick]
            if self._seen.rows == 1:
                across = cells
            one = Clusters(across, np.zeros(2), channels, effects, cells, expected)
            found.append(one if axis.is_shared else one.closed())
        return max(found, key=lambda one: float(one.closed().own[0]))

    def _cells(self) -> tuple[Sums, Sums]:
        """Return the squared scores of all values, and the variances of independent ones."""
        counts = self._strata.counts
        scores = self._table[self._strata.numbers, :4, OVERLAP] / UNIT
        shared = float(counts[:, 3].sum())
        spread = by_chance(*sizes_of(counts))[1].sum()
        return np.array([(counts * scores**2).sum(), shared]), np.array([spread, shared])

    def _excess(self, squares: Sums, length: int) -> float:
        """Return what units of `length` values add to the variance of the overlap.

        Values of a unit have covariances c and d in a and b; units of independent deltas then add
        length (length - 1) c d each.
        """
        if length < 2:
            return 0.0
        size, in_a, in_b = sizes_of(self._strata.counts)
        excess = [max(0.0, float(squares[place] - (held * (1 - held / size)).sum()))
                  for place, held in ((IN_A, in_a), (IN_B, in_b))]  # fmt: skip
        return excess[0] * excess[1] / (float(size.sum()) * (length - 1))


def _scores(sums: I64Array) -> Sums:
    return np.asarray(sums / np.array([UNIT, UNIT, UNIT, 1.0]))


@cache
def _kernel() -> compiled.Kernel | None:
    def sample(kernel: compiled.Kernel) -> bytes:
        return sample_scores(lambda *of: call_scores(kernel, *of))

    return compiled.kernel("support_scores", sample, SELF_CHECK)
