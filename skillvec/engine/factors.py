"""Looking at whole matrices before a run: what operators such as spectral and project take out.

One matrix is in memory for each worker at a time (of experts, one expert's), or the inputs of a
module with the matrices that share them one after the other. What is found goes to a scratch file,
so that no rank fills the memory. What a tensor's delta is afterwards depends on its matrix alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from math import prod
from typing import Any

import numpy as np

from skillvec.checkpoints.input_moments import read_part
from skillvec.engine.matrix_workers import at_once_nbytes, in_turn
from skillvec.engine.plan import Plan
from skillvec.errors import IncompatibleError
from skillvec.files.scratch import Scratch
from skillvec.ops.activations import find_directions
from skillvec.ops.kernels import Array
from skillvec.ops.low_rank import Product, working_nbytes
from skillvec.report import Watcher
from skillvec.vectors.deltas.base import DeltaSource, pieces_of
from skillvec.vectors.deltas.low_rank import Factors, LowRankDelta, low_rank_in
from skillvec.vectors.reader import BlockReader, readers_of

READING_NBYTES = 32 << 20  # a worker: values of a block in fp64, and the product beside them
Group = list[LowRankDelta]  # that share their inputs, or one alone


def find_factors(plan: Plan, at_once: int, watcher: Watcher | None) -> Plan:
    """Return the plan with what its deltas have to know of whole matrices, `at_once` at a time."""
    groups = _grouped(plan)
    if not groups:
        return plan
    scratch, readers = Scratch(), readers_of(plan.vectors)
    total, done = sum(delta.nbytes for group in groups for delta in group), 0
    known: dict[Any, Factors] = {}

    def work(group: Group) -> list[Factors]:
        subspace = group[0].subspace
        directions = None
        if subspace is not None:
            second = read_part(subspace.second)
            directions = find_directions(second, group[0].rank, group[0].energy)
        return [
            Factors(scratch, tuple(_products(delta, directions, readers, scratch)))
            for delta in group
        ]

    with closing(in_turn(work, groups, _nbytes_of, at_once)) as found:
        for group, factors in zip(groups, found, strict=True):
            known |= {delta.wanted: kept for delta, kept in zip(group, factors, strict=True)}
            done += sum(delta.nbytes for delta in group)
            if watcher:
                watcher.advanced(done, total)
    return plan.informed(known)


def factors_nbytes(plan: Plan, at_once: int) -> int:
    """Return the most memory that whole matrices and their products take, in bytes."""
    sizes = [_nbytes_of(group) for group in _grouped(plan)]
    return at_once_nbytes(sizes, at_once) + at_once * READING_NBYTES if sizes else 0


def _grouped(plan: Plan) -> list[Group]:
    """Return what has to be looked at, each once; matrices that share their inputs together."""
    deltas = low_rank_in(delta for job in plan.jobs for delta in job.deltas)
    groups: dict[Any, Group] = {}
    for wanted, delta in {delta.wanted: delta for delta in deltas}.items():
        inputs = delta.subspace and (delta.subspace.second, delta.rank, delta.energy)
        groups.setdefault(inputs or wanted, []).append(delta)
    return list(groups.values())


def _nbytes_of(group: Group) -> int:
    """Return the size of the largest matrix, over the copies of `matrix_workers`."""
    if (subspace := group[0].subspace) is not None:  # C, its double, eigenvectors, work space
        return 12 * subspace.second.numel + 8 * max(prod(delta.shape) for delta in group)
    (delta,) = group
    itemsize = 8 if delta.source.dtype == "F64" else 4
    return working_nbytes(delta.shape, 0 if delta.energy else delta.rank, itemsize)


def _products(
    delta: LowRankDelta, directions: Array | None, readers: Mapping[str, BlockReader],
    scratch: Scratch,
) -> Iterator[Product]:  # fmt: skip
    """Yield the product of each matrix of a delta, put into the scratch file."""
    # where values without a finite difference are not met again, they are refused now
    lost: dict[str, int] | None = {} if delta.is_read_again else None
    for matrix in _matrices(delta.source, delta.shape, readers, lost):
        try:
            found = delta.find(matrix, directions)
        except IncompatibleError as error:
            raise type(error)(f"{delta.spec.name}: {error}") from None
        if found.left is not None:
            left, right = (
                scratch.add(np.ascontiguousarray(side).view(np.uint8).reshape(-1).data)
                for side in (found.left, found.right)
            )
            found = found._replace(left=left, right=right)
        yield found


def _matrices(
    source: DeltaSource, shape: tuple[int, int], readers: Mapping[str, BlockReader],
    lost: dict[str, int] | None,
) -> Iterator[Array]:  # fmt: skip
    """Yield the matrices of a delta, one at a time; `lost` as `pieces_of` takes it."""
    numel, at = prod(shape), 0
    held = np.empty(numel, np.float64 if source.dtype == "F64" else np.float32)
    for _, values in pieces_of(source, readers, lost):
        while values.size:
            count = min(values.size, numel - at)
            held[at : at + count] = values[:count]
            at, values = at + count, values[count:]
            if at == numel:
                yield held.reshape(shape)
                at = 0
