"""Sums in one order, whoever adds: 16 lanes a group of neighbours, groups one after the other.

Product i of a group goes to lane i mod 16, in order of position; lanes are folded 8, 4, 2, 1 in
fp64; groups are added one after the other, and so are blocks. Products and lanes of fp32 values are
fp32, which is good to 3e-7 of the norms; where that leaves the range of fp32, or the sum is next
to nothing, the group is added up again in fp64. The compiled kernels add in this order
(native/tiles.h), so that a sum has the same digits on every machine and for any worker count.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

from skillvec.ops.compiled import CODES, Kernel, kernel
from skillvec.ops.kernels import Array

Sums = npt.NDArray[np.float64]
ROW = 16
GROUP = 1024  # values a group, where nothing else is said


def group_products(a: Array, b: Array, width: int = GROUP) -> Sums:
    """Return the inner products of groups of `width` neighbours, a power of two, the last shorter.

    Two 1-D arrays of one length, both float32 or both float64, of finite values.
    """
    run = _products_kernel() if a.dtype == np.float32 else None
    if run is None:
        return row_products(by_rows(a, width), by_rows(b, width))
    out = np.empty(-(-a.size // width))
    run(a, b, width, CODES["F32"], CODES["F32"], out)
    return out


@cache
def _products_kernel() -> Kernel | None:
    def sample(run: Kernel) -> bytes:
        a = (np.arange(4073, dtype=np.uint32) * np.uint32(2654435761) & 0xBFFFFFFF).view(np.float32)
        out = np.empty(4)
        run(a, a[::-1].copy(), GROUP, CODES["F32"], CODES["F32"], out)
        return out.tobytes()

    return kernel("group_products", sample, PRODUCTS_CHECK)


PRODUCTS_CHECK = "586f9e08128dbd14"  # of what `row_products` makes of the sample; a test compares


def by_rows(values: Array, width: int = GROUP) -> Array:
    """Return a copy in the order in which values are added, (rows, groups, lanes), zeros behind.

    Where a group has less than 16 values there are as many lanes.
    """
    lanes = min(width, ROW)
    count, rows = -(-values.size // width), width // lanes
    out = np.zeros((rows, count, lanes), values.dtype)
    whole = values.size // width
    item = np.dtype((np.void, lanes * values.itemsize))
    moved = values[: whole * width].view(item).reshape(whole, rows)
    out.view(item)[:, :whole, 0] = moved.T
    if whole < count:
        end = np.zeros(width, values.dtype)
        end[: values.size - whole * width] = values[whole * width :]
        out[:, whole] = end.reshape(rows, lanes)
    return out


def row_products(
    a: Array, b: Array, terms: Array | None = None, where: Array | None = None
) -> Sums:
    """Return the inner products of groups of what `by_rows` gives.

    `terms` are the products, if they are at hand, times `where`, which is 0 or 1.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        sums = sum_rows(a * b if terms is None else terms)
        if a.dtype == np.float32:
            size = np.abs(sums)
            again = np.flatnonzero(~((size >= 1e-30) & (size <= 3e38)))
            if again.size:
                terms = a[:, again].astype(np.float64) * b[:, again]
                sums[again] = sum_rows(terms if where is None else terms * where[:, again])
    return sums


def sum_rows(terms: Array) -> Sums:
    """Return the sums of groups of what is arranged by rows."""
    rows, count, width = terms.shape
    flat = terms.reshape(rows, count * width)
    lanes = np.add.reduce(flat, axis=0, initial=0.0).astype(np.float64).reshape(count, width)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return np.asarray(lanes[:, 0])


def in_order(sums: Sums) -> float:
    """Return the sum of 1-D `sums`, added one after the other."""
    return float(np.cumsum(sums)[-1]) if sums.size else 0.0


def dot(a: Array, b: Array) -> float:
    """Return the inner product of what `group_products` takes."""
    return in_order(group_products(a, b))
