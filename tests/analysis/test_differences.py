"""Differences of scores: against scipy, and how often they cry wolf."""

from math import inf, nan, sqrt

import numpy as np
import pytest
from scipy import stats

from skillvec.analysis.differences import contrast, difference, error_of, holm
from skillvec.trials.scores import Score


def score(values, groups=()) -> Score:
    values = tuple(map(float, values))
    return Score(sum(values) / len(values), None, values, tuple(groups))


def test_paired_items_are_students_t() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(0.3, 1, 40), draw.normal(0, 1, 40)
    found = difference(score(a), score(b), level=0.99)
    want = stats.ttest_rel(a, b)
    low, high = want.confidence_interval(0.99)
    assert (found.mean, found.p) == pytest.approx((np.mean(a - b), want.pvalue), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.standard_error == pytest.approx(stats.sem(a - b))
    assert found.degrees == 39


@pytest.mark.parametrize("degrees", [1, 2, 9, 400, 3000])
@pytest.mark.parametrize("level", [0.5, 0.95, 1 - 0.05 / 300])
def test_quantiles_are_scipys(degrees: int, level: float) -> None:
    values = np.arange(degrees + 1.0)
    found = difference(score(values), score(np.zeros(degrees + 1)), level)
    t = (found.high - found.mean) / (found.standard_error or nan)
    assert t == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-4)


def test_groups_are_one_draw() -> None:
    """Each item four times over: the same interval, not one of half the width."""
    draw = np.random.default_rng(1)
    a, b = draw.normal(0.3, 1, 12), draw.normal(0, 1, 12)
    once = difference(score(a), score(b))
    groups = [f"g{i}" for i in range(12) for _ in range(4)]
    fourfold = difference(score(a.repeat(4), groups), score(b.repeat(4), groups))
    assert (fourfold.low, fourfold.high, fourfold.p) == pytest.approx((once.low, once.high, once.p))
    assert fourfold.degrees == 11
    blind = difference(score(a.repeat(4)), score(b.repeat(4)))
    assert blind.p < once.p / 10


def test_scores_that_are_no_pair_add_their_errors() -> None:
    found = difference(Score(0.7, 0.03), Score(0.6, 0.04))
    assert (found.mean, found.standard_error) == pytest.approx((0.1, 0.05))
    assert (found.low, found.high) == pytest.approx((0.1 - 1.959964 * 0.05, 0.1 + 1.959964 * 0.05))
    assert found.p == pytest.approx(2 * stats.norm.sf(2)) and found.degrees is None
    longer = difference(score([1, 0, 1, 1]), Score(0.5, 0.1))
    assert longer.standard_error == pytest.approx(sqrt(0.25**2 + 0.01))
    other_groups = difference(score([1, 0, 1], "aab"), score([1, 0, 1], "abb"))
    assert other_groups.degrees is None


def test_weighted_sums_of_scores() -> None:
    """Of the gain .95 is kept: by item, where the three answered the same ones."""
    draw = np.random.default_rng(2)
    rows = draw.normal(0, 1, (3, 30))
    terms = [(w, score(row)) for w, row in zip((1, -0.05, -0.95), rows, strict=True)]
    found, want = contrast(terms), stats.ttest_1samp(np.dot([1, -0.05, -0.95], rows), 0)
    assert (found.p, found.degrees, found.is_paired) == (pytest.approx(want.pvalue), 29, True)
    apart = contrast([(w, Score(s.mean, 0.1)) for w, s in terms])
    assert apart.standard_error == pytest.approx(0.1 * sqrt(1 + 0.05**2 + 0.95**2))
    assert not apart.is_paired and apart.mean == pytest.approx(found.mean)


def test_what_is_not_known_finds_nothing() -> None:
    for one, other in (
        (Score(0.9), Score(0.1)),
        (Score(0.9, 0.01), Score(0.1)),
        (score([0.9, 0.9], "aa"), score([0.1, 0.1], "aa")),  # one group
        (Score(nan, 0.1), Score(0.1, 0.1)),
    ):
        found = difference(one, other)
        assert (found.standard_error, found.low, found.high, found.p) == (None, -inf, inf, 1.0)


def test_differences_that_are_all_the_same_are_as_rare_as_their_signs() -> None:
    same = difference(score([0.5] * 4), score([0.5] * 4))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    four, nine = (difference(score([1] * n), score([0] * n)) for n in (4, 9))
    assert (four.p, four.low, four.high) == (1 / 8, -inf, inf)
    assert (nine.p, nine.low, nine.high) == (2**-8, 1, 1)
    tenths = difference(score([0.3] * 4), score([0.1] * 4))  # 0.3 - 0.1 is no exact 0.2
    assert (tenths.p, tenths.low) == (1 / 8, -inf)


def test_errors_of_scores() -> None:
    assert error_of(Score(0.5, 0.1, (1.0, 0.0, 1.0, 0.0))) == 0.1
    assert error_of(Score(0.5)) is None
    assert error_of(score([1, 0, 1, 1])) == pytest.approx(stats.sem([1, 0, 1, 1]))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("kind", ["right or wrong", "numbers", "groups"])
def test_false_alarms_come_at_the_rate_that_is_stated(kind: str) -> None:
    """Six models no better than the first, 400 times: one in twenty finds something, no more."""
    draw, found, tries = np.random.default_rng(3), 0, 400
    groups = [str(i // 4) for i in range(24)] if kind == "groups" else ()
    for _ in range(tries):
        hard = draw.normal(0, 1, 24)
        if kind == "groups":
            shift = draw.normal(0, 1, (7, 6)).repeat(4, axis=1)
            models = hard + draw.normal(0, 0.3, (7, 24)) + shift
        else:
            models = hard + draw.normal(0, 0.7, (7, 24))
        if kind == "right or wrong":
            models = models > 0
        scores = [score(row, groups) for row in models]
        ps = holm([difference(other, scores[0]).p for other in scores[1:]])
        ends = [difference(other, scores[0], 1 - 0.05 / 6) for other in scores[1:]]
        assert (min(ps) <= 0.05) == any(end.low > 0 or end.high < 0 for end in ends)
        found += min(ps) <= 0.05
    assert found / tries <= 0.05 + 2 * sqrt(0.05 * 0.95 / tries)
    assert found > 0
