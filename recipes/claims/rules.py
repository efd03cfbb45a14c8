"""The rules by which a claim holds, fails or stays open: fixed before its seeds are looked at.

A test takes one number a seed, such as the difference of two arms, and says what its mean should
be: above `low`, below `high`, or between them. Its p-values come from all 2**n changes of signs of
the n numbers, which are equally likely if the numbers scatter symmetrically around the limit, in
one peak or in two. A part of a claim holds if every one of its tests says so (an
intersection-union test: the largest p counts, Berger 1982), and it fails if one of them shows the
opposite (the smallest p, times the number of opposites that were looked at). Holm's correction
(1979) runs over both p-values of all parts of all claims. Between the two it is "not clear".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from skillvec.analysis.differences import Difference, contrast, holm
from skillvec.trials.scores import Score

ALPHA = 0.05  # for all verdicts of the page together
MARGIN = 0.05  # of exact match: half of the ten points that the paper gains on ToolBench
FORGETTING = 0.05  # nats a token: a perplexity that is 5 % higher
COSINE = 0.1  # in size: 1 % of either update's squared norm lies along the other
HOLDS, FAILS, UNCLEAR, FEW = "holds", "does not hold", "not clear", "too few seeds"
_EXACT = 16  # seeds; of more, as many subsets are drawn as 16 have
_CLOSE = 1e-12


@dataclass(frozen=True)
class Spread:
    """One number of every seed; `asked`, where known, is each as a mean of its questions."""

    values: tuple[float, ...]
    asked: tuple[Score, ...] = ()

    def __sub__(self, other: Spread) -> Spread:
        values = tuple(a - b for a, b in zip(self.values, other.values, strict=True))
        pairs = [*zip(self.asked, other.asked, strict=False)]
        if len(pairs) < len(values) or any(a.groups != b.groups for a, b in pairs):
            return Spread(values)
        return Spread(values, tuple(_subtract(a, b) for a, b in pairs))

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @cached_property
    def subset_means(self) -> npt.NDArray[np.float64]:
        """Return the mean of every subset of the seeds but the empty one.

        Changing signs around m gives as large a mean as was found exactly if the mean of the seeds
        that change is at most m: so these are the limits at which a p-value rises (Hartigan 1969).
        """
        members = _subsets(len(self.values))
        means: npt.NDArray[np.float64] = members @ np.array(self.values) / members.sum(1)
        return means

    def p_above(self, limit: float) -> float:
        """Return the one-sided p-value of the hypothesis that the mean is not above the limit."""
        means = self.subset_means
        return (1 + np.count_nonzero(means <= limit + _CLOSE)) / (means.size + 1)

    def p_below(self, limit: float) -> float:
        """Return the one-sided p-value of the hypothesis that the mean is not below the limit."""
        means = self.subset_means
        return (1 + np.count_nonzero(means >= limit - _CLOSE)) / (means.size + 1)

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float]:
        """Return the limits that changes of sign do not reject; all reals from too few seeds."""
        means = np.sort(self.subset_means)
        cut = math.floor((1 - level) / 2 * (means.size + 1) + _CLOSE)
        if cut == 0:
            return -math.inf, math.inf
        return float(means[cut - 1]), float(means[-cut])

    def within(self) -> list[Difference]:
        """Return each seed's number with its 95 % interval over groups of questions.

        An interval says what other questions would give, and nothing of other trainings. Without
        questions it is the number alone, with a standard error of None.
        """
        if len(self.asked) < len(self.values):
            return [Difference(value, None, value, value, 1.0) for value in self.values]
        return [contrast([(1.0, score)]) for score in self.asked]

    def show(self, form: str = ".3f") -> str:
        if not self.values:
            return "-"
        spread = f" ± {stdev(self.values):{form.lstrip('+')}}" if len(self.values) > 1 else ""
        return f"{self.mean:{form}}{spread}"

    def show_interval(self) -> str:
        """Return the mean and its interval, in words where the interval has no ends."""
        low, high = self.interval()
        ends = f"{signed(low)}, {signed(high)}" if math.isfinite(low) else "too few seeds"
        return f"{signed(self.mean)} [{ends}]"


def _subtract(one: Score, other: Score) -> Score:
    """Return one score less another of the same questions, question by question."""
    values = tuple(a - b for a, b in zip(one.values, other.values, strict=True))
    return Score(one.mean - other.mean, None, values, one.groups)


def signed(value: float) -> str:
    """Return three digits with a sign, which a zero has not from rounding."""
    return f"{round(value, 3) + 0.0:+.3f}"


@lru_cache(maxsize=4)
def _subsets(n: int) -> npt.NDArray[np.float64]:
    """Return one row of zeros and ones for every subset of n seeds that is not empty."""
    if n <= _EXACT:
        numbers = np.arange(1, 2**n)
        return ((numbers[:, None] >> np.arange(n)) & 1).astype(np.float64)
    drawn = np.random.default_rng(0).integers(0, 2, (2**_EXACT - 1, n)).astype(np.float64)
    return drawn[drawn.any(1)]


# ---------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Test:
    """One number a seed, and where its mean should lie; an open end is infinite."""

    name: str
    spread: Spread
    low: float = -math.inf
    high: float = math.inf

    __test__ = False  # nothing for pytest

    @property
    def p_for(self) -> float:
        """Return the p-value of the hypothesis that the mean is not between the limits."""
        return max(self.spread.p_above(self.low), self.spread.p_below(self.high))

    def passed(self) -> list[bool]:
        """Return whether each seed by itself is between the limits, with its whole interval."""
        return [self.low < one.low and one.high < self.high for one in self.spread.within()]

    def opposed(self) -> list[bool]:
        """Return whether each seed by itself is beyond a limit, with its whole interval."""
        return [one.high < self.low or self.high < one.low for one in self.spread.within()]

    @property
    def p_against(self) -> list[float]:
        """Return the p-value of the opposite of every limit: that the mean is beyond it."""
        below = [self.spread.p_below(self.low)] * math.isfinite(self.low)
        return below + [self.spread.p_above(self.high)] * math.isfinite(self.high)


@dataclass(frozen=True)
class Part:
    """What gets a verdict: `rule` says in words what all tests ask for."""

    name: str
    rule: str
    tests: tuple[Test, ...]

    @property
    def p_for(self) -> float:
        return self.weakest.p_for

    @property
    def p_against(self) -> float:
        found = [p for test in self.tests for p in test.p_against]
        return min(1.0, min(found) * len(found))

    @property
    def weakest(self) -> Test:
        """Return the test that decides: the one with the largest p-value for the claim."""
        return max(self.tests, key=lambda test: test.p_for)

    @property
    def seeds(self) -> int:
        return min(len(test.spread.values) for test in self.tests)


@dataclass(frozen=True)
class Verdict:
    """A part with its p-values after Holm's correction over all parts."""

    part: Part
    p_for: float
    p_against: float
    least: int

    @property
    def word(self) -> str:
        if self.part.seeds < self.least:
            return FEW
        if self.p_for <= ALPHA:
            return HOLDS
        return FAILS if self.p_against <= ALPHA else UNCLEAR


