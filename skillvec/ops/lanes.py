"""Sums in one order, whoever adds: 16 lanes a group of neighbours, groups one after the other.

Product i of a group goes to lane i mod 16, in order of position; lanes are folded 8, 4, 2, 1 in
fp64; groups are added one after the other, and so are blocks. Products and lanes of fp32 values are
fp32, which is good to 3e-7 of the norms; where that leaves the range of fp32, or the sum is next
to nothing, the group is added up again in fp64. The compiled kernels add in this order
(native/tiles.h), so that a sum has the same digits on every machine and for any worker count.
"""

import numpy as np
import numpy.typing as npt

from skillvec.ops.kernels import Array

Sums = npt.NDArray[np.float64]
ROW = 16
GROUP = 1024  # values a group, where nothing else is said


def group_products(a: Array, b: Array, width: int = GROUP) -> Sums:
    """Return the inner products of groups of `width` neighbours, the last group shorter.

    Two 1-D arrays of one length, both float32 or both float64, of finite values.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        sums = _fold(a * b, width)
        if a.dtype == np.float32:
            size = np.abs(sums)
            for group in np.flatnonzero(~((size >= 1e-30) & (size <= 3e38))).tolist():
                at = slice(group * width, (group + 1) * width)
                sums[group] = _fold(a[at].astype(np.float64) * b[at], width)[0]
    return sums


def _fold(terms: Array, width: int) -> Sums:
    """Return the sums of groups of `width` neighbours."""
    count, rows = -(-terms.size // width), -(-width // ROW)
    whole = terms.size // width
    padded = np.zeros((count, rows * ROW), terms.dtype)
    padded[:whole, :width] = terms[: whole * width].reshape(whole, width)
    if whole < count:
        padded[whole, : terms.size - whole * width] = terms[whole * width :]
    lanes = np.add.reduce(padded.reshape(count, rows, ROW), axis=1, initial=0.0)
    lanes = lanes.astype(np.float64)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def in_order(sums: Sums) -> float:
    """Return the sum of 1-D `sums`, added one after the other."""
    return float(np.cumsum(sums)[-1]) if sums.size else 0.0


def dot(a: Array, b: Array) -> float:
    """Return the inner product of what `group_products` takes."""
    return in_order(group_products(a, b))
