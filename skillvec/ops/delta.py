"""A block of a delta: its values, exceptions in fp32 among them, and its norm."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops import lanes
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


def squared(delta: Delta) -> float:
    """Return the squared norm of a delta, in the order of `lanes`."""
    parts = [np.zeros(0)]
    for begin in range(0, delta.values.size, STEP):
        values = delta.wide(begin, begin + STEP)
        parts.append(lanes.group_products(values, values))
    return lanes.in_order(np.concatenate(parts))
