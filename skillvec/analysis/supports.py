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
from skillvec.analysis.support_rows import Clusters, by_chance, sizes_of
from skillvec.ops.strata import Strata

F64Array = npt.NDArray[np.float64]


def support_terms(
    numel: Any, in_a: Any, in_b: Any, strata: Sequence[Strata | None], is_thresholded: bool
) -> dict[str, F64Array]:
    """Return of each tensor what adds up over tensors: chance by tensor, and by strata in it.

    With `is_thresholded`, tensors that lack them have no chance level: rounding decided there.
    """
    chance, spread = by_chance(numel, in_a, in_b)
    found = {"chance": chance, "chance_var": spread, "chance_weights": chance.copy(),
             "weights_var": spread.copy(), "by_weight": np.zeros(chance.shape),
             "unknown": np.where(is_thresholded & (spread > 0), 1.0, 0.0)}  # fmt: skip
    for i, held in enumerate(strata):
        if held is not None:
            sums = (part.sum() for part in by_chance(*sizes_of(held.counts)))
            found["chance_weights"][i], found["weights_var"][i] = sums
            found["by_weight"][i], found["unknown"][i] = 1, 0
    return found


def support_row(sums: Mapping[str, Any], clusters: Clusters | None = None) -> Row:
    """Return how two supports overlap, and how signs agree where they do, from summed terms.

    `clusters` is what structure of rows and columns was found.
    """
    shared, chance, expected = (float(sums[key]) for key in ("shared", "chance", "chance_weights"))
    cells = np.array([sums["weights_var"], shared], np.float64)
    spread = cells if clusters is None else clusters.variances(cells)
    is_known = not sums["unknown"]
    by_weight = is_known and bool(sums["by_weight"])
    overlap_z = _over(shared - expected, spread[0]) if cells[0] > 0 and is_known else None
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
