"""target + lam * delta, written into the parameters of a model in memory."""

import threading
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from skillvec.checkpoints.live_tensors import LiveTensor
from skillvec.engine.jobs.add import AddJob
from skillvec.engine.plan import CHANGED, Task
from skillvec.files.file import leaf_digests
from skillvec.ops import device
from skillvec.ops.codecs import room_nbytes
from skillvec.ops.kernels import Array, Bytes
from skillvec.ops.special import bit_pattern

# a device works off one block after the other anyway, and its memory has room for one
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LiveJob(AddJob):
    """The job of an apply, whose result takes the place of its point.

    Where the parameters lie on a device that computes, the delta goes there and the exclusive or
    of old and new bits comes back; the values themselves do once, for the digests of the original.
    """

    status: ClassVar[str] = "attached"

    point: LiveTensor

    @classmethod
    def of(cls, job: AddJob) -> "LiveJob":
        """Return what does in memory what a job does for a file."""
        return cls(**{field.name: getattr(job, field.name) for field in fields(job)})

    def run(self, task: Task) -> None:
        block, plan, point = task.block, task.common.plan, self.point
        place = point.place()
        if place is None:
            return super().run(task)
        delta, replaced = self.deltas[0].read(block, "delta0")
        if self.may_restore(plan, replaced):  # which ones, only the host knows
            return super().run(task)
        random16 = self.draw(plan, block)
        with _one_at_a_time:
            before = point.original_there(block.begin, place)
            leaves = point.leaves_of(block.begin, before)
            block.keep("point", point.itemsize, leaves)
            old = device.as_floats(before, point.dtype)
            new, moved = device.add(old, point.dtype, delta, plan.lam, random16)
            changed = device.to_host(before ^ new.view(before.dtype), point.dtype)
            digest = device.checksum(new.view(before.dtype))
            if moved.target_nonfinite or moved.output_nonfinite:
                sides = device.to_host(old, point.dtype), device.to_host(new, point.dtype)
                task.count_nonfinite(self, sides[0], delta, sides[1])
        if not moved.changed:  # of what did, nobody asks for a digest
            block.keep("output", point.itemsize, leaves)
        task.tally[CHANGED] = moved.changed
        task.state.sums[block.index] = moved.sums
        point.change(block.begin, changed, before, new.view(before.dtype), digest, self._room(task))

    def put(self, task: Task, out: Array) -> None:
        """Write a block in place of its original values, which lie in the buffer of the point."""
        block = task.block
        digest = leaf_digests(out.view("u1").data)
        block.keep("output", out.itemsize, digest)
        old, new = (bit_pattern(side) for side in (block.array("point", self.point.dtype), out))
        changed = np.bitwise_xor(old, new, out=bit_pattern(block.array("changed", self.out_dtype)))
        self.point.change(block.begin, changed, old, new, digest, self._room(task))

    def _room(self, task: Task) -> Bytes:
        values = task.block.array("point", self.point.dtype)
        return task.block.workspace.array("packed", "U8", room_nbytes(values, "packed"))
