"""Sums over a block: two deltas with each other, one delta with the weights that it is added to.

Every value is in every sum. Sums are added in the order of `lanes`: inner products of a pair by
groups of a given width, all else by groups of 1,024 from the block's begin; fp64 deltas in fp64.
The functions that begin with numpy_ say what is computed; native/compare.c gives the same digits in
one read of fp32 and 16-bit deltas.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops import compiled, lanes
from skillvec.ops.delta import NO_VALUES, STEP, Delta
from skillvec.ops.kernels import HALVES, Array, F32Array, narrow, widen
from skillvec.ops.lanes import Sums

STEP_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # of |delta| in steps of the 16-bit grid
PAIR = (
    "product", "groups_sq", "square_a", "square_b", "met_a", "met_b", "clash_a", "clash_b",
    "support_a", "support_b", "shared", "opposed",
)  # fmt: skip
VECTOR = ("square", "support", "kept_dot", "kept_sq", "absorbed", "step_sq")  # then steps
SUPPORT_A = PAIR.index("support_a")  # the first of the counts
GRIDS = {"BF16": (7, 1), "F16": (10, 113)}  # bits of a fraction; least biased fp32 exponent
EXPONENT = np.int32(0x7F800000)  # of fp32
Weights = tuple[Array, str]  # and their dtype


class Compared(NamedTuple):
    """Inner products of two deltas by groups, and the sums of PAIR."""

    groups: Sums
    sums: Sums


def compare_pair(x: Delta, y: Delta, width: int) -> Compared:
    """Return the sums of two deltas of one length, by groups of `width` neighbours.

    `width` is a power of two, 1,024 at most.
    """
    kernel = _kernels()[0]
    if kernel is None or "F64" in (x.dtype, y.dtype):
        return numpy_pair(x, y, width)
    return call_pair(kernel, x, y, width)


def compare_weights(x: Delta, weights: Weights | None) -> Sums:
    """Return the sums of VECTOR, then the counts of steps; zeros where weights are not known."""
    kernel = _kernels()[1]
    if kernel is None or x.dtype == "F64" or (weights is not None and weights[1] == "F64"):
        return numpy_weights(x, weights)
    return call_weights(kernel, x, weights)


# -------------------------------------------------------------------------------------- by kernels


def call_pair(kernel: compiled.Kernel, x: Delta, y: Delta, width: int) -> Compared:
    """Return what `numpy_pair` gives, by a compiled kernel."""
    found = Compared(np.empty(-(-x.values.size // width)), np.empty(len(PAIR)))
    kernel(*spelt(x), *spelt(y), width, *found)
    return found


def call_weights(kernel: compiled.Kernel, x: Delta, weights: Weights | None) -> Sums:
    """Return what `numpy_weights` gives, by a compiled kernel."""
    sums = np.empty(len(VECTOR) + len(STEP_EDGES) + 1)
    values, dtype = weights or (NO_VALUES, "F32")
    kernel(*spelt(x), values, compiled.CODES[dtype], sums)
    return sums


def spelt(delta: Delta) -> tuple[Any, ...]:
    """Return a delta as kernels take it."""
    return delta.values, compiled.CODES[delta.dtype], delta.positions, delta.exact


# of what numpy makes of the samples; a test compares
SELF_CHECKS = "7873ab9e006e4d84", "27de10204a38e186"


def _samples() -> tuple[list[Delta], list[Weights]]:
    """Return deltas and weights of every dtype of the kernels: signs, zeros, exceptions, ties."""
    bits = np.arange(3001, dtype=np.uint16) * np.uint16(40503) & 0xBFFF
    bits[::3] = 0
    wide = [widen(np.roll(bits, n), "BF16") for n in (0, 1000, 7)]
    at = np.arange(5, 3001, 411, dtype=np.uint32)
    deltas = [
        Delta(narrow(values, dtype), dtype, at[n:], (at[n:] * np.float32(-0.1)).astype(np.float32))
        for n, (values, dtype) in enumerate(zip(wide, compiled.CODES, strict=False))
    ]
    weights = [(narrow(np.roll(wide[1], 5) * np.float32(1.3), d), d) for d in (*HALVES, "F32")]
    return deltas, weights


def sample_pairs(run: Callable[[Delta, Delta, int], Compared]) -> bytes:
    """Return the bytes of what fixed pairs of deltas give."""
    deltas, _ = _samples()
    found = [run(x, y, width) for x in deltas for y in deltas for width in (1024, 8)]
    return b"".join(part.tobytes() for one in found for part in one)


def sample_weights(run: Callable[[Delta, Weights | None], Sums]) -> bytes:
    """Return the bytes of what fixed deltas on fixed weights give."""
    deltas, weights = _samples()
    return b"".join(run(x, held).tobytes() for x in deltas for held in (None, *weights))


def sample_pairs_on_weights(run: Callable[[Delta, Delta, Weights], Array]) -> bytes:
    """Return the bytes of what fixed pairs of deltas on fixed weights give."""
    deltas, weights = _samples()
    return b"".join(run(x, y, held).tobytes() for x in deltas for y in deltas for held in weights)


@cache
def _kernels() -> tuple[compiled.Kernel | None, ...]:
    def pairs(kernel: compiled.Kernel) -> bytes:
        return sample_pairs(lambda *of: call_pair(kernel, *of))

    def weights(kernel: compiled.Kernel) -> bytes:
        return sample_weights(lambda *of: call_weights(kernel, *of))

    names = ("pair_sums", pairs), ("vector_sums", weights)
    return tuple(
        compiled.kernel(*of, digest) for of, digest in zip(names, SELF_CHECKS, strict=True)
    )


# ---------------------------------------------------------------------------------------- by numpy


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def numpy_pair(x: Delta, y: Delta, width: int) -> Compared:
    """Return the sums of two deltas, by numpy.

    Met is the energy of one where the other is not 0, clash where their signs differ.
    """
    parts, counts = _Parts(SUPPORT_A + 1), np.zeros(4, np.int64)
    for begin in range(0, x.values.size, STEP):
        one, two = x.wide(begin, begin + STEP), y.wide(begin, begin + STEP)
        a, b = lanes.by_rows(one), lanes.by_rows(two)
        in_a, in_b = a != 0, b != 0
        shared = in_a & in_b
        opposed = shared & ((a < 0) != (b < 0))
        if width == lanes.GROUP:
            groups = lanes.row_products(a, b)
        else:
            dtype = np.result_type(one, two)
            rows = [lanes.by_rows(side.astype(dtype), width) for side in (one, two)]
            groups = lanes.row_products(*rows)
        parts.add(-1, groups)
        parts.add(0, groups)
        parts.add(1, groups * groups)
        found = [np.count_nonzero(where) for where in (in_a, in_b, shared, opposed)]
        counts += found
        ones = [where.astype(np.float32) for where in (shared, opposed)]
        for place, side in enumerate((a, b)):
            squares = side * side
            whole = lanes.row_products(side, side, squares)
            parts.add(2 + place, whole)
            fits = whole.max(initial=0) <= 3e38  # else infinity times 0 is no number
            for n, where in enumerate(ones):
                some = whole if found[2 + n] else np.zeros_like(whole)
                if found[2 + n] not in (0, found[place]):
                    terms = squares * where if fits else side * where * side
                    some = lanes.row_products(side, side, terms, where)
                parts.add(4 + 2 * n + place, some)
    sums = np.array([*(lanes.in_order(parts.whole(n)) for n in range(SUPPORT_A)), *counts])
    return Compared(parts.whole(-1), sums)


@np.errstate(all="ignore")
def numpy_weights(x: Delta, weights: Weights | None) -> Sums:
    """Measure a delta in steps of the 16-bit grid at its weights, and what that grid keeps of it.

    By numpy. The grid is that of the weights' dtype where it has 16 bits, else BF16's; a step is
    the distance of neighbours at the weight as the grid holds it (0 below 2^-126). What rounding
    keeps of the delta v is r(w + v) - r(w), 0 where that is not finite.
    """
    parts, steps, support, absorbed = _Parts(4), np.zeros(len(STEP_EDGES) + 1), 0, 0
    for begin in range(0, x.values.size, STEP):
        values = lanes.by_rows(x.wide(begin, begin + STEP))
        changed = values != 0
        moved = int(np.count_nonzero(changed))
        support += moved
        parts.add(0, lanes.row_products(values, values))
        if weights is None:
            continue
        held = lanes.by_rows(weights[0][begin : begin + STEP])
        kept, step, distance = _round(values, changed, held, weights[1])
        reached = [np.count_nonzero(distance >= n) for n in range(1, steps.size)]
        steps -= np.diff([moved, *reached, 0])
        absorbed += moved - int(np.count_nonzero(kept != 0))
        kept = kept.astype(values.dtype, copy=False)
        for place, (one, other) in enumerate(((kept, values), (kept, kept), (step, step))):
            parts.add(1 + place, lanes.row_products(one, other))
    square, *others = (lanes.in_order(parts.whole(place)) for place in range(4))
    return np.array([square, support, others[0], others[1], absorbed, others[2], *steps])


def _round(
    values: Array, changed: npt.NDArray[np.bool_], weights: Array, dtype: str
) -> tuple[F32Array, F32Array, npt.NDArray[np.int32]]:
    """Return what is kept of a delta, the steps at its weights, and its bin by size in steps.

    The bins are clipped by who counts; what is not changed is in none above the first.
    """
    grid = dtype if dtype in HALVES else "BF16"
    fraction, least = GRIDS[grid]
    single = values.astype(np.float32, copy=False)
    wide = widen(weights, dtype).astype(np.float32, copy=False)
    held = wide if dtype in HALVES else widen(narrow(wide, grid), grid)
    kept = widen(narrow(wide + single, grid), grid)
    kept -= held
    power = held.view(np.int32) & EXPONENT
    np.maximum(power, np.int32(least << 23), out=power)
    step = np.maximum(power - np.int32(fraction << 23), 0).view(np.float32)
    step *= changed
    if not np.isfinite(kept).all():
        kept[~np.isfinite(kept)] = 0
    if power.max(initial=0) == EXPONENT:
        step[power == EXPONENT] = 0
    distance = single.view(np.int32) & EXPONENT
    distance -= power
    distance >>= 23
    distance += fraction + 3
    distance *= changed
    return kept, step, distance


class _Parts:
    """Sums of groups by statistic, piece by piece of a block."""

    def __init__(self, count: int) -> None:
        self._held: list[list[Sums]] = [[] for _ in range(count)]

    def add(self, place: int, groups: Sums) -> None:
        self._held[place].append(groups)

    def whole(self, place: int) -> Sums:
        held = self._held[place]
        return np.concatenate(held) if held else np.zeros(0)
