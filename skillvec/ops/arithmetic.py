"""The arithmetic of skill vectors on one block of one tensor: pure functions, no paths, no threads.

A delta is held as values of a storage dtype plus exceptions: positions where that dtype cannot
hold `tuned - base`, with the fp32 difference itself. `subtract` makes deltas, `add` applies them.
Deltas are finite and their zeros positive; a zero delta, and any delta on a NaN or an infinity,
leaves the target's bits alone. What is not finite, and what no finite delta can carry, is counted
here and refused, or let through, by who asked. The compiled kernels (native/pairs.c) do the same in
one pass; the few values that they do not settle, and fp64, are done here.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops import compiled, kernels, lanes, moments
from skillvec.ops.compiled import CODES, Kernel
from skillvec.ops.delta import EXCEPTION, NO_POSITIONS, NO_VALUES, STEP, Delta, U32Array
from skillvec.ops.kernels import (
    HALVES,
    NOWHERE,
    STORAGE_DTYPE,
    Array,
    Bytes,
    Indices,
    narrow,
    widen,
)
from skillvec.ops.moments import Moments
from skillvec.ops.special import (
    are_nonfinite,
    bit_pattern,
    count_nonfinite,
    differ,
    has_negative_zero,
    has_nonfinite,
    has_special,
)

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
    inexact: Indices
    difference: Array
    replace: Indices
    changed: int
    unrestored: int
    nonfinite: tuple[int, int]
    lost: Indices
    casts: int
    squares: lanes.Sums  # of groups of 1,024


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
        wild = _nonfinite(difference)
        difference[wild] = 0
        difference += 0.0  # no negative zeros
        values, inexact = kernels.narrow_marked(difference, value_dtype)
        if has_special(values, value_dtype):
            # stored values are finite and their zeros positive; exceptions hold the rest
            beyond = _nonfinite(values, value_dtype)
            if not exact:
                wild = np.union1d(wild, beyond)
            values[beyond] = 0
            values[widen(values, value_dtype) == 0] = 0
        applied = difference if exact else widen(values, value_dtype)
        missed = _missed(tuned, tuned_dtype, base, base_dtype, a + applied, applied)
    if base_dtype == tuned_dtype:
        changed = int(np.count_nonzero(bit_pattern(base) != bit_pattern(tuned)))
    else:
        changed = int(np.count_nonzero(differ(a, b)))
    replace = missed if exact else NOWHERE
    if exactness is Exactness.EXCEPTIONS and tuned_dtype not in HALVES:
        # only what no finite difference restores: -0 and what is not finite
        one, other = b[missed], a[missed]
        replace = missed[(one == 0) | ~np.isfinite(one) | ~np.isfinite(other)]
    nonfinite = (0, 0)
    if wild.size:
        nonfinite = count_nonfinite(tuned, tuned_dtype), count_nonfinite(base, base_dtype)
        wild = wild[differ(a[wild], b[wild])]
    casts = _casts(b, a, casts) if casts else 0
    return _Piece(
        values,
        inexact if exact else NOWHERE,
        difference,
        replace,
        changed,
        missed.size - replace.size,
        nonfinite,
        wild,
        casts,
        lanes.group_products(applied, applied),
    )


def _nonfinite(values: Array, dtype: str = "") -> Indices:
    """Return where floats, of the dtype or of numpy's, are NaN or infinities."""
    dtype = dtype or ("F64" if values.dtype == np.float64 else "F32")
    wrong = has_nonfinite(values, dtype)
    return np.flatnonzero(are_nonfinite(values, dtype)) if wrong else NOWHERE


def _missed(
    tuned: Array, tuned_dtype: str, base: Array, base_dtype: str, sums: Array, applied: Array
) -> Indices:
    """Return where rounding the sums, or base itself where nothing is applied, is not tuned.

    It is tuned where the sum is the same number, but for the sign of a zero.
    """
    doubtful = sums != widen(tuned, tuned_dtype)
    if has_negative_zero(tuned) or has_negative_zero(base):
        doubtful |= sums == 0
    at = np.flatnonzero(doubtful)
    if not at.size:
        return at
    still = applied[at] == 0
    restored = narrow(sums[at], tuned_dtype)
    there = base[at][still]
    same = base_dtype == tuned_dtype
    restored[still] = there if same else narrow(widen(there, base_dtype), tuned_dtype)
    wrong: Indices = at[bit_pattern(restored) != bit_pattern(tuned[at])]
    return wrong


