"""target + lam * delta, written into the parameters of a model in memory."""

from dataclasses import dataclass, fields
from typing import ClassVar

from skillvec.checkpoints.live_tensors import LiveTensor
from skillvec.engine.jobs.add import AddJob
from skillvec.engine.plan import Task
from skillvec.files.file import leaf_digests
from skillvec.ops.codecs import room_nbytes
from skillvec.ops.kernels import Array


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LiveJob(AddJob):
    """The job of an apply, whose result takes the place of its point."""

    status: ClassVar[str] = "attached"

    point: LiveTensor

    @classmethod
    def of(cls, job: AddJob) -> "LiveJob":
        """Return what does in memory what a job does for a file."""
        return cls(**{field.name: getattr(job, field.name) for field in fields(job)})

    def put(self, task: Task, out: Array) -> None:
        """Write a block in place of its original values, which lie in the buffer of the point."""
        block = task.block
        digest = leaf_digests(out.view("u1").data)
        block.keep("output", out.itemsize, digest)
        before = block.array("point", self.point.dtype)
        room = block.workspace.array("packed", "U8", room_nbytes(out, "packed"))
        self.point.change(block.begin, before, out, digest, room)
