"""How many singular values of a delta stand clear of its noise.

The edge of the noise is measured: with the signs of all entries drawn anew a matrix keeps zero
rows, sparse supports and unequal magnitudes, and loses what has low rank (Hong, Sheng and Dobriban
2023, arXiv 2012.02985). For entries of one variance that edge is Marchenko and Pastur's,
sigma (sqrt(m) + sqrt(n)); a spike has to be as far above it as the threshold of Gavish and Donoho
2014 (arXiv 1305.5870) is: their estimate of sigma by the median takes zero rows and sparse or
unequal entries for spikes.
"""

from math import frexp, sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from skillvec.ops.kernels import Array
from skillvec.ops.philox import draw_uint32
from skillvec.ops.svd import PIECE, Spectrum, settled
from skillvec.verbs.relations import leading

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 8  # strong spikes hide weak ones until they are taken out
DRAWN = 64  # of a smaller matrix the edge varies: the largest of this over its short side
PASSES, WIDTH = 10, 8  # of the Krylov space in which the edge is found


class Spikes(NamedTuple):
    """The singular values above the noise: how many, how many of them with vectors, energies."""

    number: int
    kept: int  # with vectors at hand: at most K
    energy: float
    kept_energy: float


def find_spikes(matrix: Array, spectrum: Spectrum, device: str, seed: int) -> Spikes:
    """Count the singular values above the noise, strong ones first, until no more come to light."""
    count = kept = 0
    draws = max(1, DRAWN // min(matrix.shape))
    for number in range(ROUNDS if spectrum.norm_sq else 0):
        keys = (f"{seed}:spikes:{number}:{draw}" for draw in range(draws))
        edge = max(noise_edge(matrix, spectrum, kept, device, key) for key in keys)
        found = int(np.count_nonzero(spectrum.every > margin(matrix.shape) * edge))
        if found <= count:
            break
        count, kept = found, min(found, spectrum.values.size)
    squares = spectrum.every**2
    return Spikes(count, kept, float(squares[:count].sum()), float(squares[:kept].sum()))


def margin(shape: tuple[int, ...]) -> float:
    """Return Gavish and Donoho's threshold over the edge: 1.15 of square matrices, to 1.41."""
    ratio = min(shape) / max(shape)
    root = sqrt(ratio * ratio + 14 * ratio + 1)
    return sqrt(2 * (ratio + 1) + 8 * ratio / (ratio + 1 + root)) / (1 + sqrt(ratio))


def noise_edge(matrix: Array, spectrum: Spectrum, kept: int, device: str, key: str) -> float:
    """Return the largest singular value of a matrix without its leading part, signs drawn anew.

    By a block Krylov space of a random start, from below; of values near 1, whose squares fit fp32.
    """
    import torch

    m, n = matrix.shape
    scale = 2.0 ** -max(-120, min(120, frexp(float(spectrum.every.max()))[1]))
    with settled():
        rest = torch.from_numpy(matrix).to(device, copy=True)
        left, right = leading(spectrum, kept, rest)
        rows = max(1, PIECE // n // 32 * 32)
        for at in range(0, m, rows):
            part = rest[at : at + rows]
            part -= left[at : at + rows] @ right.T
            bits = draw_uint32(key, at * n // 32, -(-part.numel() // 32)).view(np.uint8)
            signs = np.unpackbits(bits, count=part.numel()).reshape(part.shape)
            part *= scale * (1 - 2 * torch.from_numpy(signs.view(np.int8)).to(device))
        random = np.random.Generator(np.random.Philox(key=0))
        start = random.standard_normal((n, min(WIDTH, n)), dtype=np.float32)
        return _norm(rest, rest.new_tensor(start)) / scale


def _norm(matrix: "Tensor", block: "Tensor") -> float:
    """Return the largest singular value in the Krylov space of a block: at most the true one."""
    import torch

    basis = block.new_empty((block.shape[0], 0))
    for _ in range(max(1, min(PASSES, block.shape[0] // block.shape[1]))):
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block).Q
        basis = torch.cat([basis, block], dim=1)
        block = matrix.T @ (matrix @ block)
    image = (matrix @ basis).double()
    largest = float(torch.linalg.eigvalsh(image.T @ image)[-1])
    return sqrt(max(0.0, largest))
