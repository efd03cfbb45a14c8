"""The structure of supports of pairs, found in the second pass over rows: whole rows, channels.

Of pairs whose supports are sparse in a tensor: overlap says nothing where almost all values change.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from skillvec.analysis.levels import Place, places_of
from skillvec.analysis.support_rows import Clusters, RowScores
from skillvec.engine.plan import JobResult
from skillvec.ops.kernels import Array
from skillvec.ops.statistics import Request, layout
from skillvec.ops.strata import Strata
from skillvec.verbs.row_pass import Tensor

DENSE = 15 / 16  # of the values, of which more are not looked at


class PairSupports:
    """The scores of those pairs of one tensor that are sparse in it."""

    def __init__(self, tensor: Tensor, result: JobResult, request: Request) -> None:
        self._tensor, self._pairs = tensor, request.pairs
        self._strata: dict[int, Strata] = result.found or {}
        self._plain = _find_sparse(result, request)
        self._scores: dict[int, RowScores] = {}

    @property
    def wants_weights(self) -> bool:
        """Whether a pair has strata."""
        return any(n in self._strata for n in self._plain)

    def add(self, first: int, deltas: Sequence[Array], weights: Sequence[Array] | None) -> None:
        """Take the rows from `first` on."""
        for n, plain in self._plain.items():
            i, j = self._pairs[n]
            strata = self._strata.get(n) if weights is not None else None
            held = weights[j] if weights is not None and strata is not None else None
            if n not in self._scores:
                self._scores[n] = RowScores(self._tensor.seen, strata or plain)
            self._scores[n].add(first, deltas[i], deltas[j], held, self._dtype_of(j))

    def _dtype_of(self, j: int) -> str:
        job = self._tensor.job
        pair = job.deltas[j].pair
        return job.point.dtype if job.point else pair.base.dtype if pair else "F32"

    def clusters(self) -> dict[int, Clusters]:
        """Return what was found of each pair by its number."""
        return {n: scores.clusters() for n, scores in self._scores.items()}


def _find_sparse(result: JobResult, request: Request) -> dict[int, Strata]:
    """Return the counts of the pairs that are looked at, as those of one stratum."""
    sums, found = result.sums.view(layout(request))[0], {}
    for n, (i, j) in enumerate(request.pairs):
        numel, shared = result.job.numel, int(sums["pairs"]["shared"][n])
        a, b = (int(sums["vectors"]["support"][side]) for side in (i, j))
        if 0 < a <= DENSE * numel and 0 < b <= DENSE * numel:
            counts = np.array([[numel - a - b + shared, b - shared, a - shared, shared]])
            found[n] = Strata(np.zeros(1, np.uint16), counts)
    return found


class SupportTotals:
    """What is found of tensors, added up for the rows of every level, by number of the pair."""

    def __init__(self) -> None:
        self._held: dict[int, dict[Place, Clusters]] = {}

    def add(self, name: str, found: Mapping[int, Clusters]) -> None:
        """Take the pairs of one tensor."""
        for n, clusters in found.items():
            held = self._held.setdefault(n, {})
            for place in places_of(name):
                held[place] = held[place].plus(clusters) if place in held else clusters
            held["tensors", name] = clusters.closed()

    def closed(self) -> dict[int, dict[Place, Clusters]]:
        """Return all, without channels."""
        return {n: {place: one.closed() for place, one in held.items()}
                for n, held in self._held.items()}  # fmt: skip
