"""Counts over magnitudes, which give thresholds, probabilities and coefficients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from skillvec.ops.kernels import Array

Parameters = Mapping[str, Any]
Blocks = Sequence[Array]
Weights = Sequence[float]
Given = Sequence[Parameters]
Bits = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]
STEP = 1 << 16  # values a step of the arithmetic, which bounds its temporary arrays
UPPER, LOWER = 1 << 15, 1 << 16  # bins: a magnitude's upper 15 bits (fp32 without sign), then 16


# ------------------------------------------------------------------------------- exact measurement


def magnitude_bits(values: Array) -> Bits:
    """Return the fp32 bits of the magnitudes, which order as they do; only zeros give 0."""
    with np.errstate(over="ignore", under="ignore"):
        bits: Bits = np.abs(values.astype(np.float32, copy=False)).view(np.uint32)
    if values.dtype == np.float64:
        bits[(bits == 0) & (values != 0)] = 1
    return bits


def count_upper(values: Array, given: Parameters, known: None) -> Counts:
    """Count values by the upper bits of their magnitude; the last bin is for zeros."""
    bits = magnitude_bits(values)
    counts: Counts = np.bincount((bits >> 16).astype(np.intp), minlength=UPPER + 1)
    counts[UPPER] = values.size - np.count_nonzero(bits)
    counts[0] -= counts[UPPER]
    return counts


def count_lower(values: Array, given: Parameters, known: list[list[int]]) -> Counts:
    """Count values by the lower bits of their magnitude within each critical upper bin.

    In bin 0 zeros count as well. They are below all others, where no rank that is asked for lies.
    """
    bits = magnitude_bits(values)
    rows = [bits[bits >> 16 == upper] & (LOWER - 1) for upper, _ in known]
    return np.stack([np.bincount(row.astype(np.intp), minlength=LOWER) for row in rows])


def _locate(counts: Counts, rank: int) -> list[int]:
    """Return the bin of the rank-th largest value and its rank within; rank 0 lies above all."""
    above = np.cumsum(counts[::-1])
    steps = int(np.searchsorted(above, rank))
    return [counts.size - 1 - steps, rank - (int(above[steps - 1]) if steps else 0)]


def find_bins(counts: Counts, given: Parameters, known: None) -> list[list[int]]:
    """Locate the smallest value to keep and, where there is `gamma`, the largest.

    floor(gamma * count) values are passed over and the next ceil(density * count) kept; fractions
    are taken as they are written, so that .07 of 100 is 7.
    """
    from fractions import Fraction  # with decimal: few runs need them

    nonzero = int(counts[:UPPER].sum())
    count = nonzero if given["density_of"] == "nonzero" else int(counts.sum())
    passed = math.floor(Fraction(str(given.get("gamma", 0))) * count)
    last = min(passed + math.ceil(Fraction(str(given["density"])) * count), nonzero)
    ranks = [last if passed < nonzero else 0, min(passed + 1, nonzero)]
    return [_locate(counts[:UPPER], rank) for rank in ranks[: 1 + ("gamma" in given)]]


def find_thresholds(counts: Counts, given: Parameters, known: list[list[int]]) -> list[int]:
    """Return the magnitude bits of what `find_bins` located."""
    rows = zip(counts, known, strict=True)
    return [upper << 16 | _locate(row, rank)[0] for row, (upper, rank) in rows]


def find_probabilities(counts: Counts, given: Parameters, known: None) -> list[list[Any]]:
    """Return the upper bins in use and the probability to keep in each (MAGPRUNE).

    It rises linearly with the rank, from density - epsilon for the smallest value to density +
    epsilon for the largest; the values of a bin share the mean of their ranks.
    """
    bins = np.flatnonzero(counts[:UPPER])
    row = counts[bins]
    ends = np.cumsum(row) + (0 if given["density_of"] == "nonzero" else counts[UPPER])
    ranks = ends - (row + 1) / 2  # from 0
    heights = ranks / (ends[-1] - 1) if ends.size and ends[-1] > 1 else np.full(row.size, 0.5)
    lowest = given["density"] - given["epsilon"]
    return [bins.tolist(), (lowest + 2 * given["epsilon"] * heights).tolist()]


def exact_sums(products: Array) -> Counts:
    """Add up float64 values without rounding: int64[2, 2048], for `exact_total`.

    Values of one exponent are multiples of one unit. Their upper 26 and lower 27 bits add up
    exactly in float64 for 2^26 values, then in int64 for 2^36.
    """
    sums = np.zeros((2, 2048), np.int64)
    exponents = np.maximum(np.arange(2048), 1)  # field 0, the subnormals, has the unit of 1
    for begin in range(0, products.size, STEP):
        part = products[begin : begin + STEP]
        pattern = part.view(np.int64)
        upper = (pattern & ~0x7FFFFFF).view(np.float64)
        for half, (bits, unit) in enumerate(((upper, 1048), (part - upper, 1075))):
            added = np.bincount((pattern >> 52) & 2047, bits, 2048)
            sums[half] += np.ldexp(added, unit - exponents).astype(np.int64)
    return sums


def exact_total(sums: Counts) -> int:
    """Return the sum behind `exact_sums` as an integer, in units of 2^-1075."""
    used = np.flatnonzero(sums.any(axis=0)).tolist()
    return sum(((int(sums[0, e]) << 27) + int(sums[1, e])) << max(e, 1) for e in used)


def sum_squares(values: Array, given: Parameters, known: list[int]) -> Counts:
    """Add up the squares of all values, and of those that the thresholds keep."""
    squares = np.square(values, dtype=np.float64)
    return np.stack([exact_sums(squares), exact_sums(squares * mark_between(values, known))])


def find_scale(sums: Counts, given: Parameters, known: list[int]) -> list[Any]:
    """Return the thresholds, and the factor that gives what is kept the norm of all."""
    before, after = map(exact_total, sums)
    return [known, math.sqrt(before / after) if after else 1.0]


def gram(values: Blocks) -> Counts:
    """Add up the products of each pair of vectors, pairs in the order of np.tril_indices."""
    wide = [block.astype(np.float64) for block in values]
    pairs = zip(*np.tril_indices(len(wide)), strict=True)
    return np.stack([exact_sums(wide[i] * wide[j]) for i, j in pairs])


def find_coefficients(sums: Counts) -> list[float]:
    """Return c such that v_0 - sum_j c_j v_j is orthogonal to v_1..v_n: least squares.

    Gauss-Jordan in fractions, so that all machines agree to the bit, which LAPACK does not give. A
    vector in the span of those before it, to 2^-20 of its length, gets 0.
    """
    from fractions import Fraction

    totals = [exact_total(pair) for pair in sums]
    unit = math.gcd(*totals) or 1
    matrix = np.zeros((math.isqrt(2 * len(totals)),) * 2, object)
    for total, *pair in zip(totals, *np.tril_indices(len(matrix)), strict=True):
        matrix[*pair] = matrix[*reversed(pair)] = Fraction(total // unit)
    rows = np.roll(matrix[1:], -1, axis=1)  # v_0, the right-hand side, goes last
    solved = [False] * len(rows)
    for i in range(len(rows)):
        solved[i] = bool(rows[i, i] * 2**40 > matrix[i + 1, i + 1])
        if solved[i]:
            lead = rows[i] / rows[i, i]
            rows = rows - np.outer(rows[:, i], lead)
            rows[i] = lead
    return [float(row[-1]) if done else 0.0 for row, done in zip(rows, solved, strict=True)]


# ----------------------------------------------------------------------- sparsify: one vector, fp64


def mark_between(values: Array, thresholds: list[int]) -> npt.NDArray[np.bool_]:
    """Return where the magnitude is at least the first threshold and at most the second, if any."""
    bits = magnitude_bits(values)
    smallest, *largest = thresholds
    return (bits >= smallest) & (bits <= largest[0]) if largest else bits >= smallest
