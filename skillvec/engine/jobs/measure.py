"""What a merge method has to know of a delta before it is read."""

from dataclasses import dataclass
from typing import Any

from skillvec.engine.plan import Common, Job, State, Task
from skillvec.vectors.deltas.mix import MixDelta


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MeasureJob(Job):
    """What the operator of deltas[0] needs to know: pass `number` over it."""

    deltas: tuple[MixDelta]
    number: int

    def run(self, task: Task) -> None:
        """Add one block to what is measured: counts to its scope, floats by block."""
        (mix,), common = self.deltas, task.common
        total = mix.measure(task.block, "delta0", self.number)
        with common.lock:
            if total.dtype.kind == "f":
                task.state.measured[task.block.index] = total
            else:
                held = common.totals.get(mix.scope)
                common.totals[mix.scope] = total if held is None else held + total

    def settle(self, common: Common, state: State) -> Any:
        """Return the tensor's sums; settled, where the tensor is the scope."""
        (mix,), total = self.deltas, None
        for block in sorted(state.measured):
            total = state.measured[block] if total is None else total + state.measured[block]
        if not mix.per_tensor:
            return total
        if total is None:  # pop is atomic; empty tensors come here with the lock held
            total = common.totals.pop(mix.scope, None)
        return None if total is None else mix.settle(self.number, total)  # None: an empty tensor
