"""The sums of several deltas of one tensor, which orthogonality and norms are made of."""

from typing import ClassVar

from skillvec.engine.plan import Job, Task
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import Array
from skillvec.ops.statistics import Request, block_sums, is_sampled, layout, masks_nbytes, sample


class CompareJob(Job):
    """Deltas with each other, and with the weights `point`, as the plan's request says."""

    status: ClassVar[str] = "compared"

    def width(self, request: Request | None) -> int:
        return 0 if request is None else layout(request).itemsize // 8

    def run(self, task: Task) -> None:
        block, request = task.block, task.common.plan.request
        assert request is not None
        deltas: list[Delta] = []
        weights: list[tuple[Array, str] | None] = []
        sampled, point = is_sampled(block.begin), None
        if self.point is not None and sampled:
            point = sample(block.read("point", self.point)), self.point.dtype
        for i, source in enumerate(self.deltas):
            deltas.append(source.read(block, f"delta{i}")[0])
            if self.point is not None:
                weights.append(point)
            elif sampled and source.pair is not None:
                dtype = source.pair.base.dtype  # copied: the next pair reads into the same buffer
                weights.append((sample(block.array("base", dtype)).copy(), dtype))
            else:
                weights.append(None)
        masks = block.workspace.array("masks", "U8", masks_nbytes(len(deltas), block.size))
        task.state.sums[block.index] = block_sums(
            deltas, weights, request, self.name, self.numel, block.begin, masks
        )
