"""Elementwise arithmetic and sums on contiguous 1-D numpy blocks, in the dtypes of safetensors.

Hides which library does the arithmetic. The documented result of `blend` on 16- and 32-bit floats
is a fused multiply-add in fp32, RN32(a + beta * b), then one rounding (nearest, ties to even) to
the output dtype; in fp64, product and sum round once each. NumKong's SIMD kernels give these bytes
and are used when a self-check on this machine finds that they do; plain numpy gives the same bytes
slower. BF16 arrays are held as uint16 bit patterns, every other dtype as numpy's own.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_hexdigest

from skillvec.ops.compiled import CODES, Kernel, kernel

Array = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

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
DOT_ROW = 1024  # products summed in fp32 before fp64 takes over
LANES = 64


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


def self_check(run: Callable[[Array, Array, str, float, Array], None]) -> str:
    """Return a digest of what a blend function makes of fixed inputs: patterns and weights.

    Finite bf16 patterns of every exponent, sums that cancel and sums that tie, the same in fp32
    with all mantissa bits in use.
    """
    a = np.arange(4073, dtype=np.uint16) * np.uint16(40503) & 0xBFFF  # exponents below 2^0
    b = np.roll(a, 1021) ^ (a & 0x8000)
    b[::2] = a[::2] ^ np.uint16(0x8003)  # nearly -a
    results = bytearray()
    for dtype in ("BF16", "F32"):
        x, y = (a, b) if dtype == "BF16" else (widen(a, dtype="BF16"), widen(b, dtype="BF16"))
        if dtype == "F32":
            x, y = (
                np.ascontiguousarray(z.view(np.uint32) | z.view(np.uint32) >> 13) for z in (x, y)
            )
            x, y = x.view(np.float32), y.view(np.float32)
        for beta in (1.0, -1.0, 0.7):
            out = np.empty_like(x)
            run(x, y, dtype, beta, out)
            results += out.tobytes()
    return xxh3_64_hexdigest(bytes(results))


SELF_CHECK = "5a56b2e9d1408dce"  # of numpy_blend; a test compares


@cache
def _numkong() -> Any:
    """Return the numkong module if it is there and gives the documented bytes, else None."""
    try:
        numkong: Any = import_module("numkong")
    except ImportError:  # no build for this platform
        return None
    digest = self_check(lambda *blend_of: _library_blend(numkong, *blend_of))
    return numkong if digest == SELF_CHECK else None


def _library_blend(numkong: Any, a: Array, b: Array, dtype: str, beta: float, out: Array) -> None:
    """Blend with NumKong, in whole vectors: its F32 kernel does not fuse the last numel % 8."""
    whole = a.size // LANES * LANES
    if a.size - whole and a.size < 4096:  # few values: pad them all, one call
        whole = 0
    if whole:
        numkong.blend(a[:whole], b[:whole], dtype.lower(), alpha=1.0, beta=beta, out=out[:whole])
    if whole < a.size:
        rest = a.size - whole
        padded = np.zeros((3, -(-rest // LANES) * LANES), a.dtype)
        padded[0, :rest], padded[1, :rest] = a[whole:], b[whole:]
        numkong.blend(padded[0], padded[1], dtype.lower(), alpha=1.0, beta=beta, out=padded[2])
        out[whole:] = padded[2, :rest]


def kernels_in_use() -> str:
    """Return the library whose kernels run on this machine: "numkong VERSION" or "numpy"."""
    numkong = _numkong()
    return f"numkong {numkong.__version__}" if numkong else "numpy"


def blend(a: Array, b: Array, dtype: str, beta: float, out: Array) -> None:
    """Write round(RN32(a + beta * b)) to `out`; BF16 or F32, finite inputs (see the module)."""
    numkong = _numkong()
    if numkong is None:
        numpy_blend(a, b, dtype, beta, out)
    else:
        _library_blend(numkong, a, b, dtype, beta, out)


def group_dots(a: Array, b: Array, width: int) -> npt.NDArray[np.float64]:
    """Return the inner products of groups of `width` neighbours, the last one shorter.

    BF16 (as uint16 patterns), F32 or F64 arrays of one dtype. fp32 sums in each group, each good to
    3e-7 of the norms; all in fp64 where products leave fp32.
    """
    whole = a.size // width * width
    dtype = "BF16" if a.dtype == np.uint16 else "F32"
    numkong = _numkong() if dtype == "BF16" and width >= LANES else None
    if dtype == "BF16" and numkong is None:
        a, b = widen(a, dtype), widen(b, dtype)
    rows = a[:whole].reshape(-1, width), b[:whole].reshape(-1, width)
    ends = a[whole:], b[whole:]
    sums = np.empty(-(-a.size // width))
    count = whole // width
    with np.errstate(all="ignore"):
        if numkong is None:
            sums[:count] = np.vecdot(*rows) if width > 1 else a.astype(np.float64) * b
            sums[count:] = np.dot(*ends)
        else:
            if count:
                sums[:count] = np.asarray(numkong.dot(*rows, "bf16"))
            if count < sums.size:
                sums[count:] = numkong.dot(*ends, "bf16")
        size = np.abs(sums).max(initial=0)
        if not np.isfinite(size) or (size < 1e-30 and _are_tiny(a, b)):
            a, b = (widen(x, dtype).astype(np.float64) for x in (a, b))
            sums[:] = [a[i : i + width] @ b[i : i + width] for i in range(0, a.size, width)]
    return sums


def _are_tiny(a: Array, b: Array) -> bool:
    """Return whether products may be too small for fp32, while neither array is 0."""
    most = [
        float(np.abs(widen(x, "BF16" if x.dtype == np.uint16 else "F32")).max(initial=0))
        for x in (a, b)
    ]
    return 0 < most[0] * most[1] < 1e-30


def dot(a: Array, b: Array) -> float:
    """Return the inner product, added up in fp64, of what `group_dots` takes."""
    return float(group_dots(a, b, DOT_ROW).sum())


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
