"""Singular subspaces of deltas: one matrix at a time, on any torch device.

Hides how the leading singular triplets and the effective rank of an m x n matrix are found: from
its whole spectrum while min(m, n) <= EXACT, by a block Krylov method beyond, where no m x m or
n x n array is built and at most about 24 (m + n) (k + 8) values stand beside the matrix.

The same matrix, seed and device give the same numbers. On the processor each matrix has one thread,
since LAPACK adds in another order with more of them (`matrix_workers` has several at work at a
time). A seed means the same random numbers on every device. Sums of squares are added in fp64, and
fp32 products are never rounded to TF32 or bf16. Refused: devices that are not here, values that are
not finite, shapes that do not fit. A zero matrix is no error: it has no triplets, and shares of it
are None. Where an SVD fails or gives values that are not finite, other drivers take its place.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.errors import IncompatibleError, UsageError, needs
from skillvec.ops.kernels import Array, F32Array

if TYPE_CHECKING:
    from torch import Tensor


F64Array = npt.NDArray[np.float64]
EXACT = 1024  # .3 s on two cores, and as the cube: 1.8 s at 2048
OVERSAMPLING = 8
FIRST_RANK = 16  # tried for an energy, then doubled
PASSES = (12, 16, 20, 24)  # when to look whether to stop; effective ranks want 12
TOLERANCE = 1e-3  # of residuals, over the largest value
PIECE = 1 << 20  # values turned to fp64 at a time


class Spectrum(NamedTuple):
    """The leading singular triplets of a matrix, and measures of its rank.

    k is at most min(m, n) and the numerical rank: values below eps sqrt(max(m, n)) of the largest,
    eps that of fp32, are rounding and their vectors mean nothing. Values fall, and none is above
    the true one beyond rounding.

    `error` is measured: max_i |A' u_i - s_i v_i| / s_1, where A v_i = s_i u_i up to rounding. So
    each s_i is within error s_1 of a singular value of A (Weyl), and the sine of the angle between
    v_i and its true space is at most about error s_1 / gap, the gap to the other values (Wedin). A
    flat spectrum has small gaps: there single vectors say little however small the error.

    `effective_rank_error` is 0 if exact, else the hypotenuse of a standard error (jackknife over
    the random probes) and of the change over the second half of the passes (quadrature).
    """

    left: F32Array  # m x k, orthonormal columns
    values: F64Array  # k
    right: F32Array  # n x k, orthonormal columns
    shape: tuple[int, int]
    norm_sq: float
    error: float
    exact: bool
    stable_rank: float  # |A|_F^2 / s_1^2; 0 for a zero matrix
    effective_rank: float  # exp(entropy of s / sum s), Roy and Vetterli, EUSIPCO 2007; 0 for zero
    effective_rank_error: float
    every: F64Array  # singular values: all if exact, else what the Krylov space has, none too large


def resolve_device(device: str) -> str:
    """Return "cpu" or "cuda:N" for auto, cpu, cuda or cuda:N; raise UsageError if it is not here.

    auto is the first CUDA device, if there is one. UsageError too where torch is missing.
    """
    with needs("torch", "taking singular values"):
        import torch

    word, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (word == "cuda" and number.isdecimal()):
        raise UsageError(f"device {device!r}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return "cpu"
    if int(number or 0) >= count:
        raise UsageError(f"device {device!r}: torch finds {count} CUDA devices; cpu works anywhere")
    return f"cuda:{int(number or 0)}"


def decompose(matrix: Array, k: int, device: str, seed: int) -> Spectrum:
    """Return the k leading singular triplets and the ranks of an m x n matrix.

    float64 is worked on as it is, all else as float32. Raises UsageError for k < 1 and
    IncompatibleError for values that are not finite.
    """
    if k < 1:
        raise UsageError(f"k = {k}, expected at least 1")
    m, n = matrix.shape
    with settled():
        tall = _load(matrix, device)
        norm_sq = _squared(tall)
        if not np.isfinite(norm_sq):
            raise IncompatibleError(f"a matrix of {m} x {n} values holds NaN or infinities")
        if norm_sq == 0:
            none = np.zeros((m, 0), np.float32), np.zeros(0), np.zeros((n, 0), np.float32)
            return Spectrum(*none, (m, n), 0.0, 0.0, True, 0.0, 0.0, 0.0, none[1])
        tall = tall if m >= n else tall.T
        exact = is_whole((m, n), k)
        left, every, right, rank = _whole(tall, k) if exact else _krylov(tall, k, seed, norm_sq)
        values = every[: left.shape[1]]
        noise = values[0] * float(np.finfo(np.float32).eps) * max(m, n) ** 0.5
        keep = int(np.count_nonzero(values > noise))
        left, values, right = left[:, :keep], values[:keep], right[:, :keep]
        residual = tall.T @ left - right * right.new_tensor(values)
        error = float(residual.double().norm(dim=0).max()) / float(values[0])
    sides = _host(left), _host(right)
    one, other = sides if m >= n else sides[::-1]
    stable = norm_sq / float(values[0]) ** 2
    return Spectrum(one, values, other, (m, n), norm_sq, error, exact, stable, *rank, every)


def lead(
    matrix: Array, rank: int | None, energy: float | None, device: str, seed: int
) -> tuple[Spectrum, int]:
    """Return the leading triplets, and how many are wanted: `rank`, no more than there are.

    Without a rank as many as hold the share `energy` of the squared norm, or all that there are.
    """
    most = min(matrix.shape)
    if rank is not None:
        found = decompose(matrix, min(rank, most), device, seed)
        return found, found.values.size
    wanted = FIRST_RANK
    while True:
        found = decompose(matrix, min(wanted, most), device, seed)
        enough = np.cumsum(found.values**2) >= (energy or 0) * found.norm_sq
        if enough.any():
            return found, int(np.argmax(enough)) + 1
        if found.values.size < wanted:  # the rank of the matrix
            return found, found.values.size
        wanted *= 2


def is_whole(shape: tuple[int, int], k: int) -> bool:
    """Return whether `decompose` takes the whole spectrum.

    A Krylov space of less than 8 blocks finds little, and would take as much memory.
    """
    return min(shape) <= max(EXACT, 8 * (k + OVERSAMPLING))


def _whole(tall: "Tensor", k: int) -> tuple["Tensor", F64Array, "Tensor", tuple[float, float]]:
    """Return vectors, all values and the effective rank from the eigenvalues of A'A in fp64.

    Squaring loses values below 1e-8 of the largest, less than fp32 deltas carry; the leading
    triplets are then taken from A itself. A full SVD would hold A and U in fp64.
    """
    import torch

    gram = tall.new_zeros((tall.shape[1], tall.shape[1]), dtype=torch.float64)
    for piece in _pieces(tall):
        gram += piece.T @ piece
    squares, vectors = torch.linalg.eigh(gram)
    right = vectors[:, -k:]
    image = torch.cat([piece @ right for piece in _pieces(tall)])
    left, values, turn = _svd(image)
    spectrum = np.sqrt(squares.clamp(min=0).cpu().numpy())
    rank = _effective_rank(spectrum, np.ones_like(spectrum)), 0.0
    every = np.append(values.cpu().numpy(), spectrum[:-k][::-1])
    return left.to(tall.dtype), every, (right @ turn.T).to(tall.dtype), rank


def _svd(matrix: "Tensor") -> tuple["Tensor", "Tensor", "Tensor"]:
    """Return u, s, v' of a thin matrix by the first driver that gives finite values.

    torch's own divides and conquers and may fail on values that lie together; gesvd iterates by QR
    (Golub and Kahan 1965), and the Gram matrix in fp64 loses values below 1e-8 of the largest.
    """
    import torch

    try:
        found = torch.linalg.svd(matrix, full_matrices=False)
        if all(bool(side.isfinite().all()) for side in found):
            return found[0], found[1], found[2]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    found = _other_drivers(matrix.double().cpu().numpy())
    one, values, other = (matrix.new_tensor(np.ascontiguousarray(side)) for side in found)
    return one, values, other


def _other_drivers(matrix: F64Array) -> tuple[F64Array, F64Array, F64Array]:
    with needs("torch", "a matrix of which torch finds no singular values"):
        from scipy import linalg
    try:
        u, values, v = linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
        if all(np.isfinite(side).all() for side in (u, values, v)):
            return u, values, v
    except np.linalg.LinAlgError:
        pass
    if matrix.shape[0] < matrix.shape[1]:
        v, values, u = _other_drivers(matrix.T)
        return u.T, values, v.T
    _, vectors = np.linalg.eigh(matrix.T @ matrix)
    image = matrix @ vectors[:, ::-1]
    values = np.linalg.norm(image, axis=0)
    # columns below rounding are no longer orthogonal: QR keeps what stands before them
    u, corner = np.linalg.qr(image)
    return u * np.where(np.diag(corner) < 0, -1.0, 1.0), values, vectors[:, ::-1].T


def _krylov(
    tall: "Tensor", k: int, seed: int, norm_sq: float
) -> tuple["Tensor", F64Array, "Tensor", tuple[float, float]]:
    """Return vectors, values and the effective rank from the Krylov space of a random block.

    Randomised SVD (Halko, Martinsson, Tropp 2011) that keeps all its powers (Musco and Musco 2015):
    block Golub-Kahan, A P = U B with both bases orthogonalised in full. torch.svd_lowrank keeps the
    last power only, draws from the global generator and states no error.
    """
    import torch

    m, n = tall.shape
    width = k + OVERSAMPLING
    generator = np.random.Generator(np.random.Philox(key=seed))

    def normal(rows: int) -> "Tensor":
        return tall.new_tensor(generator.standard_normal((rows, width), dtype=np.float32))

    most = min(PASSES[-1], n // width)
    left, right = tall.new_empty((m, most * width)), tall.new_empty((n, most * width))
    # B, and how it goes on to its right
    band = torch.zeros((most * width, (most + 1) * width), dtype=torch.float64)
    block = torch.linalg.qr(normal(n)).Q
    # random numbers below rounding stand in for directions that a rank-deficient block lacks
    speck = torch.finfo(tall.dtype).eps * (norm_sq / m / n) ** 0.5
    for count in range(1, most + 1):
        old, new = (count - 1) * width, count * width
        right[:, old:new] = block
        image = tall @ block + speck * normal(m)
        left[:, old:new], band[:old, old:new], band[old:new, old:new] = _orthonormal(
            image, left[:, :old]
        )
        image = tall.T @ left[:, old:new] + speck * normal(n)
        block, _, corner = _orthonormal(image, right[:, :new])
        band[old:new, new : new + width] = corner.T
        if count in PASSES or count == most:
            u, values, v, loose = _ritz(band, new)
            if loose[:k].max() <= TOLERANCE * values[0]:
                break
    rank, spread = _quadrature(band, new, width, n)
    before, _ = _quadrature(band, count // 2 * width, width, n)
    one, other = (side[:, :k].to(tall) for side in (u, v.T))
    ranks = rank, float(np.hypot(spread, rank - before))
    return left[:, :new] @ one, values, right[:, :new] @ other, ranks


def _orthonormal(image: "Tensor", basis: "Tensor") -> tuple["Tensor", "Tensor", "Tensor"]:
    """Return Q, C and R with image = basis C + Q R, the columns of basis and Q orthonormal.

    Thrice, since what a repeated singular value leaves of an image is all rounding: with two
    rounds the loss of orthogonality grows tenfold a block on an identity matrix.
    """
    import torch

    inside = image.new_zeros((basis.shape[1], image.shape[1]))
    upper = torch.eye(image.shape[1], dtype=image.dtype, device=image.device)
    for _ in range(3):
        again = basis.T @ image
        image, corner = torch.linalg.qr(image - basis @ again)
        inside, upper = inside + again @ upper, corner @ upper
    return image, inside.double().cpu(), upper.double().cpu()


def _ritz(band: "Tensor", size: int) -> tuple["Tensor", F64Array, "Tensor", F64Array]:
    """Return the SVD u, s, v' of the leading part of B, and each triplet's residual |A'u - s v|."""
    u, values, v = _svd(band[:size, :size])
    return u, values.numpy(), v, (band[:size, size:].T @ u).norm(dim=0).numpy()


