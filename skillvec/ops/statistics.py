"""What the blocks of several deltas tell of each other: sums that add up over blocks and tensors.

Pure functions on numpy blocks, no paths, no threads. Every value is in every sum, in the order of
`lanes`. docs/orthogonality.md says what becomes of the sums.
"""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops import comparison
from skillvec.ops.comparison import STEP_EDGES, Compared, Weights
from skillvec.ops.delta import Delta
from skillvec.ops.lanes import GROUP, Sums

# of a vector: square, support, kept_dot, kept_sq, absorbed, step_sq, then
VECTOR = (*comparison.VECTOR, "moved")  # the support where the weights are known, else 0
PAIR = ("product", "groups_sq", "shared", "agree", "met_a", "met_b", "clash_a", "clash_b")
CONTROL = ("product", "groups_sq")


class Request(NamedTuple):
    """What is measured in one pass over deltas, each taken times its factor in `scales`.

    `pairs` are compared in everything; `controls` (i, j), none or one for each pair, in their angle
    alone.
    """

    scales: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    controls: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    by_weight: tuple[int, ...] = ()


@cache
def layout(request: Request) -> np.dtype[np.void]:
    """Return the structured dtype of the sums, all float64: counts are exact to 2^53."""
    vector = [(name, "f8") for name in comparison.VECTOR]
    steps = ("steps", "f8", len(STEP_EDGES) + 1)
    return np.dtype(
        [
            ("vectors", [*vector, steps, ("moved", "f8")], (len(request.scales),)),
            ("pairs", [(name, "f8") for name in PAIR], (len(request.pairs),)),
            ("controls", [(name, "f8") for name in CONTROL], (len(request.controls),)),
        ]
    )


def group_width(numel: int) -> int:
    """Return how many neighbours make a group: a power of two, 1,024 groups or more if it can."""
    return 1 if numel < 2 * GROUP else min(GROUP, 1 << (numel // GROUP).bit_length() - 1)


@np.errstate(over="ignore", invalid="ignore")  # sums that leave fp64 are None in the end
def block_sums(sides: Iterable[tuple[Delta, Weights | None]], request: Request, numel: int) -> Sums:
    """Return the sums of `layout` over one block of a tensor of `numel` values, flat.

    All deltas are of one length. Beside each are the weights that it is a change of, or None where
    they are not known; they are not looked at again when the next delta is taken.
    """
    record = np.zeros(1, layout(request))
    vectors, pairs, controls = (record[key][0] for key in ("vectors", "pairs", "controls"))
    compared = {i for pair in request.pairs for i in pair}
    deltas: list[Delta] = []
    for i, (unscaled, weights) in enumerate(sides):
        deltas.append(delta := _scaled(unscaled, request.scales[i]))
        if weights is not None or i not in compared:
            _add_vector(vectors[i : i + 1], comparison.compare_weights(delta, weights))
            vectors["moved"][i] = 0 if weights is None else vectors["support"][i]
    width = group_width(numel)
    for n, (i, j) in enumerate(request.pairs):
        found = comparison.compare_pair(deltas[i], deltas[j], width)
        _add_pair(pairs[n : n + 1], vectors, i, j, found)
    for n, (i, j) in enumerate(request.controls):
        controls[n] = tuple(comparison.compare_pair(deltas[i], deltas[j], width).sums[:2])
    return record.view(np.float64)


def _add_vector(vector: npt.NDArray[np.void], sums: Sums) -> None:
    vector.view(np.float64)[: sums.size] = sums


def _add_pair(
    pair: npt.NDArray[np.void], vectors: npt.NDArray[np.void], i: int, j: int, found: Compared
) -> None:
    """Put the sums of a pair to their places, among them those of either vector alone."""
    sums = dict(zip(comparison.PAIR, found.sums.tolist(), strict=True))
    for side, place in (("a", i), ("b", j)):
        vectors["square"][place] = sums[f"square_{side}"]
        vectors["support"][place] = sums[f"support_{side}"]
    sums["agree"] = sums["shared"] - sums["opposed"]
    pair[0] = tuple(sums[key] for key in PAIR)


def _scaled(delta: Delta, factor: float) -> Delta:
    if factor == 1:
        return delta
    values = delta.wide(0, delta.values.size) * np.float64(factor)
    return Delta(values, "F64")
