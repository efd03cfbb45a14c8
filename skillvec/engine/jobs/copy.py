"""A tensor of the target that passes as it is."""

from typing import ClassVar

from skillvec.engine.jobs.point import PointJob
from skillvec.engine.plan import Task
from skillvec.ops.kernels import FLOATS


class CopyJob(PointJob):
    """Leave a tensor as it is; with a `base_digest`, for the proof that it is the base's."""

    status: ClassVar[str] = "passed through"

    def run(self, task: Task) -> None:
        point = task.block.read("point", self.point, "point")
        if self.point.dtype in FLOATS:
            task.count_nonfinite(self, point, None, point)
        self.put(task, point)
