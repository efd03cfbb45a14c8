"""The arithmetic of skill vectors on one block of one tensor: pure functions, no paths, no threads.

A delta is held as values of a storage dtype plus exceptions: positions where that dtype cannot
hold `tuned - base`, with the fp32 difference itself. `subtract` makes deltas, `add` applies them,
`moments` and `gram` measure. Deltas are finite and their zeros positive; a zero delta, and any
delta on a NaN or an infinity, leaves the target's bits alone.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec import kernels
from skillvec.kernels import Array, F32Array, narrow, widen

STEP = 1 << 16  # elements a step of the general path, which bounds its temporary arrays
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
        finite = np.isfinite(difference)
        difference = np.where(finite, difference, 0).astype(difference.dtype) + 0.0
        values = narrow(difference, value_dtype)
        held = widen(values, value_dtype)
        unheld = ~np.isfinite(held) | (held == 0)
        if unheld.any():  # stored values are finite, zeros positive; exceptions hold the rest
            values[unheld] = 0
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
    missed = bit_pattern(restored) != bit_pattern(np.ascontiguousarray(tuned))
    if not exact:
        replace = np.zeros_like(missed)
    elif tuned_dtype in ("BF16", "F16"):
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
) -> Subtraction:
    """Return tuned - base as a Delta whose values are written to `out`.

    All arrays are 1-D, of one length, at most 2^32 elements; `out` is of the storage dtype of
    `value_dtype`, `scratch` holds as many uint16. With `exact` the delta carries exceptions, and
    positions that no difference restores are listed; without, values are rounded to `value_dtype`
    and that is all.
    """
    if exact and tuned_dtype == base_dtype == value_dtype == "BF16":
        found = _subtract_bf16(tuned, base, out, scratch)
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
        _squared(delta),
        _join(replaced, NO_POSITIONS),
        _join(bits, NO_BITS),
        changed,
        unrestored,
    )


def _join(parts: list[Array], empty: Array) -> Array:
    return np.concatenate(parts) if any(part.size for part in parts) else empty


def _subtract_bf16(
    tuned: Array, base: Array, out: Array, scratch: npt.NDArray[np.uint16]
) -> Subtraction | None:
    """Subtract BF16 from BF16; return None where NaN or infinities want the general path.

    Two bf16 of one sign and exponent differ by a bf16 exactly, so only positions where sign or
    exponent differ (0.2 % after RL) are looked at one by one.
    """
    differing = scratch[: tuned.size]
    np.bitwise_xor(tuned, base, out=differing)
    changed = int(np.count_nonzero(differing))
    kernels.blend(tuned, base, "BF16", -1.0, out)
    apart = differing >= 128
    if tuned.view(np.int16).min() == -0x8000:  # no sum gives -0, however small the step
        apart |= (tuned == 0x8000) & (differing != 0)
    at = np.flatnonzero(apart).astype(np.uint32)
    piece = _subtract_piece(tuned[at], "BF16", base[at], "BF16", "BF16", True)
    out[at] = piece.values
    delta = Delta(
        out, "BF16", at[piece.inexact], piece.difference[piece.inexact].astype(np.float32)
    )
    delta_sq = _squared(delta)
    if not np.isfinite(delta_sq):  # NaN and infinities on both sides
        return None
    replaced = at[piece.replace]
    return Subtraction(delta, delta_sq, replaced, tuned[replaced].astype(np.uint64), changed, 0)


def has_special(bf16: Array) -> bool:
    """Return whether a BF16 block holds NaN, an infinity or a negative zero."""
    signed = bf16.view(np.int16)
    return bool(
        signed.max(initial=0) >= 0x7F80
        or signed.min(initial=0) == -0x8000
        or bf16.max(initial=0) >= 0xFF80
    )


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
        if has_special(target) or still:
            keep = ((delta.values & 0x7FFF) == 0) | ((target & 0x7F80) == 0x7F80) | still
            np.copyto(out, target, where=keep)
        if delta.positions.size:
            at = delta.positions
            out[at] = _add_piece(target[at], "BF16", delta.exact, lam, "BF16", None)
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


def gram(deltas: list[Delta]) -> npt.NDArray[np.float64]:
    """Return the matrix of inner products of deltas of one length, added up in fp64."""
    count = len(deltas)
    products = np.zeros((count, count))
    for begin in range(0, deltas[0].values.size, kernels.DOT_STEP):
        wide = [delta.wide(begin, begin + kernels.DOT_STEP) for delta in deltas]
        for i in range(count):
            for j in range(i + 1):
                products[i, j] += _inner(wide[i], wide[j])
    return np.tril(products) + np.tril(products, -1).T


def _inner(a: Array, b: Array) -> float:
    """Return the inner product of two arrays: fp32 over 1,024 products, those sums in fp64.

    Good to 1e-8 of the norms. All in fp64 where squares leave fp32.
    """
    rows = a.size // 1024
    with np.errstate(all="ignore"):
        sums = np.vecdot(a[: rows * 1024].reshape(rows, 1024), b[: rows * 1024].reshape(rows, 1024))
        total = float(sums.sum(dtype=np.float64)) + float(
            np.dot(a[rows * 1024 :], b[rows * 1024 :])
        )
        return total if np.isfinite(total) else float(np.dot(a.astype(np.float64), b))


def _squared(delta: Delta) -> float:
    """Return the squared norm of a delta to about 1e-5; not finite where BF16 values are not."""
    if delta.dtype != "BF16":
        return float(gram([delta])[0, 0])
    total = kernels.quick_dot(delta.values, delta.values)
    if delta.positions.size:
        rounded = widen(delta.values[delta.positions], "BF16").astype(np.float64)
        exact = delta.exact.astype(np.float64)
        total += float(np.sum(exact * exact - rounded * rounded))
    return total if np.isfinite(total) else float(gram([delta])[0, 0])


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
    scratch: npt.NDArray[np.uint16],
) -> Moments:
    """Measure how much of the delta arrived: sums of written^2, written * delta and delta^2."""
    delta_sq = _squared(delta)
    if target_dtype == out_dtype == delta.dtype == "BF16":
        written = scratch[: out.size]
        kernels.blend(out, target, "BF16", -1.0, written)
        sums = kernels.quick_dot(written, written), kernels.quick_dot(written, delta.values)
        if np.isfinite(sums[0]) and np.isfinite(sums[1]):
            return Moments(int(np.count_nonzero(written)), *sums, delta_sq)
    changed, totals = 0, np.zeros(2)
    for begin in range(0, out.size, STEP):
        end = min(begin + STEP, out.size)
        before = widen(target[begin:end], target_dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            moved = widen(out[begin:end], out_dtype) - before
        moved = np.where(np.isfinite(moved), moved, 0)
        changed += int(np.count_nonzero(moved))
        wide = delta.wide(begin, end)
        totals += _inner(moved, moved), _inner(moved, wide)
    return Moments(changed, float(totals[0]), float(totals[1]), delta_sq)