def subtract(
    tuned: Array,
    tuned_dtype: str,
    base: Array,
    base_dtype: str,
    value_dtype: str,
    exactness: Exactness,
    out: Array,
    scratch: Bytes | None = None,
    casts: int = 0,
) -> Subtraction:
    """Return tuned - base as a Delta whose values are written to `out`.

    All arrays are 1-D, of one length, at most 2^32 elements; `out` is of the storage dtype of
    `value_dtype`, `scratch` is room for 12 bytes an element. `exactness` says what the delta
    carries besides rounded values; `casts` are the bits of CASTS to look for.
    """
    kernel = None if "F64" in (tuned_dtype, base_dtype, value_dtype) else _subtract_kernel()
    sides = tuned, tuned_dtype, base, base_dtype
    if kernel is None:
        return _subtract_pieces(*sides, value_dtype, exactness, out, casts)
    if scratch is None:
        scratch = np.empty(12 * tuned.size, np.uint8)
    for begin in range(0, tuned.size if casts else 0, STEP):
        at = slice(begin, begin + STEP)
        casts = _casts(widen(tuned[at], tuned_dtype), widen(base[at], base_dtype), casts)
        if not casts:
            break
    return _subtract_compiled(kernel, *sides, value_dtype, exactness, out, scratch, casts)


def _subtract_compiled(
    kernel: Kernel, tuned: Array, tuned_dtype: str, base: Array, base_dtype: str, value_dtype: str,
    exactness: Exactness, out: Array, scratch: Bytes, casts: int = 0,
) -> Subtraction:  # fmt: skip
    """Subtract by the kernel; what it lists, one by one, as `_subtract_piece` does."""
    size, numbers = tuned.size, np.empty(4)
    records = scratch[: 8 * size].view(EXCEPTION)
    listed = scratch[8 * size : 12 * size].view(np.uint32)
    codes = CODES[tuned_dtype], CODES[base_dtype], CODES[value_dtype], int(exactness)
    count = kernel(tuned, base, *codes, out, records, listed, numbers)
    changed, square, exceptions, unrestored = numbers.tolist()
    positions, exact = NO_POSITIONS, NO_VALUES
    if exceptions:
        positions = records["position"][: int(exceptions)].copy()
        exact = records["value"][: int(exceptions)].copy()
    if not count:
        delta = Delta(out, value_dtype, positions, exact)
        return Subtraction(
            delta, square, NO_POSITIONS, NO_BITS, int(changed), int(unrestored), casts=casts
        )
    at = listed[:count].copy()
    piece = _subtract_piece(tuned[at], tuned_dtype, base[at], base_dtype, value_dtype, exactness)
    out[at] = piece.values
    if piece.inexact.size:
        positions = np.concatenate((positions, at[piece.inexact]))
        exact = np.concatenate((exact, piece.difference[piece.inexact]))
        order = np.argsort(positions)
        positions, exact = positions[order], exact[order]
    replaced = at[piece.replace]
    return Subtraction(
        Delta(out, value_dtype, positions, exact),
        square,
        replaced,
        bit_pattern(tuned[replaced]).astype(np.uint64),
        int(changed) + piece.changed,
        int(unrestored) + piece.unrestored,
        piece.nonfinite,
        at[piece.lost],
        casts,
    )


