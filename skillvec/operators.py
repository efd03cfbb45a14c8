"""The arithmetic of skill vectors on one block of one tensor: pure functions, no paths, no threads.

A delta is held as values of a storage dtype plus exceptions: positions where that dtype cannot
hold `tuned - base`, with the fp32 difference itself. `subtract` makes deltas, `add` applies them,
`moments` and `group_products` measure. Deltas are finite and their zeros positive; a zero delta,
and any delta on a NaN or an infinity, leaves the target's bits alone. What is not finite, and what
no finite delta can carry, is counted here and refused, or let through, by who asked.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec import kernels
from skillvec.kernels import HALVES, STORAGE_DTYPE, Array, F32Array, narrow, widen

STEP = 1 << 16  # elements a step of the general path, which bounds its temporary arrays
SAMPLE = 30 << 10  # values a block that moments looks at; fp32 arrays below malloc's mmap threshold
U32Array = npt.NDArray[np.uint32]
NO_POSITIONS: U32Array = np.zeros(0, np.uint32)
NO_VALUES: F32Array = np.zeros(0, np.float32)
NO_BITS: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)


class Exactness(IntEnum):
    """What a difference carries besides its values, rounded to the storage dtype.

    ROUNDED: nothing. EXCEPTIONS: the fp32 difference where the dtype cannot hold it, and the tuned
    values that no finite difference restores. WHOLE: every tuned value that base + difference
    misses as well, so that it comes back bit for bit.
    """

    ROUNDED = 0
    EXCEPTIONS = 1
    WHOLE = 2


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
    the delta's squared norm. `nonfinite` counts NaN and infinities of tuned and base; `lost` are
    positions where tuned is another value than base and the delta is 0, because the difference is
    not finite or beyond the range of its dtype. `casts` are the bits of CASTS that hold.
    """

    delta: Delta
    delta_sq: float
    replaced: U32Array
    bits: npt.NDArray[np.uint64]
    changed: int
    unrestored: int
    nonfinite: tuple[int, int] = (0, 0)
    lost: U32Array = NO_POSITIONS
    casts: int = 0


class _Piece(NamedTuple):
    values: Array
    inexact: npt.NDArray[np.bool_]
    difference: Array
    replace: npt.NDArray[np.bool_]
    changed: int
    unrestored: int
    nonfinite: tuple[int, int]
    lost: npt.NDArray[np.bool_]
    casts: int


# ways in which a difference is rounding alone: which side is the other one rounded, and to what
CASTS = tuple((side, dtype) for side in ("tuned", "base") for dtype in ("BF16", "F16", "F32"))


def _itemsize(dtype: str) -> int:
    return int(STORAGE_DTYPE[dtype].itemsize)


def possible_casts(tuned_dtype: str, base_dtype: str) -> int:
    """Return the bits of CASTS that values of these dtypes could show."""
    held = {"tuned": tuned_dtype, "base": base_dtype}
    found = 0
    for bit, (side, dtype) in enumerate(CASTS):
        other = held["base" if side == "tuned" else "tuned"]
        holds = held[side] == dtype or _itemsize(held[side]) > _itemsize(dtype)
        rounds = other != dtype and _itemsize(other) >= _itemsize(dtype)
        found |= (holds and rounds) << bit
    return found


