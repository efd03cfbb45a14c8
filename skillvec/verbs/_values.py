"""Tensors of a vector as numpy arrays: what vector["name"] and vector.items() do."""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from skillvec.engine.jobs.compare import CompareJob
from skillvec.engine.plan import Plan
from skillvec.engine.run import Run
from skillvec.engine.runner import measure_plan
from skillvec.engine.threads import one_blas_thread
from skillvec.errors import NonfiniteError, UsageError
from skillvec.files.file import forget_open_files
from skillvec.ops.kernels import Array
from skillvec.vectors.deltas.base import DeltaSource, pieces_of
from skillvec.vectors.reader import readers_of
from skillvec.vectors.vector import SkillVector


def read_values(
    vector: SkillVector, names: Sequence[str], rows: slice | None = None
) -> Iterator[tuple[str, Array]]:
    """Yield names and tensors, or `rows` of them, one at a time; see SkillVector.

    An operator that measures over the tensor reads these tensors before, one that measures over all
    of them the whole vector.
    """
    deltas = {name: vector.deltas[name] for name in names}
    jobs = [CompareJob(name, delta.spec.numel, deltas=(delta,)) for name, delta in deltas.items()]
    plan = Plan("read", jobs, vectors=vector.files(), mixes=vector.mixes())
    for job in measure_plan(plan, Run.by()).jobs:
        yield job.name, _read(vector, job.name, job.deltas[0], rows)


def _read(vector: SkillVector, name: str, delta: DeltaSource, rows: slice | None) -> Array:
    shape, first = delta.spec.shape, 0
    if rows is not None:
        if not shape or rows.step not in (None, 1):
            what = "a number has none" if not shape else f"a step of {rows.step}"
            raise UsageError(f"{name}: rows {rows}: {what}: expected a slice such as 10:20")
        begin, end, _ = rows.indices(shape[0])
        shape = (max(end - begin, 0), *shape[1:])
        first = begin * prod(shape[1:])
    out: Array = np.empty(prod(shape), np.float64 if delta.dtype == "F64" else np.float32)
    factor = np.float64(vector.scale)  # one rounding, as when a multiple is stored
    pieces = pieces_of(delta, readers_of(vector.files()), None, first, first + out.size)
    try:
        with one_blas_thread(), np.errstate(over="ignore"):  # products have the bits of a run
            for begin, values in pieces:
                out[begin - first : begin - first + values.size] = values * factor
    finally:
        forget_open_files()
    if not np.isfinite(out).all():
        raise NonfiniteError(f"{name}: {vector.scale:g} times it is beyond the range of its dtype")
    out += 0.0  # no negative zeros
    return out.reshape(shape)
