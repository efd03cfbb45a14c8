"""A matrix apart: what of it is a product L R' of few columns, and what is left.

The product is the best of its rank (the leading singular triplets), or what a matrix does to a
subspace of its inputs. L and R are fp32, so that what is left is exactly the matrix less what they
say, whatever found them. LAPACK finds them, on the processor and with one thread for each matrix:
the same machine gives the same bytes, another may differ in the last bits.
"""

from typing import Any, NamedTuple

import numpy as np

from skillvec.errors import NonfiniteError
from skillvec.ops import svd
from skillvec.ops.kernels import Array
from skillvec.ops.special import round_mantissa


class Product(NamedTuple):
    """L (m x k) and R (n x k) of an m x n matrix, its squared norm and that of what is left.

    L and R are arrays, or where they were put; both are None where all of the matrix belongs to
    the product.
    """

    rank: int
    left: Any
    right: Any
    norm_sq: float
    rest_sq: float
    held_sq: float = 0.0  # of L R' itself, where it is not norm_sq - rest_sq, and how many of its
    changed: int = 0  # values are not 0, at most: rows of L times rows of R


def find_leading(matrix: Array, rank: int, energy: float) -> Product:
    """Return the leading singular triplets of a matrix as a product: `rank` of them.

    With an `energy` above 0 the fewest that hold this share of its squared norm. Where the matrix
    has no more than are wanted, beyond rounding, it is all of it. The caller holds `svd.settled`.
    """
    most = min(matrix.shape)
    if energy == 1 or (not energy and rank >= most):
        return Product(most, None, None, svd.squared(matrix), 0.0)
    found, count = svd.lead(matrix, None if energy else rank, energy or None, "cpu", 0)
    held = float(np.square(found.values[:count]).sum())
    fewer = held < energy * found.norm_sq if energy else count < rank
    if fewer or count in (0, most):
        return Product(count, None, None, found.norm_sq, 0.0)
    left = (found.left[:, :count] * found.values[:count]).astype(np.float32)
    right = np.ascontiguousarray(found.right[:, :count])
    sides = (side.astype(matrix.dtype, copy=False) for side in (left, right))
    return Product(count, left, right, found.norm_sq, svd.residual_sq(matrix, *sides))


def find_coarse(matrix: Array, rank: int, bits: int) -> Product:
    """Return the leading singular triplets with both sides rounded to `bits` of mantissa.

    Each side has the root of the singular value, and `rank` columns: those that there are not are
    0. So L and R are as long as a file has room for before they are known. Raises NonfiniteError
    where what is left is too large for fp32, as where L R' is.
    """
    found, count = svd.lead(matrix, rank, None, "cpu", 0)
    sides = []
    for side in (found.left, found.right):
        columns = np.zeros((len(side), rank), np.float32)
        columns[:, :count] = round_mantissa(side[:, :count] * found.values[:count] ** 0.5, bits)
        sides.append(columns)
    rest_sq = svd.residual_sq(matrix, *(side.astype(matrix.dtype, copy=False) for side in sides))
    if not np.isfinite(rest_sq):
        raise NonfiniteError(f"factors of rank {rank} and {bits} bits leave the range of fp32")
    wide = [side.astype(np.float64) for side in sides]
    held_sq = float(np.vdot(wide[0].T @ wide[0], wide[1].T @ wide[1]))
    (left, right), changed = sides, [int(side.any(axis=1).sum()) for side in sides]
    return Product(rank, left, right, found.norm_sq, rest_sq, held_sq, changed[0] * changed[1])


def find_inside(matrix: Array, directions: Array, side: int) -> Product:
    """Return what a matrix does to a subspace of its inputs, which meet its dimension `side`.

    `directions` (fp64) has k orthonormal columns: the product is A U U', or U U' A of a matrix that
    its module keeps turned (side 0).
    """
    wide, (width, rank) = matrix.astype(np.float64), directions.shape
    norm_sq = float(np.vdot(wide, wide))
    if rank == width:
        return Product(rank, None, None, norm_sq, 0.0)
    image = (wide if side else wide.T) @ directions
    rest_sq = max(0.0, norm_sq - float(np.vdot(image, image)))
    sides = image.astype(np.float32), directions.astype(np.float32)
    return Product(rank, *(sides if side else sides[::-1]), norm_sq, rest_sq)


def working_nbytes(shape: tuple[int, int], rank: int, itemsize: int) -> int:
    """Return what stands in memory for a matrix, over the copies of `matrix_workers`.

    A rank of 0 is one that an energy decides, of which the most is taken.
    """
    gram = 8 * min(shape) ** 2 if not rank or svd.is_whole(shape, rank) else 0
    return itemsize * shape[0] * shape[1] + gram
