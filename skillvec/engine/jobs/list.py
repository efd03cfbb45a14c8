"""What base + delta changes, listed for a patch."""

from typing import ClassVar

import numpy as np

from skillvec.checkpoints.patch_lists import POSITIONS, positions_dtype
from skillvec.engine.jobs.point import restore
from skillvec.engine.plan import RowJob, Task
from skillvec.files.tensors import Source
from skillvec.ops import arithmetic, special


class ListJob(RowJob):
    """What point + deltas[0] changes, into a patch; that it is the exact base shows at the end."""

    status: ClassVar[str] = "listed"

    point: Source

    def is_exact_base(self, point: str, base: str) -> bool:
        return point == (self.base_digest if self.deltas[0].pair is None else base)

    def run(self, task: Task) -> None:
        block = task.block
        assert task.common.writer is not None
        delta, replaced = self.deltas[0].read(block, "delta0")
        point = block.read("point", self.point, "point")
        out = block.array("out", self.out_dtype)
        arithmetic.add(point, self.point.dtype, delta, 1.0, self.out_dtype, out)
        restore(self, out, replaced)
        task.count_nonfinite(self, point, delta, out, replaced.size > 0)
        changed = np.flatnonzero(special.bit_pattern(out) != special.bit_pattern(point))
        positions = (changed + block.begin).astype(POSITIONS[positions_dtype(self.numel)])
        pieces = positions.view(np.uint8), out[changed].view(np.uint8)
        task.common.writer.add(self.first_block + block.index, pieces)
