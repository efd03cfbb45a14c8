"""target + lam * delta: the job of an apply, and of its proof."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from skillvec.engine.jobs.point import PointJob, restore
from skillvec.engine.plan import CHANGED, Plan, Task
from skillvec.files.tensors import Source
from skillvec.ops import arithmetic, moments
from skillvec.ops.kernels import FLOATS
from skillvec.ops.philox import draw_uint16
from skillvec.ops.statistics import Request
from skillvec.vectors.block_reader import Block


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AddJob(PointJob):
    """point + lam * deltas[0]; `tuned_dtype` is the one in which replacements hold."""

    status: ClassVar[str] = "applied"

    point: Source
    tuned_dtype: str = ""

    def width(self, request: Request | None) -> int:
        return len(moments.Moments().sums)

    @property
    def knows_base(self) -> bool:
        return self.base_digest is not None or self.deltas[0].pair is not None

    def is_exact_base(self, point: str, base: str) -> bool:
        return point == (self.base_digest if self.deltas[0].pair is None else base)

    def may_restore(self, plan: Plan, replaced: npt.NDArray[Any]) -> bool:
        """Return whether replacements of a block are put in, on the exact base."""
        return replaced.size > 0 and plan.lam == 1.0 and self.out_dtype == self.tuned_dtype

    def draw(self, plan: Plan, block: Block) -> npt.NDArray[np.uint16] | None:
        """Return the random numbers of a block, None where it is rounded to the nearest."""
        if plan.rounding != "stochastic":
            return None
        return draw_uint16(f"{plan.seed}:{self.name}", block.begin, block.size)

    def run(self, task: Task) -> None:
        block, plan = task.block, task.common.plan
        delta, replaced = self.deltas[0].read(block, "delta0")
        out = point = block.read("point", self.point, "point")
        restores = self.may_restore(plan, replaced)
        if restores and task.exact_base is None:
            task.state.assumed[block.index] = task.tally
        restores &= plan.expects_base if task.exact_base is None else task.exact_base
        if restores or not delta.is_zero or self.out_dtype != self.point.dtype:
            out = block.array("out", self.out_dtype)
            random16 = self.draw(plan, block)
            dtypes, measure = (self.point.dtype, self.out_dtype), self.expected is None
            moved = arithmetic.add(
                point, dtypes[0], delta, plan.lam, dtypes[1], out, random16, measure
            )
            if restores:
                restore(self, out, replaced)
                moved = moments.moments(point, dtypes[0], delta, out, dtypes[1], measure)
            task.tally[CHANGED] = moved.changed
            task.state.sums[block.index] = moved.sums
            if moved.target_nonfinite or moved.output_nonfinite or restores:
                task.count_nonfinite(self, point, delta, out, restores)
        elif self.point.dtype in FLOATS:
            task.count_nonfinite(self, point, delta, out)
        self.put(task, out)
