"""The dtypes of safetensors in numpy: widening, rounding, the fused multiply-add.

BF16 arrays are held as uint16 bit patterns, every other dtype as numpy's own. target + lam * delta
of 16- and 32-bit floats is a fused multiply-add in fp32, RN32(a + beta * b), then one rounding
(nearest, ties to even) to the output dtype; in fp64, product and sum round once each. What is here
is that definition; ops.compiled has the kernels that give the same bytes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from skillvec.ops.compiled import CODES, Kernel, kernel

Array = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.intp]
NOWHERE: Indices = np.zeros(0, np.intp)

STORAGE_DTYPE: dict[str, Any] = {
    "BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"), "BOOL": np.dtype("u1"), "U8": np.dtype("u1"), "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"), "I16": np.dtype("<i2"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"), "I64": np.dtype("<i8"),
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32", "F64")
HALVES = ("BF16", "F16")
DTYPE_NAMES = {  # as users write them
    "bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "fp32": "F32",
    "float32": "F32", "fp64": "F64", "float64": "F64",
}  # fmt: skip


def widen(values: Array, dtype: str) -> Array:
    """Return the values as float32 (float64 for F64), exactly; may return the input itself."""
    if dtype == "BF16":
        wide = values.astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    if dtype == "F16":
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return values.astype(np.float32)
    return values


def narrow(values: Array, dtype: str) -> Array:
    """Round float32 or float64 values to `dtype`, nearest, ties to even; NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return values.astype(STORAGE_DTYPE[dtype], copy=False)
        bits: npt.NDArray[np.uint32] = _to_odd_f32(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= 16
    found = rounded.astype(np.uint16)
    # the bits of infinity are the largest that is no NaN, with a sign or without
    if bits.max(initial=0) > 0xFF800000 or bits.view(np.int32).max(initial=0) > 0x7F800000:
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        found[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
    return found


def narrow_marked(values: Array, dtype: str) -> tuple[Array, Indices]:
    """Return finite values rounded to a dtype, and where that is another number."""
    if dtype == "BF16" and values.dtype == np.float32:
        bits = values.view(np.uint32)
        inexact = np.flatnonzero(bits.astype(np.uint16) != 0)  # the half that BF16 lacks
        if inexact.size < values.size // 8:
            found = (bits >> 16).astype(np.uint16)
            found[inexact] = narrow(values[inexact], dtype)
            return found, inexact
    found = narrow(values, dtype)
    if found is values:
        return values.copy(), NOWHERE
    return found, np.flatnonzero(widen(found, dtype) != values)


def _to_odd_f32(values: Array) -> F32Array:
    """Return float32 as is, float64 rounded to float32 so that a second rounding is harmless."""
    if values.dtype == np.float32:
        return values
    single = values.astype(np.float32)
    return _round_to_odd(single, values - single)


def _round_to_odd(rounded: Array, remainder: Array) -> Array:
    """Turn nearest rounding into rounding to odd, given the sign of exact minus rounded.

    A value rounded to odd with two spare bits rounds on to a shorter format as the exact value
    would (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    integer = np.int32 if rounded.dtype == np.float32 else np.int64
    bits: npt.NDArray[np.int64] = rounded.view(integer)
    inexact = (remainder != 0) & np.isfinite(rounded) & ((bits & 1) == 0)
    if not inexact.any():
        return rounded
    with np.errstate(over="ignore", under="ignore"):
        toward = np.nextafter(
            rounded, np.where(remainder > 0, np.inf, -np.inf).astype(rounded.dtype)
        )
    return np.where(inexact, toward, rounded)


def fma(a: F32Array, b: F32Array, beta: float) -> F32Array:
    """Return RN32(a + beta * b) with beta rounded to fp32, one rounding, in plain numpy.

    The product of two fp32 is exact in fp64. The fp64 sum, rounded once more to fp32, is right but
    where it lies in the middle of two fp32: there it is rounded to odd before.
    """
    with np.errstate(all="ignore"):
        if abs(beta) == 1:
            return a + b if beta > 0 else a - b
        total = np.multiply(b, np.float64(np.float32(beta)), dtype=np.float64)
        np.add(a, total, out=total)
        single = total.astype(np.float32)
        middle = total.view(np.int64) << 35  # the 29 bits that fp32 lacks
        at = np.flatnonzero(middle == -1 << 63)
        size = single.view(np.uint32) << 1
        size -= np.uint32(1)  # 0 is the largest then
        if size.min(initial=1 << 24) < 1 << 24:  # subnormal or the next, which lack more of them
            at = np.union1d(at, np.flatnonzero(size < 1 << 24))
        if at.size:
            single[at] = _careful_fma(a[at], b[at], beta)
    return single


def _careful_fma(a: F32Array, b: F32Array, beta: float) -> F32Array:
    product = np.float64(np.float32(beta)) * b.astype(np.float64)
    a64 = a.astype(np.float64)
    total = a64 + product
    part = total - product  # two-sum: the exact error of the addition (Knuth)
    error = (product - (total - part)) + (a64 - part)
    return _round_to_odd(total, error).astype(np.float32)


def stochastic_narrow(values: F32Array, dtype: str, random16: npt.NDArray[np.uint16]) -> Array:
    """Round float32 values to BF16 or F16 up or down with the probability that keeps the mean.

    `random16` holds one uniform uint16 a value; the probability of the farther neighbour is met to
    2^-16. Values that `dtype` holds exactly never change.
    """
    run, out = _rounding_kernel(), np.empty(values.size, STORAGE_DTYPE[dtype])
    if run is None or run(values, random16, CODES[dtype], out):  # 1: NaN as F16
        return numpy_stochastic_narrow(values, dtype, random16)
    return out


def numpy_stochastic_narrow(
    values: F32Array, dtype: str, random16: npt.NDArray[np.uint16]
) -> Array:
    """Do the same in plain numpy."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        finite = np.isfinite(values)
        rounded = ((bits + np.where(finite, random16, np.uint16(0))) >> 16).astype(np.uint16)
        return np.where(finite, rounded, narrow(values, dtype))
    assert dtype == "F16", dtype
    with np.errstate(all="ignore"):
        near = values.astype(np.float16)
        error = values - near.astype(np.float32)
        other = np.nextafter(near, np.where(error > 0, np.inf, -np.inf).astype(np.float16))
        gap = other.astype(np.float32) - near.astype(np.float32)
        away = (error != 0) & np.isfinite(near) & (random16 < np.float32(65536) * (error / gap))
    return np.where(away, other, near)


ROUNDED = "7ca0da511d97a701"  # digest of what numpy makes of `_sample_rounding`; a test compares


def _sample_rounding(run: Callable[[Array, Array, int, Array], Any]) -> bytes:
    """Return what a kernel makes of patterns of every exponent."""
    bits = np.arange(4099, dtype=np.uint32) * np.uint32(2654435761)
    bits[bits & 0x7F800000 == 0x7F800000] = 0x47700123
    found = np.empty((2, bits.size), np.uint16)
    for code, row in enumerate(found):
        run(bits.view(np.float32), (bits >> 3).astype(np.uint16), code, row)
    return found.tobytes()


@cache
def _rounding_kernel() -> Kernel | None:
    return kernel("round_randomly", _sample_rounding, ROUNDED)


def from_bytes(content: bytearray, dtype: str) -> Array:
    """Return bytes as a writable array of a safetensors dtype, without copying."""
    return np.frombuffer(content, STORAGE_DTYPE[dtype])
