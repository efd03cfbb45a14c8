"""What adding a delta did to a block: sums over all its values, and what is not finite."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from skillvec.ops import compiled, lanes
from skillvec.ops.compiled import CODES, Kernel
from skillvec.ops.delta import NO_POSITIONS, STEP, Delta, U32Array
from skillvec.ops.kernels import STORAGE_DTYPE, Array, widen
from skillvec.ops.special import are_nonfinite, bit_pattern, count_nonfinite, differ


class Nonfinite(NamedTuple):
    """How many NaN and infinities the target's block holds, and what was written.

    `lost` are positions that are not finite in the output although the target's values are, or
    although the delta wanted to change them.
    """

    target: int = 0
    output: int = 0
    lost: U32Array = NO_POSITIONS


def nonfinite_of(
    target: Array, target_dtype: str, delta: Delta | None, lam: float, out: Array, out_dtype: str,
    restored: bool = False,
) -> Nonfinite:  # fmt: skip
    """Count what is not finite before and after lam * delta was added; None is a copy.

    A target's NaN stays one, unless `restored` says that values were replaced: so a finite output
    tells of the target too.
    """
    after = count_nonfinite(out, out_dtype)
    if out is target:
        return Nonfinite(after, after)
    if not after and not restored:
        return Nonfinite()
    before = count_nonfinite(target, target_dtype)
    if not after:
        return Nonfinite(before)
    wrong = are_nonfinite(out, out_dtype)
    if before and delta is not None:
        moved = delta.wide(0, out.size)
        factor = lam if "F64" in (target_dtype, delta.dtype) else np.float32(lam)
        asked = (moved != 0) & (factor != 0)
        wrong &= differ(widen(target, target_dtype), widen(out, out_dtype)) | asked
    return Nonfinite(before, after, np.flatnonzero(wrong).astype(np.uint32))


class Moments(NamedTuple):
    """Sums over a block of what was written (out - target) and asked (delta), in lanes' order.

    What is not finite counts as changed, where it is, but not as moved; how many values of target
    and output are not finite stands beside.
    """

    changed: int = 0
    written_sq: float = 0.0
    written_dot_delta: float = 0.0
    delta_sq: float = 0.0
    target_nonfinite: int = 0
    output_nonfinite: int = 0

    @property
    def sums(self) -> tuple[float, float, float]:
        return self.written_sq, self.written_dot_delta, self.delta_sq


def moments(
    target: Array, target_dtype: str, delta: Delta, out: Array, out_dtype: str,
    measure: bool = True,
) -> Moments:  # fmt: skip
    """Measure how much of a delta arrived in a block; without `measure` the sums stay 0."""
    found = by_kernel(target, target_dtype, delta, 1.0, out_dtype, out, measure, write=False)
    if found is None or found.target_nonfinite:
        return _in_numpy(target, target_dtype, delta, out, out_dtype, measure)
    return found


@np.errstate(over="ignore", invalid="ignore")
def _in_numpy(
    target: Array, target_dtype: str, delta: Delta, out: Array, out_dtype: str, measure: bool
) -> Moments:
    counts = count_nonfinite(target, target_dtype), count_nonfinite(out, out_dtype)
    changed, parts = 0, [np.zeros((3, 0))]
    for begin in range(0, out.size if measure else 0, STEP):
        at = slice(begin, begin + STEP)
        before, after = widen(target[at], target_dtype), widen(out[at], out_dtype)
        if target_dtype == out_dtype:
            other = bit_pattern(out[at]) != bit_pattern(target[at])
        else:
            other = differ(after, before)
        changed += int(np.count_nonzero(other))
        moved = after - before
        moved[~np.isfinite(moved)] = 0
        asked = delta.wide(begin, begin + STEP)
        wide = np.result_type(moved, asked)
        moved, asked = moved.astype(wide, copy=False), asked.astype(wide, copy=False)
        pairs = (moved, moved), (moved, asked), (asked, asked)
        parts.append(np.stack([lanes.group_products(*pair) for pair in pairs]))
    squared, product, asked_sq = map(lanes.in_order, np.concatenate(parts, axis=1))
    return Moments(changed, squared, product, asked_sq, *counts)


def by_kernel(
    target: Array, target_dtype: str, delta: Delta, lam: float, out_dtype: str, out: Array,
    measure: bool, write: bool,
) -> Moments | None:  # fmt: skip
    """Add, if `write`, and measure in one compiled pass; None where numpy has to.

    Where the target is not finite neither output nor sums are right: numpy has to look again.
    """
    kernel = None if "F64" in (target_dtype, delta.dtype, out_dtype) else _add_kernel()
    if kernel is None:
        return None
    return _add_compiled(kernel, target, target_dtype, delta, lam, out_dtype, out, measure, write)


def _add_compiled(
    kernel: Kernel, target: Array, target_dtype: str, delta: Delta, lam: float, out_dtype: str,
    out: Array, measure: bool, write: bool,
) -> Moments:  # fmt: skip
    numbers = np.empty(6)
    codes = CODES[target_dtype], CODES[delta.dtype], CODES[out_dtype]
    exceptions = delta.positions, delta.exact
    kernel(target, delta.values, *exceptions, *codes, lam, out, measure, write, numbers)
    changed, wild, out_wild, squared, product, asked = numbers.tolist()
    counts = int(wild), int(out_wild)
    if not measure:
        return Moments(0, 0.0, 0.0, 0.0, *counts)
    return Moments(int(changed), squared, product, asked, *counts)


@cache
def _add_kernel() -> Kernel | None:
    def sample(kernel: Kernel) -> bytes:
        return add_sample(partial(_add_compiled, kernel, measure=True, write=True))

    return compiled.kernel("add", sample, ADD_CHECK)


def sample_patterns() -> tuple[Array, Array]:
    """Return 16-bit patterns of all exponents below 2^0, half of them neighbours."""
    one = np.arange(4073, dtype=np.uint16) * np.uint16(40503) & 0xBFFF
    other = np.roll(one, 1021) ^ (one & 0x8000)
    other[::2] = one[::2] ^ np.uint16(3)
    return one, other


def add_sample(run: Callable[..., Moments]) -> bytes:
    """Return all that adding fixed patterns gives, exceptions among them."""
    found = bytearray()
    at = np.arange(5, 4073, 997, dtype=np.uint32)
    for dtype in ("BF16", "F16", "F32"):
        for out_dtype in ("BF16", "F16", "F32"):
            target, values = (
                widen(x, "BF16") if dtype == "F32" else x.view(STORAGE_DTYPE[dtype])
                for x in sample_patterns()
            )
            exact = np.float32(0.123) * widen(values[at], dtype)
            out = np.empty(target.size, STORAGE_DTYPE[out_dtype])
            moved = run(target, dtype, Delta(values, dtype, at, exact), -0.7, out_dtype, out)
            found += out.tobytes() + repr(moved).encode()
    return bytes(found)


ADD_CHECK = "db866d1d0d37f6dd"  # of add_sample in numpy; a test compares
