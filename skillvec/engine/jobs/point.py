"""What jobs over a tensor of a model share: writing it, or comparing it with what is there."""

from typing import Any

import numpy as np
import numpy.typing as npt

from skillvec.engine.plan import Job, Task
from skillvec.errors import FormatError, IncompatibleError
from skillvec.files.file import LEAF_NBYTES, leaf_digests
from skillvec.files.tensors import Source
from skillvec.ops import special
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import Array, narrow, widen


class PointJob(Job):
    """A job that writes a tensor of a target, or compares what it would write with `expected`."""

    point: Source

    def put(self, task: Task, out: Array) -> None:
        """Write a block, or compare it with what is there."""
        block = task.block
        if self.expected is not None:
            role = "expected" if self.expected_digest is not None else ""
            expected = block.read("expected", self.expected, role)
            task.compare(out, expected)
        elif self.output is not None:
            file, start = self.output
            start += block.begin * out.itemsize
            content, digests = out.view(np.uint8).data, b""
            for at in range(0, len(content), LEAF_NBYTES):  # both while it is in the cache
                piece = content[at : at + LEAF_NBYTES]
                digests += leaf_digests(piece)
                task.common.outputs[file].write(start + at, piece)
            block.keep("output", out.itemsize, digests)


def restore(job: Job, out: Array, replaced: npt.NDArray[Any]) -> None:
    """Set the values that no difference restores."""
    if replaced.size and int(replaced["bits"].max()) >> 8 * out.itemsize:
        raise FormatError(f"{job.name}: a replacement wider than {job.out_dtype}")
    pattern = special.bit_pattern(out)
    pattern[replaced["position"]] = replaced["bits"].astype(pattern.dtype)


def narrowed(delta: Delta, dtype: str, name: str) -> Array:
    """Round to a storage dtype; its zeros are positive, and what it cannot hold is refused."""
    rounded = narrow(delta.wide(0, delta.values.size), dtype)
    wide = widen(rounded, dtype)
    if not np.isfinite(wide).all():
        raise IncompatibleError(f"{name}: values beyond the range of {dtype}")
    rounded[wide == 0] = 0
    return rounded
