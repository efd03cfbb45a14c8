"""Supports of two deltas, counted by the exponent of the weight that both are changes of.

Rounding to 16 bits keeps a change that is large beside the step at its weight, and the step is a
matter of the exponent; at a power of two it is half as wide on one side. So each exponent is a
stratum, its power of two another. `numpy_strata` says what is counted; native/compare.c gives the
same counts.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops import comparison, compiled
from skillvec.ops.comparison import Weights, spelt
from skillvec.ops.delta import STEP, Delta
from skillvec.ops.kernels import Array, F32Array, narrow, widen
from skillvec.ops.statistics import Request

STRATA = 512  # 256 exponents of fp32 as its bits have them, then the powers of two
Counts = npt.NDArray[np.int64]
SELF_CHECK = "4879ceee78d52243"  # of what numpy makes of the samples; a test compares


class Strata(NamedTuple):
    """What a tensor has of each stratum that it has: values that neither, b, a and both change."""

    numbers: npt.NDArray[np.uint16]
    counts: Counts  # (strata, 4)


def count_strata(x: Delta, y: Delta, weights: Weights) -> Counts:
    """Return the counts of a block, (STRATA, 4)."""
    kernel = _kernel()
    if kernel is None or "F64" in (x.dtype, y.dtype, weights[1]):
        return numpy_strata(x, y, weights)
    return call_strata(kernel, x, y, weights)


def counting(
    sides: Iterable[tuple[Delta, Weights | None]], request: Request, tables: dict[int, Counts]
) -> Iterator[tuple[Delta, Weights | None]]:
    """Yield what `statistics.block_sums` takes, and put the counts of pairs into `tables`.

    By the weights of the second of a pair, or those of the first where they are not known.
    """
    seen: dict[int, tuple[Delta, Weights | None]] = {}
    for j, (delta, weights) in enumerate(sides):
        for n in request.by_weight:
            i, other = request.pairs[n]
            if j == i and i not in seen:  # a copy: the buffer is used again
                seen[i] = delta, weights and (weights[0].copy(), weights[1])
            elif j == other and (known := weights or seen[i][1]) is not None:
                tables[n] = count_strata(seen[i][0], delta, known)
        yield delta, weights


def call_strata(kernel: compiled.Kernel, x: Delta, y: Delta, weights: Weights) -> Counts:
    """Return what `numpy_strata` gives, by a compiled kernel."""
    counts = np.empty((STRATA, 4), np.int64)
    kernel(*spelt(x), *spelt(y), weights[0], compiled.CODES[weights[1]], counts)
    return counts


def numpy_strata(x: Delta, y: Delta, weights: Weights) -> Counts:
    """Return the counts by stratum of values that neither, y, x and both change, by numpy."""
    counts = np.zeros(4 * STRATA, np.int64)
    for begin in range(0, x.values.size, STEP):
        end = begin + STEP
        codes = 4 * strata_of(widen(weights[0][begin:end], weights[1]), weights[1])
        codes += 2 * (x.wide(begin, end) != 0) + (y.wide(begin, end) != 0)
        counts += np.bincount(codes, minlength=counts.size)
    return counts.reshape(STRATA, 4)


@np.errstate(all="ignore")
def strata_of(weights: Array, dtype: str) -> Counts:
    """Return the stratum of each weight, in fp32 or fp64, as the 16-bit grid of its dtype holds it.

    That of bf16 for fp32 and fp64.
    """
    wide: F32Array = weights.astype(np.float32, copy=False)
    held = wide if dtype == "F16" else widen(narrow(wide, "BF16"), "BF16")
    bits = held.view(np.uint32)
    return np.asarray((bits >> 23 & 255) + 256 * (bits & 0x7FFFFF == 0), np.int64)


def pack(counts: Counts) -> Strata:
    """Return the strata that a tensor has."""
    numbers = np.flatnonzero(counts.any(axis=1))
    return Strata(numbers.astype(np.uint16), counts[numbers])


@cache
def _kernel() -> compiled.Kernel | None:
    def sample(kernel: compiled.Kernel) -> bytes:
        return comparison.sample_pairs_on_weights(lambda *of: call_strata(kernel, *of))

    return compiled.kernel("count_strata", sample, SELF_CHECK)
