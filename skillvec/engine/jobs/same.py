"""Two deltas that have to be the same."""

from typing import ClassVar

from skillvec.engine.jobs.point import narrowed
from skillvec.engine.plan import Job, Task


class SameJob(Job):
    """Whether deltas[0] is deltas[1], rounded to its dtype."""

    status: ClassVar[str] = "compared"

    def run(self, task: Task) -> None:
        held = [delta.read(task.block, f"delta{i}")[0] for i, delta in enumerate(self.deltas)]
        one, other = (narrowed(delta, held[1].dtype, self.name) for delta in held)
        task.compare(one, other)
