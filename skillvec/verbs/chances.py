"""What chance makes of the inner products of pairs, at every level, by a second pass over the rows.

The rows of every tensor are read again after the run that gave the sums; `analysis.spreads`
says what is made of them.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

from skillvec.analysis.levels import Place, places_of
from skillvec.analysis.spreads import (
    Seen,
    Spread,
    SpreadSums,
    Totals,
    Variances,
    draw_signs,
    hidden_size,
    see,
)
from skillvec.analysis.support_rows import Clusters
from skillvec.engine.matrix_workers import at_once_nbytes
from skillvec.engine.plan import JobResult, Plan
from skillvec.ops.kernels import Array
from skillvec.report import Watcher
from skillvec.verbs.row_pass import Tensor, arrays_held, held_nbytes, measure_rows, view_tensor
from skillvec.verbs.support_pass import PairSupports, SupportTotals

Pair = tuple[int, int]
Supports = dict[int, dict[Place, Clusters]]  # by number of the pair


class _PairSpreads:
    """The spreads of all pairs in one tensor, and the structure of their supports."""

    def __init__(
        self, tensor: Tensor, seed: int, pairs: Sequence[Pair], supports: PairSupports
    ) -> None:
        self.supports, self.wants_weights = supports, supports.wants_weights
        signs = [_signs(f"{seed}:sketch", axis.size) for axis in tensor.seen.axes]
        self._tensor, self._pairs = tensor, pairs
        self._sums = SpreadSums(tensor.seen, signs, pairs)

    def add(self, first: int, deltas: Sequence[Array], weights: Sequence[Array] | None) -> None:
        self._sums.add(first, deltas)
        self.supports.add(first, deltas, weights)

    def spreads(self) -> list[Spread]:
        factors = self._tensor.factors
        return [self._sums.spread(n, 1 / (factors[i] * factors[j]))
                for n, (i, j) in enumerate(self._pairs)]  # fmt: skip


_signs = cache(draw_signs)


def _tensor_views(plan: Plan) -> dict[str, Seen]:
    """Return how the rows of each tensor of a plan lie, by name; those without values are left."""
    shapes = {job.name: job.deltas[0].spec.shape for job in plan.jobs if job.numel}
    hidden = hidden_size(shapes.values())
    return {name: see(shape, hidden) for name, shape in shapes.items()}


def rows_nbytes(plan: Plan, at_once: int) -> int:
    """Return the memory that `find_spreads` takes, in bytes."""
    assert plan.request is not None
    if not plan.request.pairs:
        return 0
    count = arrays_held(plan.request)
    return at_once_nbytes([held_nbytes(s, count) for s in _tensor_views(plan).values()], at_once)


def find_spreads(
    results: Sequence[JobResult], plan: Plan, redrawn: bool, at_once: int, watcher: Watcher | None
) -> tuple[dict[Pair, dict[Place, Variances]], Supports]:
    """Return the variances of each pair and control of the plan, for the rows of every level.

    And the structure of the supports of each pair, by its number.
    With `redrawn` also the product of the first of a pair with the signs of its channels drawn
    anew, the same for all tensors. `at_once` tensors are at work, `watcher` is told of them.
    """
    assert plan.request is not None
    request, views = plan.request, _tensor_views(plan)
    tensors = [view_tensor(result, request, views[result.job.name])
               for result in results if result.job.numel]  # fmt: skip
    pairs = list(dict.fromkeys([*request.pairs, *request.controls]))
    totals: dict[Pair, dict[Place, Totals]] = {pair: defaultdict(Totals) for pair in pairs}
    found: dict[Pair, dict[Place, Variances]] = {pair: {} for pair in pairs}

    by_name, supports = {result.job.name: result for result in results}, SupportTotals()

    def make(tensor: Tensor) -> _PairSpreads:
        scores = PairSupports(tensor, by_name[tensor.job.name], request)
        return _PairSpreads(tensor, request.seed, pairs, scores)

    for tensor, sums in zip(
        tensors, measure_rows(tensors, plan, make, at_once, watcher), strict=True
    ):
        name, places = tensor.job.name, places_of(tensor.job.name)
        supports.add(name, sums.supports.clusters())
        for pair, spread in zip(pairs, sums.spreads(), strict=True):
            signs = None
            if redrawn:
                of = "" if spread.is_shared else name
                signs = _signs(f"{request.seed}:control:{of}", spread.channels.size)
            alone = Totals()
            for total in (alone, *(totals[pair][place] for place in places)):
                total.add(spread, signs)
            found[pair]["tensors", name] = alone.variances()
    for pair, held in totals.items():
        found[pair] |= {place: total.variances() for place, total in held.items()}
    return found, supports.closed()
