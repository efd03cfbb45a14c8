"""How singular subspaces, and leading parts, of matrices of one shape lie to each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from skillvec.ops.kernels import Array, F32Array
from skillvec.ops.svd import Spectrum, check_shape, settled, shares_inside

if TYPE_CHECKING:
    from torch import Tensor


class Interference(NamedTuple):
    """`raw` is in units of the weights, `relative` free of scale: raw over the sum of values."""

    raw: float
    relative: float | None


def alignment_ratio(matrix: Array, merged: Spectrum, device: str) -> float | None:
    """Return |U U'A|_F / |A|_F, U the left singular vectors of what A was merged into.

    The subspace alignment ratio of Marczak et al., arXiv 2502.04959, eq. 5. They take the smallest
    k that leaves 5 % of the merged matrix's norm outside; here k is the caller's, and chance is
    sqrt(k/m). None for a zero matrix. Raises IncompatibleError if the shapes differ.
    """
    shares = shares_inside(matrix, merged, device)
    return None if shares is None else shares[0] ** 0.5


def principal_angles(one: Spectrum, other: Spectrum) -> tuple[list[float], list[float]]:
    """Return the angles between the left and between the right subspaces, in degrees, rising.

    As many as the smaller k. Small ones are good to about 1e-5 degrees, what fp32 vectors hold.
    Raises IncompatibleError if the shapes differ.
    """
    check_shape(one.shape, other.shape)
    return _angles(one.left, other.left), _angles(one.right, other.right)


def _angles(one: F32Array, other: F32Array) -> list[float]:
    """Return angles from their cosines and sines (Bjorck and Golub 1973): each is flat somewhere.

    scipy.linalg.subspace_angles (1.17) picks between the two in the wrong order: beside an angle
    of 60 degrees, one of 1e-7 comes out as 0.
    """
    import torch

    if one.shape[1] < other.shape[1]:
        one, other = other, one
    with settled():
        a, b = (torch.from_numpy(side).double() for side in (one, other))
        inner = a.T @ b
        cosines = torch.linalg.svdvals(inner)
        sines = torch.linalg.svdvals(torch.linalg.qr(b - a @ inner, mode="r").R).flip(0)
        return [float(angle) for angle in torch.rad2deg(torch.arctan2(sines, cosines))]


def interference(spectra: Sequence[Spectrum]) -> Interference:
    """Return the singular task interference |(U'U - I) S (V'V - I)|_1 of several deltas.

    Gargiulo et al., Task Singular Vectors, arXiv 2412.00081: U = [U_1 .. U_T], V likewise, S block
    diagonal; the sum of the entries' magnitudes, not normalised. `relative` divides by the sum of
    all values: 0 where the left or the right subspaces are orthogonal, 1 for two deltas with the
    same singular vectors, about .8 k^1.5 / sqrt(mn) for two by chance, above 1 where many vectors
    mix, None if all deltas are zero. Raises IncompatibleError if the shapes differ.
    """
    for spectrum in spectra:
        check_shape(spectrum.shape, spectra[0].shape)
    import torch

    values = torch.from_numpy(np.concatenate([spectrum.values for spectrum in spectra]))
    with settled():
        left, right = (
            torch.from_numpy(np.hstack(sides)).double()
            for sides in ([s.left for s in spectra], [s.right for s in spectra])
        )
        unit = torch.eye(len(values), dtype=torch.float64)
        product = (left.T @ left - unit) * values @ (right.T @ right - unit)
        raw, scale = float(product.abs().sum()), float(values.sum())
    return Interference(raw, raw / scale if scale else None)


def leading(spectrum: Spectrum, kept: int, like: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Return L and R with L R' the leading part of a matrix."""
    left = spectrum.left[:, :kept] * spectrum.values[:kept]
    return like.new_tensor(left), like.new_tensor(spectrum.right[:, :kept])


def part_product(matrix: Array, spectrum: Spectrum, kept: int, device: str) -> float:
    """Return the inner product of a matrix with the leading part of another."""
    import torch

    with settled():
        values = torch.from_numpy(matrix).to(device)
        left, right = leading(spectrum, kept, values)
        return float(((values.T @ left).double() * right.double()).sum())


def both_parts(one: Spectrum, other: Spectrum, kept: tuple[int, int]) -> float:
    """Return the inner product of the leading parts of two matrices."""
    import torch

    with settled():
        like = torch.zeros(0, dtype=torch.float64)
        (a, b), (c, d) = leading(one, kept[0], like), leading(other, kept[1], like)
        return float(((a.T @ c) * (b.T @ d)).sum())