def _subtract_pieces(
    tuned: Array, tuned_dtype: str, base: Array, base_dtype: str, value_dtype: str,
    exactness: Exactness, out: Array, casts: int = 0,
) -> Subtraction:  # fmt: skip
    """Subtract in plain numpy, a piece after the other."""
    positions, differences, replaced, bits, lost, squares = [], [], [], [], [], []
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
        squares.append(piece.squares)
        lost.append((piece.lost + begin).astype(np.uint32))
        positions.append((piece.inexact + begin).astype(np.uint32))
        differences.append(piece.difference[piece.inexact].astype(np.float32))
        replaced.append((piece.replace + begin).astype(np.uint32))
        bits.append(bit_pattern(tuned[begin:end][piece.replace]).astype(np.uint64))
        changed += piece.changed
        unrestored += piece.unrestored
    delta = Delta(out, value_dtype, _join(positions, NO_POSITIONS), _join(differences, NO_VALUES))
    return Subtraction(
        delta,
        lanes.in_order(np.concatenate(squares or [np.zeros(0)])),
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


@cache
def _subtract_kernel() -> Kernel | None:
    scratch = np.empty(12 * 4073, np.uint8)

    def sample(kernel: Kernel) -> bytes:
        return subtract_sample(partial(_subtract_compiled, kernel, scratch=scratch))

    return compiled.kernel("subtract", sample, SUBTRACT_CHECK)


def subtract_sample(run: Callable[..., Subtraction]) -> bytes:
    """Return all that subtracting fixed patterns gives."""
    found = bytearray()
    for dtype in ("BF16", "F16", "F32"):
        base, tuned = (
            widen(x, "BF16") if dtype == "F32" else x.view(STORAGE_DTYPE[dtype])
            for x in moments.sample_patterns()
        )
        for exactness in Exactness:
            done = run(tuned, dtype, base, dtype, dtype, exactness, np.empty_like(base))
            parts = done.delta.values, done.delta.positions, done.delta.exact, done.replaced
            found += b"".join(part.tobytes() for part in (*parts, done.bits, done.lost))
            found += repr((done.delta_sq, done.changed, done.unrestored, done.nonfinite)).encode()
    return bytes(found)


SUBTRACT_CHECK = "5b7c90812ef789f8"  # of subtract_sample in numpy; a test compares


def _add_piece(
    target: Array,
    target_dtype: str,
    wide: Array,
    delta: Array,
    lam: float,
    out_dtype: str,
    random16: npt.NDArray[np.uint16] | None,
) -> Array:
    """Return round(target + lam * delta) for any float dtypes; delta in float32 or float64.

    `wide` is the widened target.
    """
    kept, single = NOWHERE, wide.dtype == delta.dtype == np.float32
    lam = float(np.float32(lam)) if single else lam
    if has_special(target, target_dtype):  # else nothing changes where nothing is added
        still = ((delta == 0) | (lam == 0)) & (wide == 0)
        kept = np.flatnonzero(still | ~np.isfinite(wide))
    rounding = random16 if out_dtype in HALVES else None
    total: Array
    if single:
        total = kernels.fma(wide, delta, lam)
    else:
        with np.errstate(all="ignore"):
            total = lam * delta.astype(np.float64)
            total += wide
    with np.errstate(invalid="ignore", over="ignore"):  # signalling NaNs; fp64 beyond fp32
        total[kept] = wide[kept]
        if rounding is None:
            rounded = narrow(total, out_dtype)
        else:
            rounded = kernels.stochastic_narrow(total.astype(np.float32), out_dtype, rounding)
    if out_dtype == target_dtype:
        rounded[kept] = target[kept]
    return rounded


def add(
    target: Array,
    target_dtype: str,
    delta: Delta,
    lam: float,
    out_dtype: str,
    out: Array,
    random16: npt.NDArray[np.uint16] | None = None,
    measure: bool = True,
) -> Moments:
    """Write round(RN32(target + lam * delta)) to `out` in `out_dtype`; return what that did.

    1-D arrays of one length, `out` none of the others; lam is rounded to fp32 (fp64 where an input
    is F64). One uint16 a value in `random16` makes the last rounding stochastic. Without `measure`
    the sums stay 0.
    """
    if random16 is None:
        given = target, target_dtype, delta, lam, out_dtype, out
        found = moments.by_kernel(*given, measure, write=True)
        if found is not None and not found.target_nonfinite:
            return found
        if found is not None:  # what is not finite stays as it is
            at = np.flatnonzero(are_nonfinite(target, target_dtype))
            out[at] = (
                target[at] if target_dtype == out_dtype
                else narrow(widen(target[at], target_dtype), out_dtype)
            )  # fmt: skip
            return moments.moments(target, target_dtype, delta, out, out_dtype, measure)
    elif out_dtype in HALVES:
        total = np.empty(target.size, np.float32)
        done = moments.by_kernel(target, target_dtype, delta, lam, "F32", total, False, True)
        if done is not None and not done.target_nonfinite:
            out[:] = kernels.stochastic_narrow(total, out_dtype, random16)
            return moments.moments(target, target_dtype, delta, out, out_dtype, measure)
    parts = []
    for begin in range(0, target.size, STEP):
        piece = slice(begin, begin + STEP)
        held = target[piece]
        sides = held, target_dtype, widen(held, target_dtype), delta.wide(begin, begin + STEP)
        random = None if random16 is None else random16[piece]
        out[piece] = _add_piece(*sides, lam, out_dtype, random)
        if measure:
            parts.append(moments.measure_piece(*sides, out[piece], out_dtype))
    return moments.whole(parts, target, target_dtype, out, out_dtype)