def _quadrature(band: "Tensor", size: int, width: int, n: int) -> tuple[float, float]:
    """Return the effective rank and its standard error over the probes, the first block's columns.

    Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017) in the Krylov space that is there anyway
    (Chen and Hallman 2023): converged leading values count once, the others by the share of what
    is left of the probes that falls on their vectors.
    """
    _, values, v, loose = _ritz(band, size)
    leading = loose[: width - OVERSAMPLING] <= TOLERANCE * values[0]
    certain = int(np.argmin(np.append(leading, False)))
    mass = v.numpy()[certain:, :width] ** 2
    counts = np.ones((size, width))
    counts[certain:] = (n - certain) * mass / mass.sum(axis=0)
    total = counts.sum(axis=1)
    without = [_effective_rank(values, (total - one) / (width - 1)) for one in counts.T]
    return _effective_rank(values, total / width), float(np.std(without) * (width - 1) ** 0.5)


def _effective_rank(values: F64Array, counts: F64Array) -> float:
    shares = values / (counts @ values)
    return float(np.exp(-(counts @ (shares * np.log(np.where(shares > 0, shares, 1.0))))))


def shares_inside(
    matrix: Array, spectrum: Spectrum, device: str
) -> tuple[float, float, float] | None:
    """Return |U'A|^2, |A V|^2 and |U'A V|^2 over |A|^2: how much of A lies in another's subspaces.

    Chance gives k/m, k/n and k^2/(mn). None for a zero matrix. Raises IncompatibleError if the
    shapes differ.
    """
    with settled():
        values = _load(matrix, device, spectrum.shape)
        norm_sq = _squared(values)
        if norm_sq == 0:
            return None
        left, right = values.new_tensor(spectrum.left), values.new_tensor(spectrum.right)
        inner = left.T @ values
        parts = inner, values @ right, inner @ right
        one, other, both = (min(1.0, _squared(part) / norm_sq) for part in parts)
    return one, other, both


