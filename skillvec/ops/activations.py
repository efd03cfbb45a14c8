"""What an update of a weight does to its outputs, from the second moments of its inputs.

W is m x n and acts on inputs x of n values, of which C = E[x x'] and the mean are known: then
E[(A x)'(B x)] = tr(A C B'), and no input is needed again. On any torch device, in fp32, with sums
in fp64; the caller holds `svd.settled`. A layer that keeps its weight as n x m hands in W'.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from skillvec.errors import needs
from skillvec.ops.kernels import Array
from skillvec.ops.svd import resolve_device

if TYPE_CHECKING:
    from torch import Tensor

ACTIVE = 0.9  # of the trace of C, which its active subspace holds


class Moment(NamedTuple):
    """C = E[x x'], the covariance K of x, and the leading eigenvectors of C that hold ACTIVE of it.

    Eigenvalues that are negative are rounding, and hold nothing.
    """

    second: "Tensor"  # n x n
    covariance: "Tensor"  # n x n
    active: "Tensor"  # n x k
    trace: float


class Response(NamedTuple):
    """An update A of a weight and what it does: |A|^2, |A|^2 in the active subspace, E|A x|^2."""

    matrix: "Tensor"  # m x n
    image: "Tensor"  # A C
    spread: "Tensor"  # A'A K, n x n, or A K, m x n, where m < n
    energy: float
    inside: float
    output: float


def find_moment(second: Array, mean: Array, device: str) -> Moment:
    """Return what is wanted of C (n x n) and E[x] (n values), both fp32."""
    with needs("torch", "comparing outputs"):
        import torch

    full, middle = (torch.from_numpy(side).to(resolve_device(device)) for side in (second, mean))
    values, vectors = torch.linalg.eigh(full)
    count, trace = _holding(values, ACTIVE)
    return Moment(full, full - torch.outer(middle, middle), vectors[:, -count:], trace)


def find_directions(second: Array, rank: int, energy: float) -> Array:
    """Return the leading eigenvectors of C (n x n, fp32) as columns, in fp64: `rank`, or n.

    With an `energy` above 0 the fewest that hold this share of its trace; all for a share of 1.
    """
    with needs("torch", "the directions of inputs"):
        import torch

    values, vectors = torch.linalg.eigh(torch.from_numpy(second).double())
    count = min(rank, len(values)) if not energy else _holding(values, energy)[0]
    count = len(values) if energy == 1 else count
    found: Array = np.ascontiguousarray(vectors[:, len(values) - count :].numpy())
    return found


def _holding(values: "Tensor", share: float) -> tuple[int, float]:
    """Return how many of the largest eigenvalues hold a share of their sum, and the sum."""
    held = values.clamp(min=0).double().flip(0).cumsum(0)
    return int((held < share * held[-1]).sum()) + 1, float(held[-1])


def respond(matrix: Array, moment: Moment) -> Response:
    """Return what an update (m x n, fp32) of a weight does to its outputs."""
    values = moment.second.new_tensor(np.ascontiguousarray(matrix))
    left = values if values.shape[0] < values.shape[1] else values.T @ values
    image, inside = values @ moment.second, values @ moment.active
    sums = inner(values, values), inner(inside, inside), inner(image, values)
    return Response(values, image, left @ moment.covariance, *sums)


def inner(one: "Tensor", other: "Tensor") -> float:
    """Return the sum of the products of two matrices' entries, added in fp64."""
    return float((one * other).double().sum())


def covariance_sq(one: Response, other: Response) -> float:
    """Return |cov(A x, B x)|^2 = |A K B'|^2, which is HSIC of linear kernels.

    Linear CKA is this over the root of the same of A with A and of B with B (Kornblith et al.,
    Similarity of Neural Network Representations Revisited, arXiv 1905.00414).
    """
    if one.matrix.shape[0] < one.matrix.shape[1]:
        crossed = one.spread @ other.matrix.T
        return inner(crossed, crossed)
    return inner(one.spread, other.spread.T)
