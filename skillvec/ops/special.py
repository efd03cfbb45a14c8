"""Bit patterns, NaN, infinities and short mantissas: what floats are beside their values."""

import numpy as np
import numpy.typing as npt

from skillvec.ops.kernels import Array


def differ(one: Array, other: Array) -> npt.NDArray[np.bool_]:
    """Return where two arrays of floats hold other values; NaNs are one value, and so are zeros."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wrong: npt.NDArray[np.bool_] = (one != other) & ~(np.isnan(one) & np.isnan(other))
    return wrong


def bit_pattern(values: Array) -> Array:
    """Return the values viewed as unsigned integers of the same width."""
    return values.view(np.dtype(f"<u{values.dtype.itemsize}"))


MANTISSA = 23  # stored bits of fp32's
LEAST = 2.0**-126  # below, fp32 and bf16 have fewer bits


def round_mantissa(values: Array, bits: int) -> npt.NDArray[np.float64]:
    """Return values as fp64, rounded to `bits` stored bits of mantissa, to nearest.

    Ties go to the even bit pattern. What is then below 2^-126 is 0, so that bf16 holds all that 7
    bits or fewer leave. 23 bits, all that fp32 has, leave every value as it is.
    """
    wide = values.astype(np.float64)
    if bits >= MANTISSA:
        return wide
    drop = np.uint64(52 - bits)
    pattern = wide.view(np.uint64)
    pattern += (pattern >> drop & np.uint64(1)) + (
        (np.uint64(1) << drop - np.uint64(1)) - np.uint64(1)
    )
    pattern >>= drop
    pattern <<= drop
    wide[np.abs(wide) < LEAST] = 0
    return wide


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
    return has_negative_zero(values) or has_nonfinite(values, dtype)


def has_negative_zero(values: Array) -> bool:
    """Return whether floats of any dtype hold -0."""
    bits = bit_pattern(values)
    signed = bits.view(bits.dtype.str.replace("u", "i"))
    return bool(signed.min(initial=0) == np.iinfo(signed.dtype).min)
