"""The sums of several deltas of one tensor, which orthogonality and norms are made of."""

from collections.abc import Iterator
from typing import ClassVar

from skillvec.engine.plan import Common, Job, State, Task
from skillvec.ops import strata
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
        tables: dict[int, strata.Counts] = {}
        sides = strata.counting(self._sides(block), request, tables)
        task.state.sums[block.index] = block_sums(sides, request, self.numel)
        with task.common.lock:
            held = task.state.measured
            for n, counts in tables.items():
                held[n] = held[n] + counts if n in held else counts

    def settle(self, common: Common, state: State) -> dict[int, strata.Strata]:
        """Return the strata of its pairs."""
        return {n: strata.pack(counts) for n, counts in state.measured.items()}

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
