"""Elementwise arithmetic and sums on contiguous 1-D numpy blocks, in the dtypes of safetensors.

Hides which library does the arithmetic. The documented result of `blend` on 16- and 32-bit floats
is a fused multiply-add in fp32, RN32(a + beta * b), then one rounding (nearest, ties to even) to
the output dtype; in fp64, product and sum round once each. NumKong's SIMD kernels give these bytes
and are used when a self-check on this machine finds that they do; plain numpy gives the same bytes
slower. BF16 arrays are held as uint16 bit patterns, every other dtype as numpy's own.
"""

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]

STORAGE_DTYPE: dict[str, Any] = {
    "BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"), "BOOL": np.dtype("u1"), "U8": np.dtype("u1"), "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"), "I16": np.dtype("<i2"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"), "I64": np.dtype("<i8"),
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32", "F64")
DOT_STEP = 1 << 16  # fp32 sums over 64 Ki products, added up in fp64: 1e-8 relative


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
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
    return rounded


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


def numpy_fma(a: F32Array, b: F32Array, beta: float) -> F32Array:
    """Return RN32(a + beta * b) with beta rounded to fp32, one rounding, in plain numpy.

    The product of two fp32 is exact in fp64; the fp64 sum is rounded to odd, then to fp32.
    """
    with np.errstate(all="ignore"):
        product = np.float64(np.float32(beta)) * b.astype(np.float64)
        a64 = a.astype(np.float64)
        total = a64 + product
        part = total - product  # two-sum: the exact error of the addition (Knuth)
        error = (product - (total - part)) + (a64 - part)
        return _round_to_odd(total, error).astype(np.float32)


def numpy_blend(a: Array, b: Array, dtype: str, beta: float, out: Array) -> None:
    """Write round(a + beta * b) to `out`; all of one dtype, BF16 or F32, plain numpy."""
    out[...] = narrow(numpy_fma(widen(a, dtype), widen(b, dtype), beta), dtype)


@cache
def _numkong() -> Any:
    """Return the numkong module if it is there and gives the documented bytes, else None."""
    try:
        numkong: Any = import_module("numkong")
    except ImportError:  # no build for this platform
        return None
    rng = np.random.Generator(np.random.Philox(2601_11258))
    a, b = rng.integers(0, 1 << 16, (2, 4099), dtype=np.uint16)
    a[:4], b[:4] = (0x0001, 0x8001, 0x3F80, 0x7F7F), (0x8001, 0x0001, 0x3B80, 0x7F7F)
    finite = np.isfinite(widen(a, "BF16")) & np.isfinite(widen(b, "BF16"))
    a, b = a[finite], b[finite]
    with np.errstate(over="ignore"):
        a32 = np.ascontiguousarray(widen(a, "BF16") * np.float32(1.1))
    for beta in (1.0, -1.0, 0.7):
        for x, y, dtype in ((a, b, "BF16"), (a32, widen(b, "BF16"), "F32")):
            expected, found = np.empty_like(x), np.empty_like(x)
            numpy_blend(x, y, dtype, beta, expected)
            numkong.blend(x, y, dtype.lower(), alpha=1.0, beta=beta, out=found)
            if not np.array_equal(expected.view(np.uint8), found.view(np.uint8)):
                return None
    return numkong


def kernels_in_use() -> str:
    """Return the library whose kernels run on this machine: "numkong VERSION" or "numpy"."""
    numkong = _numkong()
    return f"numkong {numkong.__version__}" if numkong else "numpy"


def blend(a: Array, b: Array, dtype: str, beta: float, out: Array) -> None:
    """Write round(RN32(a + beta * b)) to `out`; BF16 or F32, finite inputs (see the module)."""
    numkong = _numkong()
    if numkong is None or a.size == 0:
        numpy_blend(a, b, dtype, beta, out)
    else:
        numkong.blend(a, b, dtype.lower(), alpha=1.0, beta=beta, out=out)


def dot(a: Array, b: Array, dtype: str) -> float:
    """Return the inner product of two arrays of one float dtype, added up in fp64.

    fp32 products over fixed pieces of 64 Ki, piece sums in fp64 (F64: fp64 throughout), so the
    digits do not depend on who computes which block.
    """
    numkong = _numkong() if dtype == "BF16" else None
    total = 0.0
    for at in range(0, a.size, DOT_STEP):
        x, y = a[at : at + DOT_STEP], b[at : at + DOT_STEP]
        if numkong:
            total += numkong.dot(x, y, "bf16")
        else:
            x32 = widen(x, dtype)
            total += float(np.dot(x32, x32 if a is b else widen(y, dtype)))
    if not np.isfinite(total):  # values whose squares leave fp32, or NaN
        with np.errstate(all="ignore"):
            total = float(np.dot(widen(a, dtype).astype(np.float64), widen(b, dtype)))
    return total


def stochastic_narrow(values: F32Array, dtype: str, random16: npt.NDArray[np.uint16]) -> Array:
    """Round float32 values to BF16 or F16 up or down with the probability that keeps the mean.

    `random16` holds one uniform uint16 a value; the probability of the farther neighbour is met to
    2^-16. Values that `dtype` holds exactly never change.
    """
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


def from_bytes(content: bytearray, dtype: str) -> Array:
    """Return bytes as a writable array of a safetensors dtype, without copying."""
    return np.frombuffer(content, STORAGE_DTYPE[dtype])
