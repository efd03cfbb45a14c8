"""What deltas do to the outputs of the modules that hold them, matrix by matrix.

Reads the second moments of the modules' inputs, and the matrices once more after the run that gave
the sums. Matrices that share an input are taken together, so that its eigenvectors are found once.
"""

from collections.abc import Sequence
from contextlib import closing
from math import isfinite
from typing import NamedTuple

import numpy as np

from skillvec.analysis.angle_report import ActivationFacts, Row
from skillvec.checkpoints.input_moments import Moments, read_part
from skillvec.engine.matrix_workers import at_once_nbytes, in_turn
from skillvec.engine.plan import Job, JobResult, Plan
from skillvec.errors import FormatError, IncompatibleError, up_to_five
from skillvec.files.file import forget_open_files
from skillvec.ops import activations as ops
from skillvec.ops.kernels import Array
from skillvec.ops.statistics import Request
from skillvec.ops.svd import resolve_device
from skillvec.report import Watcher
from skillvec.vectors.deltas.base import add_values
from skillvec.vectors.reader import BlockReader, readers_of


def match_moments(moments: Moments, jobs: Sequence[Job], device: str) -> ActivationFacts:
    """Return what a report says of moments that fit the matrices of a plan.

    Raises IncompatibleError, with names, where no weight or another shape is meant.
    """
    matrices = {job.name: job.deltas[0].spec.shape for job in jobs if is_matrix(job)}
    known = [name for name in matrices if name in moments.weights]
    if not known:
        raise IncompatibleError(
            f"{moments.path} knows none of the {len(matrices)} matrices:\n"
            f"{up_to_five(list(matrices))}\nit is of\n{up_to_five(list(moments.weights))}"
        )
    if wrong := [said for name in known if (said := moments.misfit(name, matrices[name]))]:
        raise IncompatibleError(f"{moments.path} is of another model:\n{up_to_five(wrong)}")
    return {
        "path": moments.path, "model": str(moments.about.get("model")),
        "tokens": moments.about["tokens"], "device": resolve_device(device),
        "matrices": len(known), "without": len(matrices) - len(known),
    }  # fmt: skip


def is_matrix(job: Job) -> bool:
    return len(job.deltas[0].spec.shape) == 2 and job.numel > 0


class Outputs(NamedTuple):
    """What is known of each matrix's outputs, by vector or pair and tensor: sums."""

    vectors: list[list[Row]]
    pairs: list[list[Row]]

    @staticmethod
    def empty(request: Request, tensors: int = 0) -> "Outputs":
        """Return that nothing is known, of no tensor where it is not asked."""
        return Outputs(
            [[{}] * tensors for _ in request.scales],  # put in the place of, never added to
            [[{}] * tensors for _ in request.pairs],
        )


def group_by_input(moments: Moments, jobs: Sequence[Job]) -> dict[str, list[int]]:
    """Return the numbers of the jobs whose matrices share an input, by the input."""
    groups: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        if is_matrix(job) and job.name in moments.weights:
            groups.setdefault(moments.weights[job.name][0], []).append(number)
    return groups


def memory_nbytes(moments: Moments | None, jobs: Sequence[Job], at_once: int) -> int:
    """Return the most memory that outputs take, in bytes; 0 without moments."""
    if moments is None:
        return 0
    groups = group_by_input(moments, jobs)
    sizes = [group_nbytes(moments, entry, [jobs[n] for n in group])
             for entry, group in groups.items()]  # fmt: skip
    return at_once_nbytes(sizes, at_once)


def group_nbytes(moments: Moments, entry: str, jobs: Sequence[Job]) -> int:
    """Return the size of the largest matrix of an input and of its moments, for every delta."""
    width = moments.inputs[entry].width
    largest = max(job.numel for job in jobs)
    return 4 * len(jobs[0].deltas) * (largest + width * width)


def find_outputs(
    results: Sequence[JobResult], plan: Plan, moments: Moments, device: str, at_once: int,
    watcher: Watcher | None,
) -> Outputs:  # fmt: skip
    """Return what every delta and every pair does to the outputs, `at_once` inputs at a time."""
    assert plan.request is not None
    jobs = [result.job for result in results]
    groups, outputs = group_by_input(moments, jobs), Outputs.empty(plan.request, len(jobs))
    readers, request = readers_of(plan.vectors), plan.request
    total, done = sum(jobs[n].nbytes_read for group in groups.values() for n in group), 0

    def respond(entry: str) -> list[tuple[list[Row], list[Row]]]:
        moment = read_moment(moments, entry, device)
        return [
            _relate(job, request, moment, readers, moments.weights[job.name][1])
            for job in (jobs[n] for n in groups[entry])
        ]

    def nbytes_of(entry: str) -> int:
        return group_nbytes(moments, entry, [jobs[n] for n in groups[entry]])

    try:
        with closing(in_turn(respond, groups, nbytes_of, at_once)) as found:
            for group, related in zip(groups.values(), found, strict=True):
                for n, (vectors, pairs) in zip(group, related, strict=True):
                    for rows, row in zip(outputs.vectors, vectors, strict=False):
                        rows[n] = row  # none of the control
                    for rows, row in zip(outputs.pairs, pairs, strict=True):
                        rows[n] = row
                    done += jobs[n].nbytes_read
                if watcher:
                    watcher.advanced(done, total)
    finally:
        forget_open_files()
    return outputs


def read_moment(moments: Moments, entry: str, device: str) -> ops.Moment:
    """Return the moments of an input; FormatError for what no inputs have."""
    second, mean = map(read_part, moments.inputs[entry])
    moment = ops.find_moment(second, mean, device)
    if not (isfinite(moment.trace) and moment.trace > 0):
        raise FormatError(f"{moments.path}: {entry}: inputs that are 0 have no outputs to compare")
    return moment


def _relate(
    job: Job, request: Request, moment: ops.Moment, readers: dict[str, BlockReader], side: int
) -> tuple[list[Row], list[Row]]:
    """Return the sums of one tensor's deltas and pairs."""

    def read(number: int) -> Array:
        values = np.zeros(job.numel, np.float32)
        add_values(job.deltas[number], readers, values, request.scales[number])
        matrix = values.reshape(job.deltas[0].spec.shape)
        return matrix if side == 1 else matrix.T

    wanted = range(1 + max((j for _, j in request.pairs), default=0))  # not the control
    known = [ops.respond(read(number), moment) for number in wanted]
    own = [ops.covariance_sq(one, one) for one in known]
    width, count = moment.active.shape
    vectors: list[Row] = [
        {"energy": one.energy, "inside": one.inside, "chance": count / width,
         "output": one.output, "white": one.energy * moment.trace / width}
        for one in known
    ]  # fmt: skip
    pairs: list[Row] = [
        {"product": ops.inner(known[i].image, known[j].matrix), "output_a": known[i].output,
         "output_b": known[j].output, "shared": ops.covariance_sq(known[i], known[j]),
         "own": (own[i] * own[j]) ** 0.5}
        for i, j in request.pairs
    ]  # fmt: skip
    return vectors, pairs