def judge(parts: Sequence[Part]) -> list[Verdict]:
    """Return the verdict of every part, corrected for all of them."""
    corrected = holm([p for part in parts for p in (part.p_for, part.p_against)])
    least = least_seeds(len(parts))
    pairs = zip(parts, corrected[::2], corrected[1::2], strict=True)
    return [Verdict(part, p_for, p_against, least) for part, p_for, p_against in pairs]


def least_seeds(parts: int) -> int:
    """Return the seeds below which no p-value can be small enough: 2**-n, two for each part."""
    return math.ceil(math.log2(2 * parts / ALPHA))


# ---------------------------------------------------------------------------------- rules in words


def better(name: str, tests: dict[str, Spread]) -> Part:
    """Return a part that wants every difference above 0."""
    found = (Test(title, spread, low=0.0) for title, spread in tests.items())
    return Part(name, "above 0", (*found,))


def no_worse(name: str, tests: dict[str, Spread]) -> Part:
    """Return a part that wants every difference of exact match above minus the margin."""
    found = (Test(title, spread, low=-MARGIN) for title, spread in tests.items())
    return Part(name, f"above -{MARGIN:g}", (*found,))


def equal(name: str, tests: dict[str, Spread]) -> Part:
    """Return a part that wants every difference of exact match between both margins."""
    found = (Test(title, spread, -MARGIN, MARGIN) for title, spread in tests.items())
    return Part(name, f"between -{MARGIN:g} and {MARGIN:g}", (*found,))


def less(name: str, tests: dict[str, Spread], limit: float) -> Part:
    """Return a part that wants every number below a limit."""
    found = (Test(title, spread, high=limit) for title, spread in tests.items())
    return Part(name, f"below {limit:g}", (*found,))


def show_p(p: float) -> str:
    return "< .001" if p < 0.001 else "1" if p > 0.9995 else f"{p:.3f}".lstrip("0")