def differ(one: Array, other: Array) -> npt.NDArray[np.bool_]:
    """Return where two arrays of floats hold other values; NaNs are one value, and so are zeros."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wrong: npt.NDArray[np.bool_] = (one != other) & ~(np.isnan(one) & np.isnan(other))
    return wrong


def _casts(tuned: Array, base: Array, wanted: int) -> int:
    """Return those of the wanted bits of CASTS that hold for all these values, widened ones."""
    for bit, (side, dtype) in enumerate(CASTS):
        if wanted >> bit & 1:
            rounded, other = (tuned, base) if side == "tuned" else (base, tuned)
            if differ(widen(narrow(other, dtype), dtype), rounded).any():
                wanted &= ~(1 << bit)
    return wanted


def bit_pattern(values: Array) -> Array:
    """Return the values viewed as unsigned integers of the same width."""
    return values.view(np.dtype(f"<u{values.dtype.itemsize}"))


def _subtract_piece(
    tuned: Array, tuned_dtype: str, base: Array, base_dtype: str, value_dtype: str,
    exactness: Exactness, casts: int = 0,
) -> _Piece:  # fmt: skip
    """Subtract any two float dtypes and find out what base + delta restores."""
    exact = exactness is not Exactness.ROUNDED
    a, b = widen(base, base_dtype), widen(tuned, tuned_dtype)
    with np.errstate(all="ignore"):
        difference = b - a  # fp64 where either is
        wild = ~np.isfinite(difference)
        difference[wild] = 0
        difference += 0.0  # no negative zeros
        values = narrow(difference, value_dtype)
        held = widen(values, value_dtype)
        # stored values are finite and their zeros positive; exceptions hold the rest
        if not held.all() or not np.isfinite(held).all():
            if not exact:
                wild |= ~np.isfinite(held)
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
        changed = int(np.count_nonzero(differ(a, b)))
    missed = bit_pattern(restored) != bit_pattern(tuned)
    if not exact:
        replace = np.zeros_like(missed)
    elif exactness is Exactness.WHOLE or tuned_dtype in HALVES:
        replace = missed
    else:  # only what no finite difference restores: -0 and what is not finite
        replace = missed & ((b == 0) | ~np.isfinite(b) | ~np.isfinite(a))
    unrestored = int(np.count_nonzero(missed & ~replace))
    nonfinite = (0, 0)
    if wild.any():
        nonfinite = count_nonfinite(tuned, tuned_dtype), count_nonfinite(base, base_dtype)
        wild &= differ(a, b)
    casts = _casts(b, a, casts) if casts else 0
    return _Piece(values, inexact, difference, replace, changed, unrestored, nonfinite, wild, casts)


def subtract(
    tuned: Array,
    tuned_dtype: str,
    base: Array,
    base_dtype: str,
    value_dtype: str,
    exactness: Exactness,
    out: Array,
    scratch: npt.NDArray[np.uint16],
    measure: bool = True,
    casts: int = 0,
) -> Subtraction:
    """Return tuned - base as a Delta whose values are written to `out`.

    All arrays are 1-D, of one length, at most 2^32 elements; `out` is of the storage dtype of
    `value_dtype`, `scratch` holds as many uint16. `exactness` says what the delta carries besides
    rounded values. Without `measure` the squared norm stays 0; `casts` are the bits of CASTS to
    look for.
    """
    exact = exactness is not Exactness.ROUNDED
    if exact and tuned_dtype == base_dtype == value_dtype == "BF16":
        found = _subtract_bf16(tuned, base, out, scratch, measure)
        if found is not None:
            return found
    positions, differences, replaced, bits, lost = [], [], [], [], []
    changed = unrestored = tuned_nonfinite = base_nonfinite = 0
    for begin in range(0, tuned.size, STEP):
        end = min(begin + STEP, tuned.size)
        piece = _subtract_piece(
            tuned[begin:end], tuned_dtype, base[begin:end], base_dtype, value_dtype, exactness,
            casts,
        )  # fmt: skip
        casts = piece.casts
        out[begin:end] = piece.values
        tuned_nonfinite += piece.nonfinite[0]
        base_nonfinite += piece.nonfinite[1]
        lost.append(np.flatnonzero(piece.lost).astype(np.uint32) + np.uint32(begin))
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
        (tuned_nonfinite, base_nonfinite),
        _join(lost, NO_POSITIONS),
        casts,
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
    nonfinite, lost = (0, 0), NO_POSITIONS
    if at.size:
        found = _settle_bf16(tuned[at], base[at])
        if found is not None:  # the values stand in `out` already
            rounded, difference = found
            inexact = at[rounded].astype(np.uint32), difference[rounded]
        else:
            piece = _subtract_piece(tuned[at], "BF16", base[at], "BF16", "BF16", Exactness.WHOLE)
            out[at] = piece.values
            hidden = int(np.count_nonzero(piece.values == 0))
            rounded = piece.inexact
            inexact = at[rounded].astype(np.uint32), piece.difference[rounded]
            replaced = at[piece.replace].astype(np.uint32)
            bits = tuned[replaced].astype(np.uint64)
            nonfinite, lost = piece.nonfinite, at[piece.lost].astype(np.uint32)
    delta = Delta(out, "BF16", *inexact)
    delta_sq = squared(delta) if measure else 0.0
    if not np.isfinite(delta_sq) if measure else has_nonfinite(out, "BF16"):
        return None
    changed = int(np.count_nonzero(out)) + hidden
    return Subtraction(delta, delta_sq, replaced, bits, changed, 0, nonfinite, lost)


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


INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF << 52}  # patterns


def has_nonfinite(values: Array, dtype: str) -> bool:
    """Return whether floats of a dtype hold NaN or an infinity: by two reductions, no copy."""
    bits, least = bit_pattern(values), INFINITY[dtype]
    sign = 1 << 8 * bits.itemsize - 1
    signed = bits.view(bits.dtype.str.replace("u", "i"))
    return bool(signed.max(initial=0) >= least or bits.max(initial=0) >= sign | least)


def count_nonfinite(values: Array, dtype: str) -> int:
    """Return how many of floats of a dtype are NaN or infinities."""
    if not has_nonfinite(values, dtype):
        return 0
    return int(np.count_nonzero(are_nonfinite(values, dtype)))


def are_nonfinite(values: Array, dtype: str) -> npt.NDArray[np.bool_]:
    """Return which of floats of a dtype are NaN or infinities."""
    least = bit_pattern(values).dtype.type(INFINITY[dtype])
    wrong: npt.NDArray[np.bool_] = (bit_pattern(values) & least) == least
    return wrong


def has_special(values: Array, dtype: str) -> bool:
    """Return whether floats hold NaN, an infinity or a negative zero: a delta of 0 adds to others
    what leaves their bits alone."""
    bits = bit_pattern(values)
    signed = bits.view(bits.dtype.str.replace("u", "i"))
    negative_zero = bool(signed.min(initial=0) == np.iinfo(signed.dtype).min)
    return negative_zero or has_nonfinite(values, dtype)


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
        if lam and random16 is None and not has_special(target, target_dtype):
            return narrow(total, out_dtype)
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
        special = has_special(target, "BF16") or bool(still)
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


@np.errstate(over="ignore", invalid="ignore")  # squares of fp64 that leave it
def moments(
    target: Array,
    target_dtype: str,
    delta: Delta,
    out: Array,
    out_dtype: str,
) -> Moments:
    """Measure how much of the delta arrived, on the first 30 Ki values of a block.

    The sums are scaled to the whole block. What is not finite counts as changed, where it is, but
    not as moved.
    """
    sample = min(SAMPLE, out.size)
    scale = out.size / sample
    same_dtype = target_dtype == out_dtype
    if same_dtype:
        bits = bit_pattern(out[:sample]) != bit_pattern(target[:sample])
    if same_dtype and delta.dtype == out_dtype == "BF16":
        written, values = np.empty(sample, np.uint16), delta.values[:sample]
        kernels.blend(out[:sample], target[:sample], "BF16", -1.0, written)
        sums = np.array(
            (kernels.dot(written, written), kernels.dot(written, values),
             kernels.dot(values, values))
        )  # fmt: skip
        at = delta.positions[: np.searchsorted(delta.positions, sample)]
        if at.size:  # neither side of an exception is a bf16
            moved = widen(out[at], "BF16").astype(np.float64) - widen(target[at], "BF16")
            exact = delta.exact[: at.size].astype(np.float64)
            rounded = [widen(side[at], "BF16").astype(np.float64) for side in (written, values)]
            sums += (moved @ moved, moved @ exact, exact @ exact)
            sums -= (rounded[0] @ rounded[0], rounded[0] @ rounded[1], rounded[1] @ rounded[1])
        if np.isfinite(sums).all():
            return Moments(round(scale * int(np.count_nonzero(bits))), *(scale * sums).tolist())
    wide = delta.wide(0, sample)
    before = widen(target[:sample], target_dtype)
    after = widen(out[:sample], out_dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        moved = after - before
    if not same_dtype:
        bits = differ(after, before)
    changed = int(np.count_nonzero(bits))
    moved[~np.isfinite(moved)] = 0
    wide = wide.astype(moved.dtype, copy=False)
    return Moments(
        round(scale * changed),
        scale * kernels.dot(moved, moved),
        scale * kernels.dot(moved, wide),
        scale * kernels.dot(wide, wide),
    )
