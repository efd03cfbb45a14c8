"""A block of a delta: its values, exceptions in fp32 among them, and its products."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops import kernels
from skillvec.ops.kernels import Array, F32Array, widen

STEP = 1 << 16  # elements a step of the general path, which bounds its temporary arrays
U32Array = npt.NDArray[np.uint32]
NO_POSITIONS: U32Array = np.zeros(0, np.uint32)
NO_VALUES: F32Array = np.zeros(0, np.float32)
EXCEPTION = np.dtype([("position", "<u4"), ("value", "<f4")])  # as vector files hold them


class Delta(NamedTuple):
    """A block of tuned - base: `values` in `dtype`, overridden at `positions` by `exact` (fp32)."""

    values: Array
    dtype: str
    positions: U32Array = NO_POSITIONS
    exact: F32Array = NO_VALUES
    is_zero: bool = False  # known to be, without a look

    def wide(self, begin: int, end: int) -> Array:
        """Return elements begin..end as float32 (float64 for F64), exceptions in place."""
        values = widen(self.values[begin:end], self.dtype)
        first, last = np.searchsorted(self.positions, (begin, end))
        if first < last:
            values[self.positions[first:last] - np.uint32(begin)] = self.exact[first:last]
        return values


def group_products(x: Delta, y: Delta, width: int = kernels.DOT_ROW) -> npt.NDArray[np.float64]:
    """Return the inner products of two deltas over groups of `width` neighbours, a power of two.

    fp32 sums in a group; the exceptions' own in fp64.
    """
    if x.dtype == y.dtype == "BF16":
        sums = kernels.group_dots(x.values, y.values, width)
        if x.positions.size or y.positions.size:
            at, more = _correction(x, y)
            sums += np.bincount(at // width, more, minlength=sums.size)
        return sums
    parts = []
    for begin in range(0, x.values.size, STEP):
        one, other = x.wide(begin, begin + STEP), y.wide(begin, begin + STEP)
        dtype = np.result_type(one, other)
        parts.append(kernels.group_dots(one.astype(dtype), other.astype(dtype), width))
    return np.concatenate(parts) if parts else np.zeros(0)


def _correction(x: Delta, y: Delta) -> tuple[U32Array, npt.NDArray[np.float64]]:
    """Return where exceptions change the products of the stored BF16 values, and by how much.

    <x + e, y + f> - <x, y> = <e, y> + <x, f> + <e, f>, where e and f stand at exceptions only.
    """
    stored = [widen(delta.values[delta.positions], "BF16").astype(np.float64) for delta in (x, y)]
    errors = [delta.exact - held for delta, held in zip((x, y), stored, strict=True)]
    places, amounts = [x.positions, y.positions], []
    for delta, other, error in ((x, y, errors[0]), (y, x, errors[1])):
        amounts.append(error * widen(other.values[delta.positions], "BF16"))
    if x.positions.size and y.positions.size:
        spot = np.searchsorted(y.positions, x.positions)
        spot[spot == y.positions.size] = 0
        shared = y.positions[spot] == x.positions
        places.append(x.positions[shared])
        amounts.append(errors[0][shared] * errors[1][spot[shared]])
    return np.concatenate(places), np.concatenate(amounts)


def squared(delta: Delta) -> float:
    """Return the squared norm of a delta, as `group_products` adds it up."""
    if delta.dtype != "BF16" or not delta.positions.size:
        return float(group_products(delta, delta).sum())
    stored = widen(delta.values[delta.positions], "BF16").astype(np.float64)
    more = np.vecdot(delta.exact, delta.exact.astype(np.float64)) - np.vecdot(stored, stored)
    return kernels.dot(delta.values, delta.values) + float(more)