def residual_sq(matrix: Array, left: Array, right: Array) -> float:
    """Return |A - L R'|^2 of an m x n matrix and its m x r and n x r factors, all of one dtype."""
    import torch

    with settled():
        whole, one, other = (_load(side, "cpu") for side in (matrix, left, right))
        rows, total = max(1, PIECE // max(1, len(other))), 0.0
        for at in range(0, len(one), rows):
            rest = whole[at : at + rows] - one[at : at + rows] @ other.T
            total += float(rest.square_().sum(dtype=torch.float64))
    return total


@contextmanager
def settled() -> Iterator[None]:
    """Give this thread's torch one thread of its own, and unrounded factors of fp32 products.

    A process may have allowed others. What holds for the process is put back by the outermost.
    """
    import torch

    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)


def check_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise IncompatibleError where two shapes differ."""
    if found != expected:
        raise IncompatibleError(f"a matrix of shape {found} beside one of {expected}")


def _load(matrix: Array, device: str, shape: tuple[int, int] | None = None) -> "Tensor":
    """Return the matrix on the device, without a copy on the host where it is a float already."""
    import torch

    check_shape(matrix.shape, shape or matrix.shape)
    values = matrix if matrix.dtype == np.float64 else matrix.astype(np.float32, copy=False)
    with warnings.catch_warnings():  # torch warns of read-only arrays; nothing here writes
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(values).to(resolve_device(device))


def _pieces(matrix: "Tensor") -> Iterator["Tensor"]:
    rows = max(1, PIECE // max(1, matrix.shape[1]))
    return (matrix[at : at + rows].double() for at in range(0, matrix.shape[0], rows))


def squared(matrix: Array) -> float:
    """Return |A|^2, added in fp64."""
    return _squared(_load(matrix, "cpu"))


def _squared(matrix: "Tensor") -> float:
    return float(sum(float(piece.square().sum()) for piece in _pieces(matrix)))


def _host(vectors: "Tensor") -> F32Array:
    return np.ascontiguousarray(vectors.float().cpu().numpy())
