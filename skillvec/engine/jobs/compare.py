"""The sums of several deltas of one tensor, which orthogonality and norms are made of."""

from collections.abc import Iterator
from typing import ClassVar

from skillvec.engine.plan import Job, Task
from skillvec.ops.comparison import Weights
from skillvec.ops.delta import Delta
from skillvec.ops.statistics import Request, block_sums, layout
from skillvec.vectors.block_reader import Block


class CompareJob(Job):
    """Deltas with each other, and with the weights `point`, as the plan's request says."""

    status: ClassVar[str] = "compared"

    def width(self, request: Request | None) -> int:
        return 0 if request is None else layout(request).itemsize // 8

    def run(self, task: Task) -> None:
        block, request = task.block, task.common.plan.request
        assert request is not None
        task.state.sums[block.index] = block_sums(self._sides(block), request, self.numel)

    def _sides(self, block: Block) -> Iterator[tuple[Delta, Weights | None]]:
        """Yield each delta and its weights: these until the next one is asked for.

        A pair has its base in a buffer that the next pair reads into.
        """
        point = (block.read("point", self.point), self.point.dtype) if self.point else None
        for i, source in enumerate(self.deltas):
            delta = source.read(block, f"delta{i}")[0]
            weights = point
            if point is None and source.pair is not None:
                dtype = source.pair.base.dtype
                weights = block.array("base", dtype), dtype
            yield delta, weights
