"""The stupid path: load everything, loop over tensors in float64, round once. No skillvec in here.

    python tests/support/oracle.py TARGET TUNED BASE LAM MERGED

prints, tensor by tensor, how many values of MERGED differ from round(TARGET + LAM * (TUNED - BASE))
and by how many units in the last place.
"""

import sys

import numpy as np
import torch
from families import bits, from_bits, load

DTYPE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
# bits of significand, exponent of the smallest normal number, largest finite number
GRID = {
    "BF16": (8, -126, (2 - 2**-7) * 2.0**127),
    "F16": (11, -14, 65504.0),
    "F32": (24, -126, (2 - 2**-23) * 2.0**127),
}


def round_to(values: np.ndarray, dtype: str) -> torch.Tensor:
    """Round float64 once, nearest, ties to even; gradual underflow; overflow to infinity."""
    if dtype == "F64":
        return torch.from_numpy(values.copy())
    precision, least, largest = GRID[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        exponent = np.maximum(np.frexp(values)[1], least + 1) - precision
        # scaling by a power of two is exact here: the quotient has at most 53 bits
        rounded = np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent)
        rounded = np.where(np.isfinite(values), rounded, values)
        rounded = np.where(
            np.isfinite(rounded) & (np.abs(rounded) > largest),
            np.copysign(np.inf, rounded),
            rounded,
        )
        single = rounded.astype(np.float32)  # exact: every value of the grid is one of float32
    if dtype == "F32":
        return torch.from_numpy(single)
    if dtype == "F16":
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(single.astype(np.float16))
    top = (single.view(np.uint32) >> 16).astype(np.uint16)
    return from_bits(np.where(np.isnan(single), np.uint16(0x7FC0), top), "BF16")


def wide(tensor: torch.Tensor) -> np.ndarray:
    """Return the values as a flat float64 array."""
    return tensor.detach().reshape(-1).double().numpy()


def delta(tuned: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    """Return tuned - base in float64, zero where either side is not finite."""
    with np.errstate(invalid="ignore"):
        difference = wide(tuned) - wide(base)
    return np.where(np.isfinite(difference), difference, 0.0)


def apply(
    target: torch.Tensor, difference: np.ndarray, lam: float, dtype: str | None = None
) -> torch.Tensor:
    """Return round(target + float32(lam) * difference) to the target's dtype or `dtype`.

    Where the difference is zero or the target not finite, its own bits stay.
    """
    own = DTYPE[target.dtype]
    dtype = dtype or own
    point = wide(target)
    with np.errstate(invalid="ignore"):
        total = point + float(np.float32(lam)) * difference
    keep = (difference == 0) | ~np.isfinite(point)
    out = round_to(np.where(keep, point, total), dtype)
    if dtype == own:
        out = torch.where(torch.from_numpy(keep), target.reshape(-1), out)
    return out.reshape(target.shape)


def ulps(found: torch.Tensor, expected: torch.Tensor) -> np.ndarray:
    """Return the distance of each pair of values in steps of their dtype's grid (NaN as bits)."""
    ordinals = []
    for tensor in (found, expected):
        pattern = bits(tensor)
        size = 8 * pattern.dtype.itemsize
        magnitude = (pattern & np.array((1 << (size - 1)) - 1, pattern.dtype)).astype(np.int64)
        negative = (pattern >> np.array(size - 1, pattern.dtype)).astype(bool)
        ordinals.append(np.where(negative, -magnitude - 1, magnitude))  # -0 is one below +0
    return np.abs(ordinals[0] - ordinals[1])


def main(target: str, tuned: str, base: str, lam: str, merged: str) -> int:
    """Compare a merged model with the oracle's; return how many values differ."""
    point, left, right, found = (load(path) for path in (target, tuned, base, merged))
    total = 0
    for name in point:
        if not point[name].is_floating_point():
            expected = point[name]
        else:
            expected = apply(point[name], delta(left[name], right[name]), float(lam))
        steps = ulps(found[name], expected)
        total += int(np.count_nonzero(steps))
        print(f"{name}: {np.count_nonzero(steps)} of {steps.size} differ, by at most {steps.max()}")
    return total


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
