"""What two supports say of each other: values changed by both, beside what chance would share.

Chance is drawn within strata: a change survives rounding to 16 bits where it is large beside the
step at its weight, so two updates of one base share more than their densities explain. Each
exponent of the weights is a stratum of a tensor, or the tensor is one where weights are not known.
"""

from collections.abc import Mapping, Sequence
from math import erfc, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from skillvec.analysis.angle_report import Row
from skillvec.ops.strata import Strata

F64Array = npt.NDArray[np.float64]


@np.errstate(all="ignore")
def by_chance(size: Any, in_a: Any, in_b: Any) -> tuple[F64Array, F64Array]:
    """Return mean and variance of how many of `in_a` and `in_b` of `size` values are the same.

    The hypergeometric law, elementwise.
    """
    size, in_a, in_b = (np.asarray(count, np.float64) for count in (size, in_a, in_b))
    mean = np.where(size > 0, in_a * in_b / size, 0.0)
    spread = mean * (size - in_a) * (size - in_b) / (size * (size - 1))
    return mean, np.where(size > 1, spread, 0.0)


def sizes_of(counts: npt.NDArray[Any]) -> tuple[F64Array, F64Array, F64Array]:
    """Return values, values that a changes and values that b changes from counts (.., 4)."""
    _, b, a, both = np.moveaxis(counts.astype(np.float64), -1, 0)
    return counts.sum(axis=-1).astype(np.float64), a + both, b + both


def support_terms(
    numel: Any, in_a: Any, in_b: Any, strata: Sequence[Strata | None]
) -> dict[str, F64Array]:
    """Return of each tensor what adds up over tensors: chance by tensor, and by strata in it."""
    chance, spread = by_chance(numel, in_a, in_b)
    found = {"chance": chance, "chance_var": spread, "chance_weights": chance.copy(),
             "weights_var": spread.copy(), "by_weight": np.zeros(chance.shape)}  # fmt: skip
    for i, held in enumerate(strata):
        if held is not None:
            sums = (part.sum() for part in by_chance(*sizes_of(held.counts)))
            found["chance_weights"][i], found["weights_var"][i] = sums
            found["by_weight"][i] = 1
    return found


def support_row(sums: Mapping[str, Any], variances: npt.NDArray[Any] | None = None) -> Row:
    """Return how two supports overlap, and how signs agree where they do, from summed terms.

    `variances` of overlap and signs are those that the structure of rows and columns gives.
    """
    shared, chance, expected = (float(sums[k]) for k in ("shared", "chance", "chance_weights"))
    cells = float(sums["weights_var"]), shared
    spread = cells if variances is None else tuple(map(float, variances))
    by_weight = bool(sums["by_weight"])
    overlap_z = _over(shared - expected, spread[0]) if cells[0] > 0 else None
    balance = 2 * float(sums["agree"]) - shared
    return {
        "lift": shared / chance if chance > 0 else None,
        "lift_weights": shared / expected if by_weight and expected > 0 else None,
        "overlap_z": overlap_z,
        "p_overlap": None if overlap_z is None else erfc(abs(overlap_z) / sqrt(2)),
        "overlap_z_weights": _over(shared - expected, cells[0]) if by_weight else None,
        "overlap_z_plain": _over(shared - chance, sums["chance_var"]),
        "sign_agreement": float(sums["agree"]) / shared if shared else None,
        "sign_z": _over(balance, spread[1]),
        "sign_z_plain": _over(balance, shared),
    }


def _over(excess: float, variance: float) -> float | None:
    return excess / sqrt(variance) if variance > 0 else None
