"""The arithmetic of skill vectors on one block of one tensor: pure functions, no paths, no threads.

A delta is held as values of a storage dtype plus exceptions: positions where that dtype cannot
hold `tuned - base`, with the fp32 difference itself. `subtract` makes deltas, `add` applies them,
`moments` and `group_products` measure. Deltas are finite and their zeros positive; a zero delta,
and any delta on a NaN or an infinity, leaves the target's bits alone.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec import kernels
from skillvec.kernels import HALVES, Array, F32Array, narrow, widen

STEP = 1 << 16  # elements a step of the general path, which bounds its temporary arrays
SAMPLE = 30 << 10  # values a block that moments looks at; fp32 arrays below malloc's mmap threshold
U32Array = npt.NDArray[np.uint32]
NO_POSITIONS: U32Array = np.zeros(0, np.uint32)
NO_VALUES: F32Array = np.zeros(0, np.float32)
NO_BITS: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)


class Delta(NamedTuple):
    """A block of tuned - base: `values` in `dtype`, overridden at `positions` by `exact` (fp32)."""

    values: Array
    dtype: str
    positions: U32Array = NO_POSITIONS
    exact: F32Array = NO_VALUES
    is_zero: bool = False  # known to be, without a look

    def wide(self, begin: int, end: int) -> Array:
        """Return elements begin..end as float32 (float64 for F64), exceptions in place."""
        values = widen(self.values[begin:end], self.dtype)
        first, last = np.searchsorted(self.positions, (begin, end))
        if first < last:
            values[self.positions[first:last] - np.uint32(begin)] = self.exact[first:last]
        return values


class Subtraction(NamedTuple):
    """What `subtract` found in a block.

    `replaced` are positions that base + delta does not restore and that hold `bits` (the tuned
    value's bit pattern, zero-extended); `unrestored` counts those that are given up. `delta_sq` is
    the delta's squared norm.
    """

    delta: Delta
    delta_sq: float
    replaced: U32Array
    bits: npt.NDArray[np.uint64]
    changed: int
    unrestored: int


class _Piece(NamedTuple):
    values: Array
    inexact: npt.NDArray[np.bool_]
    difference: Array
    replace: npt.NDArray[np.bool_]
    changed: int
    unrestored: int


def bit_pattern(values: Array) -> Array:
    """Return the values viewed as unsigned integers of the same width."""
    return values.view(np.dtype(f"<u{values.dtype.itemsize}"))


def _subtract_piece(
    tuned: Array, tuned_dtype: str, base: Array, base_dtype: str, value_dtype: str, exact: bool
) -> _Piece:
    """Subtract any two float dtypes and find out what base + delta restores."""
    a, b = widen(base, base_dtype), widen(tuned, tuned_dtype)
    with np.errstate(all="ignore"):
        difference = b - a  # fp64 where either is
        difference[~np.isfinite(difference)] = 0
        difference += 0.0  # no negative zeros
        values = narrow(difference, value_dtype)
        held = widen(values, value_dtype)
        # stored values are finite and their zeros positive; exceptions hold the rest
        if not held.all() or not np.isfinite(held).all():
            values[~np.isfinite(held) | (held == 0)] = 0
            held = widen(values, value_dtype)
        inexact = held != difference
        applied = difference if exact else held
        sums = a + applied
    zero = applied == 0
    restored = narrow(sums, tuned_dtype)
    if base_dtype == tuned_dtype:
        restored = np.where(zero, base, restored)
        changed = int(np.count_nonzero(bit_pattern(base) != bit_pattern(tuned)))
    else:
        restored = np.where(zero, narrow(a, tuned_dtype), restored)
        changed = int(np.count_nonzero(a != b))
    missed = bit_pattern(restored) != bit_pattern(tuned)
    if not exact:
        replace = np.zeros_like(missed)
    elif tuned_dtype in HALVES:
        replace = missed
    else:  # only what no finite difference restores: -0 and what is not finite
        replace = missed & ((b == 0) | ~np.isfinite(b) | ~np.isfinite(a))
    unrestored = int(np.count_nonzero(missed & ~replace))
    return _Piece(values, inexact, difference, replace, changed, unrestored)


def subtract(
    tuned: Array,
    tuned_dtype: str,
    base: Array,
    base_dtype: str,
    value_dtype: str,
    exact: bool,
    out: Array,
    scratch: npt.NDArray[np.uint16],
    measure: bool = True,
) -> Subtraction:
    """Return tuned - base as a Delta whose values are written to `out`.

    All arrays are 1-D, of one length, at most 2^32 elements; `out` is of the storage dtype of
    `value_dtype`, `scratch` holds as many uint16. With `exact` the delta carries exceptions, and
    positions that no difference restores are listed; without, values are rounded to `value_dtype`
    and that is all. Without `measure` the squared norm stays 0.
    """
    if exact and tuned_dtype == base_dtype == value_dtype == "BF16":
        found = _subtract_bf16(tuned, base, out, scratch, measure)
        if found is not None:
            return found
    positions, differences, replaced, bits = [], [], [], []
    changed = unrestored = 0
    for begin in range(0, tuned.size, STEP):
        end = min(begin + STEP, tuned.size)
        piece = _subtract_piece(
            tuned[begin:end], tuned_dtype, base[begin:end], base_dtype, value_dtype, exact
        )
        out[begin:end] = piece.values
        if exact:
            at = np.flatnonzero(piece.inexact).astype(np.uint32)
            positions.append(at + np.uint32(begin))
            differences.append(piece.difference[at].astype(np.float32))
            at = np.flatnonzero(piece.replace).astype(np.uint32)
            replaced.append(at + np.uint32(begin))
            bits.append(bit_pattern(tuned[begin:end][at]).astype(np.uint64))
        changed += piece.changed
        unrestored += piece.unrestored
    delta = Delta(out, value_dtype, _join(positions, NO_POSITIONS), _join(differences, NO_VALUES))
    return Subtraction(
        delta,
        squared(delta) if measure else 0.0,
        _join(replaced, NO_POSITIONS),
        _join(bits, NO_BITS),
        changed,
        unrestored,
    )


def _join(parts: list[Array], empty: Array) -> Array:
    return np.concatenate(parts) if any(part.size for part in parts) else empty


def _subtract_bf16(
    tuned: Array, base: Array, out: Array, scratch: npt.NDArray[np.uint16], measure: bool
) -> Subtraction | None:
    """Subtract BF16 from BF16; return None where NaN or infinities want the general path.

    Two bf16 at most 127 steps of the grid apart differ by a bf16 exactly: at most 254 of the
    smaller step. Only the others are looked at one by one.
    """
    kernels.blend(tuned, base, "BF16", -1.0, out)
    at = _far_apart(tuned, base, scratch[: tuned.size])
    if tuned.view(np.int16).min() == -0x8000:  # no sum gives -0, however small the step
        at = np.union1d(at, np.flatnonzero((tuned == 0x8000) & (base != 0x8000)))
    inexact, replaced, bits, hidden = (NO_POSITIONS, NO_VALUES), NO_POSITIONS, NO_BITS, 0
    if at.size:
        found = _settle_bf16(tuned[at], base[at])
        if found is not None:  # the values stand in `out` already
            rounded, difference = found
            inexact = at[rounded].astype(np.uint32), difference[rounded]
        else:
            piece = _subtract_piece(tuned[at], "BF16", base[at], "BF16", "BF16", True)
            out[at] = piece.values
            hidden = int(np.count_nonzero(piece.values == 0))
            rounded = piece.inexact
            inexact = at[rounded].astype(np.uint32), piece.difference[rounded]
            replaced = at[piece.replace].astype(np.uint32)
            bits = tuned[replaced].astype(np.uint64)
    delta = Delta(out, "BF16", *inexact)
    delta_sq = squared(delta) if measure else 0.0
    if not np.isfinite(delta_sq) if measure else _has_nonfinite(out):
        return None
    return Subtraction(delta, delta_sq, replaced, bits, int(np.count_nonzero(out)) + hidden, 0)


def _settle_bf16(tuned: Array, base: Array) -> tuple[npt.NDArray[np.bool_], F32Array] | None:
    """Return where the fp32 difference is no bf16, and the difference, for a few chosen values.

    None where base + difference misses tuned anywhere. A third of the calls of `_subtract_piece`,
    whose fixed cost a block would otherwise pay for two hundred values.
    """
    a, b = widen(base, "BF16"), widen(tuned, "BF16")
    with np.errstate(all="ignore"):
        difference = b - a
        restored = (a + difference == b) & (difference != 0) & (tuned != 0x8000)
    if not restored.all():
        return None
    return (difference.view(np.uint32) & 0xFFFF) != 0, difference


def _far_apart(tuned: Array, base: Array, steps: npt.NDArray[np.uint16]) -> npt.NDArray[np.intp]:
    """Return where two BF16 blocks are more than 127 steps of the grid, or a sign, apart.

    The distances are first folded over 16 rows by their maximum: a scan for rare elements costs
    several times more than a reduction.
    """
    np.subtract(tuned, base, out=steps)
    np.add(steps, 127, out=steps)
    width = steps.size // 16
    rows = steps[: 16 * width].reshape(16, width)
    lanes = np.flatnonzero(np.maximum.reduce(rows, axis=0, initial=0) > 254)
    row, lane = np.nonzero(rows[:, lanes] > 254)
    ends = np.flatnonzero(steps[16 * width :] > 254)
    return np.sort(np.concatenate((row * width + lanes[lane], ends + 16 * width)))


def _has_nonfinite(bf16: Array) -> bool:
    return bool(bf16.view(np.int16).max(initial=0) >= 0x7F80 or bf16.max(initial=0) >= 0xFF80)


def has_special(bf16: Array) -> bool:
    """Return whether a BF16 block holds NaN, an infinity or a negative zero."""
    return _has_nonfinite(bf16) or bool(bf16.view(np.int16).min(initial=0) == -0x8000)


def _add_piece(
    target: Array,
    target_dtype: str,
    delta: Array,
    lam: float,
    out_dtype: str,
    random16: npt.NDArray[np.uint16] | None,
) -> Array:
    """Return round(target + lam * delta) for any float dtypes; delta in float32 or float64."""
    wide = widen(target, target_dtype)
    if wide.dtype == np.float64 or delta.dtype == np.float64:
        with np.errstate(all="ignore"):
            total = wide.astype(np.float64) + lam * delta.astype(np.float64)
    else:
        lam = float(np.float32(lam))
        total = np.empty_like(wide)
        kernels.blend(wide, delta, "F32", lam, total)
    keep = (delta == 0) | ~np.isfinite(wide) | (lam == 0)
    total = np.where(keep, wide, total)
    if random16 is None or out_dtype in ("F32", "F64"):
        rounded = narrow(total, out_dtype)
    else:
        rounded = kernels.stochastic_narrow(total.astype(np.float32), out_dtype, random16)
    return np.where(keep, target, rounded) if out_dtype == target_dtype else rounded


def add(
    target: Array,
    target_dtype: str,
    delta: Delta,
    lam: float,
    out_dtype: str,
    out: Array,
    random16: npt.NDArray[np.uint16] | None = None,
) -> None:
    """Write round(RN32(target + lam * delta)) to `out` in `out_dtype`.

    1-D arrays of one length; lam is rounded to fp32 (fp64 where an input is F64). One uint16 a
    value in `random16` makes the last rounding stochastic.
    """
    if target_dtype == out_dtype == delta.dtype == "BF16" and random16 is None:
        kernels.blend(target, delta.values, "BF16", lam, out)
        still = np.float32(lam) == 0
        special = has_special(target) or bool(still)
        if special:
            keep = ((delta.values & 0x7FFF) == 0) | ((target & 0x7F80) == 0x7F80) | still
            np.copyto(out, target, where=keep)
        if delta.positions.size:
            at = delta.positions
            if special:
                out[at] = _add_piece(target[at], "BF16", delta.exact, lam, "BF16", None)
            else:
                sums = np.empty(at.size, np.float32)
                kernels.blend(widen(target[at], "BF16"), delta.exact, "F32", lam, sums)
                out[at] = narrow(sums, "BF16")
        return
    for begin in range(0, target.size, STEP):
        end = min(begin + STEP, target.size)
        out[begin:end] = _add_piece(
            target[begin:end],
            target_dtype,
            delta.wide(begin, end),
            lam,
            out_dtype,
            None if random16 is None else random16[begin:end],
        )


def group_products(x: Delta, y: Delta, width: int = kernels.DOT_ROW) -> npt.NDArray[np.float64]:
    """Return the inner products of two deltas over groups of `width` neighbours, a power of two.

    fp32 sums in a group; the exceptions' own in fp64.
    """
    if x.dtype == y.dtype == "BF16":
        sums = kernels.group_dots(x.values, y.values, width)
        if x.positions.size or y.positions.size:
            at, more = _correction(x, y)
            sums += np.bincount(at // width, more, minlength=sums.size)
        return sums
    parts = []
    for begin in range(0, x.values.size, STEP):
        one, other = x.wide(begin, begin + STEP), y.wide(begin, begin + STEP)
        dtype = np.result_type(one, other)
        parts.append(kernels.group_dots(one.astype(dtype), other.astype(dtype), width))
    return np.concatenate(parts) if parts else np.zeros(0)


def _correction(x: Delta, y: Delta) -> tuple[U32Array, npt.NDArray[np.float64]]:
    """Return where exceptions change the products of the stored BF16 values, and by how much.

    <x + e, y + f> - <x, y> = <e, y> + <x, f> + <e, f>, where e and f stand at exceptions only.
    """
    stored = [widen(delta.values[delta.positions], "BF16").astype(np.float64) for delta in (x, y)]
    errors = [delta.exact - held for delta, held in zip((x, y), stored, strict=True)]
    places, amounts = [x.positions, y.positions], []
    for delta, other, error in ((x, y, errors[0]), (y, x, errors[1])):
        amounts.append(error * widen(other.values[delta.positions], "BF16"))
    if x.positions.size and y.positions.size:
        spot = np.searchsorted(y.positions, x.positions)
        spot[spot == y.positions.size] = 0
        shared = y.positions[spot] == x.positions
        places.append(x.positions[shared])
        amounts.append(errors[0][shared] * errors[1][spot[shared]])
    return np.concatenate(places), np.concatenate(amounts)


def squared(delta: Delta) -> float:
    """Return the squared norm of a delta, as `group_products` adds it up."""
    if delta.dtype != "BF16" or not delta.positions.size:
        return float(group_products(delta, delta).sum())
    stored = widen(delta.values[delta.positions], "BF16").astype(np.float64)
    more = np.vecdot(delta.exact, delta.exact.astype(np.float64)) - np.vecdot(stored, stored)
    return kernels.dot(delta.values, delta.values) + float(more)


class Moments(NamedTuple):
    """Sums over a block of what was written (out - target) and asked (delta)."""

    changed: int
    written_sq: float
    written_dot_delta: float
    delta_sq: float


def moments(
    target: Array,
    target_dtype: str,
    delta: Delta,
    out: Array,
    out_dtype: str,
) -> Moments:
    """Measure how much of the delta arrived, on the first 30 Ki values of a block.

    The sums are scaled to the whole block. What is not finite counts as not moved.
    """
    sample = min(SAMPLE, out.size)
    scale = out.size / sample
    if target_dtype == out_dtype == delta.dtype == "BF16":
        written, values = np.empty(sample, np.uint16), delta.values[:sample]
        kernels.blend(out[:sample], target[:sample], "BF16", -1.0, written)
        sums = (
            kernels.dot(written, written),
            kernels.dot(written, values),
            kernels.dot(values, values),
        )
        if np.isfinite(sums[0]):
            changed = round(scale * int(np.count_nonzero(written)))
            return Moments(changed, *(scale * total for total in sums))
    wide = delta.wide(0, sample)
    before = widen(target[:sample], target_dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        moved = widen(out[:sample], out_dtype) - before
    moved[~np.isfinite(moved)] = 0
    wide = wide.astype(moved.dtype, copy=False)
    return Moments(
        round(scale * int(np.count_nonzero(moved))),
        scale * kernels.dot(moved, moved),
        scale * kernels.dot(moved, wide),
        scale * kernels.dot(wide, wide),
    )
