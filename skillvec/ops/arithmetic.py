"""The arithmetic of skill vectors on one block of one tensor: pure functions, no paths, no threads.

A delta is held as values of a storage dtype plus exceptions: positions where that dtype cannot
hold `tuned - base`, with the fp32 difference itself. `subtract` makes deltas, `add` applies them.
Deltas are finite and their zeros positive; a zero delta, and any delta on a NaN or an infinity,
leaves the target's bits alone. What is not finite, and what no finite delta can carry, is counted
here and refused, or let through, by who asked.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops import kernels
from skillvec.ops.delta import NO_POSITIONS, NO_VALUES, STEP, Delta, U32Array, squared
from skillvec.ops.kernels import HALVES, STORAGE_DTYPE, Array, F32Array, narrow, widen
from skillvec.ops.special import bit_pattern, count_nonfinite, differ, has_nonfinite, has_special

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


def _casts(tuned: Array, base: Array, wanted: int) -> int:
    """Return those of the wanted bits of CASTS that hold for all these values, widened ones."""
    for bit, (side, dtype) in enumerate(CASTS):
        if wanted >> bit & 1:
            rounded, other = (tuned, base) if side == "tuned" else (base, tuned)
            if differ(widen(narrow(other, dtype), dtype), rounded).any():
                wanted &= ~(1 << bit)
    return wanted


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
