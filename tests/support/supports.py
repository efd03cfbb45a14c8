"""The overlap of supports by whole tensors in float64, for angles.py. No skillvec in here."""

from typing import NamedTuple

import numpy as np

DENSE = 15 / 16


class Overlap(NamedTuple):
    """A tensor's supports, the signs where both are (+1 equal, -1 opposite), numbers of strata."""

    in_a: np.ndarray
    in_b: np.ndarray
    signs: np.ndarray
    strata: np.ndarray


def expected(one: Overlap) -> tuple[float, float]:
    """Return mean and variance of shared values where a's and b's are drawn in each stratum."""
    strata = one.strata.ravel()
    n, a, b = (np.bincount(strata, side.ravel()) for side in (np.ones(strata.size), *one[:2]))
    spread = a * b * (n - a) * (n - b) / (n * n * np.maximum(n - 1, 1))  # of one value 0
    return float((a * b / n).sum()), float(spread.sum())


def centred(values: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Return values less their mean in each stratum."""
    at, found = strata.ravel(), values.ravel().astype(np.float64)
    return (found - (np.bincount(at, found) / np.bincount(at))[at]).reshape(values.shape)


def in_rows(values: np.ndarray) -> np.ndarray:
    """Return a long flat tensor (1, n, ...) in rows of 1,024, filled up with zeros."""
    if len(values) > 1 or values.shape[1] <= 65536:
        return values
    missing = -values.shape[1] % 1024
    filled = np.concatenate([values[0], np.zeros((missing, *values.shape[2:]))])
    return filled.reshape(-1, 1024, *values.shape[2:])


def excess(values: np.ndarray, axis: int, strata: np.ndarray) -> float:
    """Return how much larger the squared sums over an axis are than of independent values."""
    found = centred(values, strata)
    return max(0.0, float((in_rows(found).sum(axis=axis) ** 2).sum() - (found**2).sum()))


def variances(tensors: list[Overlap], hidden: int) -> np.ndarray:
    """Return the variances of shared values and of their signs, clustered by rows and channels."""
    whole = sum(np.array([expected(one)[1], np.abs(one.signs).sum()]) for one in tensors)
    both, channels, effects = whole.astype(np.float64), np.zeros((hidden, 2)), 0.0
    for one in tensors:
        numel = one.in_a.size
        if not all(0 < side.sum() <= DENSE * numel for side in (one.in_a, one.in_b)):
            continue
        shape = one.in_a.shape or (1,)
        matrix = Overlap(*(side.reshape(-1, shape[-1]) for side in one))
        scores = centred(matrix.in_a, matrix.strata) * centred(matrix.in_b, matrix.strata)
        stacked = in_rows(np.stack([scores, matrix.signs], axis=-1).astype(np.float64))
        both -= [expected(one)[1], np.abs(one.signs).sum()]
        both -= (stacked**2).sum(axis=(0, 1))
        rows, columns = stacked.shape[:2]
        for axis, length in ((1, columns), (0, rows)):
            if length > 1:
                found = [excess(side, axis, matrix.strata) for side in (matrix.in_a, matrix.in_b)]
                effects += found[0] * found[1] / (numel * (length - 1))
        by_row, by_column = stacked.sum(axis=1), stacked.sum(axis=0)
        if rows == 1:
            by_row = stacked[0]
        squares = [(side**2).sum(axis=0) for side in (by_row, by_column)]
        along = [(columns == hidden, by_column, squares[0])]
        if len(shape) > 1 and shape[-2] == hidden:  # once or, of experts, for each of them
            along.append((True, by_row.reshape(-1, hidden, 2).sum(axis=0), squares[1]))
        along = [(side, across) for fits, side, across in along if fits]
        if along:
            side, across = max(along, key=lambda found: float((found[0][:, 0] ** 2).sum()))
            channels += side
            both += across
        else:
            both += squares[0] + squares[1]
    both += (channels**2).sum(axis=0)
    return np.maximum(both, whole + np.array([effects, 0.0]))
