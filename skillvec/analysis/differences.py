"""How far two scores lie apart, and whether that is more than noise: by item, or by group of items.

Two models that answered the same items are compared item by item: what makes an item hard is in
both scores and falls out of the difference. Items of one group (questions about one document) are
one draw: their differences are added first (Liang and Zeger 1986), and the groups are what counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import erfc, fsum, hypot, inf, isfinite, sqrt
from typing import Protocol

from skillvec.analysis.chance import chance_of


class Measured(Protocol):
    """A mean of items, as `Score` of skillvec.trials.scores is."""

    @property
    def mean(self) -> float: ...
    @property
    def standard_error(self) -> float | None: ...
    @property
    def values(self) -> tuple[float, ...]: ...
    @property
    def groups(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Difference:
    """One score less another, with the ends of its interval and the two-sided p of no difference.

    `degrees` are those of Student's t, the groups less one; None where the two are no pair: then
    the standard errors are added as if they were independent. Where nothing is known of the
    spread, `standard_error` is None, the ends are infinite and p is 1.
    """

    mean: float
    standard_error: float | None
    low: float
    high: float
    p: float
    degrees: int | None = None

    @property
    def is_paired(self) -> bool:
        return self.degrees is not None


def difference(one: Measured, other: Measured, level: float = 0.95) -> Difference:
    """Return `one` less `other`, with the interval of a level.

    For several comparisons with one score, the level 1 - .05 / their number makes the intervals
    hold all at once (Bonferroni), and `holm` does the same for their p.
    """
    return contrast([(1.0, one), (-1.0, other)], level)


def contrast(terms: Sequence[tuple[float, Measured]], level: float = 0.95) -> Difference:
    """Return a weighted sum of scores: by item where all have the same items and groups."""
    shapes = {(len(score.values), score.groups) for _, score in terms}
    if len(shapes) == 1 and terms[0][1].values:
        columns = [[weight * value for value in score.values] for weight, score in terms]
        return _paired([fsum(row) for row in zip(*columns, strict=True)], terms[0][1].groups, level)
    mean = fsum(weight * score.mean for weight, score in terms)
    errors = [(weight, error_of(score)) for weight, score in terms]
    known = [weight * error for weight, error in errors if error is not None]
    if len(known) < len(errors):
        return Difference(mean, None, -inf, inf, 1.0)
    return _judge(mean, hypot(*known), None, level)


def error_of(score: Measured) -> float | None:
    """Return the standard error of a score: its own, or that of its values; None if unknown."""
    if score.standard_error is not None or not score.values:
        return score.standard_error
    return _paired(score.values, score.groups, 0.95).standard_error


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, p_values[k] * (len(p_values) - rank)))
        adjusted[k] = largest
    return adjusted


def _paired(apart: Sequence[float], groups: Sequence[str], level: float) -> Difference:
    """Return the mean of differences by item, with the spread of the sums of their groups."""
    mean = fsum(apart) / len(apart)
    sums: dict[object, float] = {}
    for label, value in zip(groups or range(len(apart)), apart, strict=True):
        sums[label] = sums.get(label, 0.0) + (value - mean)
    if (count := len(sums)) < 2:
        return Difference(mean, None, -inf, inf, 1.0, 0)
    square = fsum(value**2 for value in sums.values()) * count / (count - 1)
    return _judge(mean, sqrt(square) / len(apart), count - 1, level)


def _judge(mean: float, error: float, degrees: int | None, level: float) -> Difference:
    """Return a difference with its interval and p by Student's t, or the normal distribution.

    Differences that are all the same have no spread to measure: their p is that of equal signs.
    """
    if not isfinite(mean) or not isfinite(error):
        return Difference(mean, None, -inf, inf, 1.0, degrees)
    tiny = error <= 1e-12 * abs(mean)  # all the same, but for the last digits
    if mean == 0.0 or tiny:
        p = 1.0 if mean == 0.0 else 2.0**-degrees if degrees else 0.0
    else:
        p = _two_sided(mean / error, degrees)
    reach = inf if tiny and mean and p > 1 - level else _quantile(level, degrees) * error
    return Difference(mean, error, mean - reach, mean + reach, p, degrees)


def _two_sided(t: float, degrees: int | None) -> float:
    """Return how often Student's t lies as far from 0; of None degrees the normal distribution."""
    if degrees is None:
        return erfc(abs(t) / sqrt(2))
    return chance_of(t / sqrt(degrees + t * t), degrees + 1)


@lru_cache
def _quantile(level: float, degrees: int | None) -> float:
    """Return the t that a share `level` of all lies within, by bisection; none lies beyond 1e9."""
    low, high = 0.0, 1e9
    while high - low > 1e-12 * high:
        middle = (low + high) / 2 if low else high / 64
        low, high = (middle, high) if _two_sided(middle, degrees) > 1 - level else (low, middle)
    return high
