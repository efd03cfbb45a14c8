"""What operators have to know of vectors before they merge them: measured without an output."""

from collections.abc import Sequence

from skillvec.engine.jobs.compare import CompareJob
from skillvec.engine.plan import Plan
from skillvec.engine.run import Run
from skillvec.engine.runner import measure_plan
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.vector import SkillVector


def measure(vector: SkillVector, names: Sequence[str]) -> dict[str, DeltaSource]:
    """Return a vector's deltas of these names, with what their operators have measured.

    An operator that measures over the tensor reads these tensors, one that measures over all of
    them reads the whole vector.
    """
    deltas = {name: vector.deltas[name] for name in names}
    jobs = [CompareJob(name, delta.spec.numel, deltas=(delta,)) for name, delta in deltas.items()]
    plan = Plan("read", jobs, vectors=vector.files(), mixes=vector.mixes())
    return {job.name: job.deltas[0] for job in measure_plan(plan, Run.by()).jobs}
