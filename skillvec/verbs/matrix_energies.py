"""What operators on whole matrices have kept of each, as a report tells it."""

from collections.abc import Sequence

from skillvec.engine.plan import Job, Plan
from skillvec.report import Report
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.deltas.factored import StackDelta
from skillvec.vectors.deltas.low_rank import LowRankDelta
from skillvec.vectors.deltas.mix import MixDelta


def tell_energies(report: Report, plan: Plan) -> None:
    """Add to a report ranks and kept shares of the squared norm, of matrices that were taken apart.

    In lines of the ledger, `ranks` and `kept_energies` have an item a vector, the rank being the
    largest of the tensor's matrices; None where the tensor was taken as it is. The facts have the
    shares of all such matrices, by vector. Where parts are given the norm of the matrix again, the
    shares are those before.
    """
    lines = {line["name"]: line for line in report.ledger}
    sums: dict[int, list[float]] = {}
    ranks: list[int] = []
    tensors = 0
    for job in plan.jobs:
        for made in job.deltas:
            sources = made.parts if isinstance(made, MixDelta | StackDelta) else ()
            told = [_tell(source) for source in sources]
            if not any(told):
                continue
            tensors += 1
            for number, found in enumerate(told):
                if found is not None:
                    ranks.append(found[0])
                    held = sums.setdefault(number, [0.0, 0.0])
                    held[0], held[1] = held[0] + found[1], held[1] + found[2]
            lines[job.name] |= {
                "ranks": [found and found[0] for found in told],
                "kept_energies": [found and _share(found[1], found[2]) for found in told],
            }
    if tensors:
        report.facts["matrices"] = {
            "tensors": tensors, "least_rank": min(ranks), "most_rank": max(ranks),
            "kept_energy": [_share(*sums[number]) for number in sorted(sums)],
        }  # fmt: skip


def share_kept(jobs: Sequence[Job]) -> float | None:
    """Return the share of the squared norm that factors keep of the matrices they stand for.

    None where none were found now.
    """
    told = [_tell(d.source) for job in jobs for d in job.deltas if isinstance(d, StackDelta)]
    found = [one for one in told if one is not None]
    return _share(sum(kept for _, kept, _ in found), sum(norm_sq for *_, norm_sq in found))


def _tell(source: DeltaSource) -> tuple[int, float, float] | None:
    """Return the largest rank, and squared norms: what is kept, and of all."""
    if not isinstance(source, LowRankDelta) or source.known is None:
        return None
    matrices = source.known.products
    rank = max((one.rank for one in matrices), default=0)
    norm_sq, rest_sq = sum(one.norm_sq for one in matrices), sum(one.rest_sq for one in matrices)
    return rank, norm_sq - rest_sq if source.inside else rest_sq, norm_sq


def _share(kept: float, norm_sq: float) -> float | None:
    return kept / norm_sq if norm_sq else None
