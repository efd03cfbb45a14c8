"""A delta encoded into a vector file."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from skillvec.engine.jobs.point import narrowed
from skillvec.engine.plan import CHANGED, RANKED, RowJob, Task
from skillvec.files.rows import digest_of_two
from skillvec.ops.codecs import encode_block, room_nbytes
from skillvec.ops.delta import EXCEPTION, Delta, squared
from skillvec.ops.special import bit_pattern
from skillvec.ops.statistics import Request


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StoreJob(RowJob):
    """deltas[0] into a vector file, in a codec."""

    status: ClassVar[str] = "delta"

    codec: str

    def width(self, request: Request | None) -> int:
        return 1

    @property
    def roles(self) -> tuple[str, ...]:
        return ("output",) if self.deltas[0].pair is None else ("output", "tuned", "base")

    def run(self, task: Task) -> None:
        """Encode one block and give it to the writer in its turn."""
        block, source = task.block, self.deltas[0]
        assert task.common.writer is not None
        delta, replaced = source.read(block, "delta0")
        found = block.subtracted
        if found is not None:
            counts = found.changed, found.unrestored, delta.positions.size, replaced.size
            task.tally[: len(counts)] = counts
            task.state.sums[block.index] = found.delta_sq
        elif not source.is_stored:  # of a stored one the manifest knows
            task.tally[CHANGED] = np.count_nonzero(bit_pattern(delta.values))
            task.state.sums[block.index] = squared(delta)
        values = delta.values
        if delta.dtype != self.out_dtype:
            values = narrowed(delta, self.out_dtype, self.name)
        room = block.workspace.array("encoded", "U8", room_nbytes(values, self.codec))
        encoded = encode_block(values, self.codec, room)
        task.tally[RANKED] = encoded.ranked
        records = _exceptions(delta).view(np.uint8), replaced.view(np.uint8)
        row = self.first_block + block.index
        digest = digest_of_two(encoded.payload, encoded.bitmap)
        task.common.writer.add(row, (encoded.payload, encoded.bitmap, *records), digest)
        block.stamp("output", digest)


def _exceptions(delta: Delta) -> npt.NDArray[Any]:
    records = np.zeros(delta.positions.size, EXCEPTION)
    records["position"], records["value"] = delta.positions, delta.exact
    return records
