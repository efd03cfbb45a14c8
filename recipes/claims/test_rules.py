"""Verdicts: exact p-values, the right one for planted effects, and what a seed says by itself."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from skillvec.analysis.differences import difference
from skillvec.recipes.claims import rules
from skillvec.recipes.claims.rules import Part, Spread, Test, better, equal, judge, less, no_worse
from skillvec.trials.scores import score_of

DOMAINS = ("people", "tools")

# -------------------------------------------------------------------------------- p-values


def brute(values: tuple[float, ...], limit: float) -> float:
    """Return how often changed signs around the limit give as large a mean as was found."""
    apart = [value - limit for value in values]
    signs = itertools.product((1, -1), repeat=len(values))
    means = [fmean(s * x for s, x in zip(each, apart, strict=True)) for each in signs]
    return sum(mean >= fmean(apart) - 1e-12 for mean in means) / len(means)


@pytest.mark.parametrize("values", [(0.1, 0.4, -0.2, 0.3, 0.0), (0.0,) * 4, (0.5, 0.6, 0.7)])
def test_p_values_are_those_of_all_changes_of_signs(values: tuple[float, ...]) -> None:
    for limit in (-0.2, -0.05, 0.0, 0.1, 0.25, 0.9):
        mirrored = tuple(-value for value in values)
        assert Spread(values).p_above(limit) == brute(values, limit)
        assert Spread(values).p_below(limit) == brute(mirrored, -limit)


def test_an_interval_holds_the_means_that_no_test_rejects() -> None:
    values = (0.3, -0.1, 0.25, 0.4, 0.05, 0.31, 0.22, -0.02)
    low, high = Spread(values).interval()
    for limit in np.linspace(-0.2, 0.5, 141) + 1e-4:
        rejected = min(brute(values, limit), brute(tuple(-v for v in values), -limit)) <= 0.025
        assert (limit < low or limit > high) == rejected
    # of six seeds the least and the largest are 2/64 apart in probability
    assert Spread((1.0, 2.0, 3.0, 4.0, 5.0, 9.0)).interval() == (1.0, 9.0)
    assert Spread((1.0, 2.0, 3.0, 4.0, 5.0)).interval() == (-math.inf, math.inf)
    assert Spread((1.0, 2.0)).show_interval() == "+1.500 [too few seeds]"


def test_many_seeds_draw_their_changes_of_signs() -> None:
    values = tuple(np.random.default_rng(0).normal(0.02, 0.1, 40))
    normal = 0.5 * math.erfc(fmean(values) / np.linalg.norm(values) * 40 / math.sqrt(2))
    assert Spread(values).p_above(0) == pytest.approx(normal, rel=0.1)


def test_spread_is_shown() -> None:
    assert Spread((1.0, 2.0, 3.0, 6.0)).show(".1f") == "3.0 ± 2.2"
    assert Spread((0.5,)).show("+.2f") == "+0.50"
    assert (Spread((1.0, 2.0)) - Spread((1.0, 1.5))).values == (0, 0.5)
    assert [rules.show_p(p) for p in (0.9996, 0.25, 0.0004)] == ["1", ".250", "< .001"]
    assert [rules.signed(x) for x in (-0.0004, 0.0126)] == ["+0.000", "+0.013"]


def test_holm_multiplies_by_what_is_left() -> None:
    # by hand: .01 * 4, .02 * 3, .03 * 2, .5 * 1, none smaller than the one before
    assert rules.holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert rules.holm([0.9, 0.8]) == [1, 1]


def test_a_part_needs_every_test_and_fails_by_one_of_many() -> None:
    above, around = Spread((0.1, 0.2, 0.3, 0.4)), Spread((0.1, -0.1, 0.2, -0.2))
    part = better("", {"a": above, "b": around})
    assert part.p_for == brute(around.values, 0) and part.weakest.name == "b"
    assert part.p_against == min(1, 2 * brute(around.values, 0))  # mirrored, it is itself
    assert equal("", {"a": above}).p_against == 2 * brute(above.values, rules.MARGIN)


# -------------------------------------------------------------------------------- verdicts

SEEDS, DRAWS = 12, 100
Draw = Callable[[np.random.Generator], Any]


def two_peaks(random: np.random.Generator, far: float = 0.6) -> Any:
    """Return gains of seeds of which one in twenty learns nothing and the others do."""
    return np.where(random.random(SEEDS) < 0.05, 0.0, far) + random.normal(0, 0.04, SEEDS)


def noise(random: np.random.Generator) -> Any:
    return random.normal(0, 0.08, SEEDS) * random.choice((0.2, 1), SEEDS)


PLANTED: dict[str, tuple[Callable[..., Part], Draw, str]] = {
    "an effect": (better, two_peaks, "holds"),
    "no effect": (better, noise, "not clear"),
    "the opposite": (better, lambda r: -two_peaks(r), "does not hold"),
    "equal": (equal, lambda r: r.normal(0, 0.02, SEEDS), "holds"),
    "unequal": (equal, lambda r: r.normal(0.3, 0.08, SEEDS), "does not hold"),
    "as good": (no_worse, lambda r: two_peaks(r, 0.1), "holds"),
    "at the margin": (no_worse, lambda r: noise(r) - rules.MARGIN, "not clear"),
    "worse": (no_worse, lambda r: -two_peaks(r, 0.3), "does not hold"),
}


def planted(random: np.random.Generator) -> list[Part]:
    """Return a page of as many parts as the real one, those of interest with two tests or more."""
    drawn = {}
    for name, (rule, draw, _) in PLANTED.items():
        tests = {domain: Spread(tuple(draw(random))) for domain in DOMAINS}
        drawn[name] = rule(name, tests)
    sizes = {f"{k}": Spread(tuple(abs(random.normal(0, 0.035, SEEDS)))) for k in range(8)}
    rest = (better("no effect", {"": Spread(tuple(noise(random)))}) for _ in range(11))
    return [*drawn.values(), less("small", sizes, rules.COSINE), *rest]


def test_planted_effects_get_their_verdict_in_95_of_100_draws() -> None:
    random = np.random.default_rng(1)
    wanted = {name: word for name, (*_, word) in PLANTED.items()} | {"small": "holds"}
    right: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    for _ in range(DRAWS):
        for verdict in judge(planted(random)):
            drawn[verdict.part.name] += 1
            right[verdict.part.name] += verdict.word == wanted[verdict.part.name]
    assert {name: right[name] for name, count in drawn.items() if right[name] < 0.95 * count} == {}


def test_false_verdicts_are_rare_over_a_whole_page() -> None:
    """Every part at its limit, where each verdict but "not clear" is false."""
    random, false = np.random.default_rng(2), 0
    limit = abs(np.random.default_rng(3).normal(size=10**5)).mean() / rules.COSINE
    for _ in range(200):
        parts = [
            *(better("", {"": Spread(tuple(noise(random)))}) for _ in range(6)),
            *(equal("", {"": Spread(tuple(noise(random) + rules.MARGIN))}) for _ in range(4)),
            *(no_worse("", {"": Spread(tuple(noise(random) - rules.MARGIN))}) for _ in range(4)),
            less("", {"": Spread(tuple(abs(random.normal(size=SEEDS)) / limit))}, rules.COSINE),
        ]
        false += any(verdict.word != "not clear" for verdict in judge(parts))
    assert false <= 0.05 * 200 + 2 * math.sqrt(200 * 0.05 * 0.95)


# -------------------------------------------------------------------------------- a seed by itself


def test_a_seed_by_itself_is_compared_by_question_over_its_groups() -> None:
    random = np.random.default_rng(5)
    groups = [f"subject {k // 4}" for k in range(80)]
    pairs = [[score_of(random.random(80) < p, groups) for p in (0.8, 0.3)] for _ in range(3)]
    ours, theirs = (
        Spread(tuple(score.mean for score in each), each) for each in zip(*pairs, strict=True)
    )
    gap = ours - theirs
    for found, (one, other) in zip(gap.within(), pairs, strict=True):
        right = difference(one, other)
        assert found.mean == pytest.approx(right.mean) and found.degrees == right.degrees == 19
        assert (found.low, found.high) == pytest.approx((right.low, right.high))
    low = max(found.low for found in gap.within())
    assert all(Test("", gap, low=0.0).passed()) and not all(Test("", gap, low=low).passed())
    assert Test("", gap, high=0.0).passed() == [False] * 3
    assert Test("", gap, high=0.0).opposed() == [True] * 3 != Test("", gap, low=low).opposed()


def test_seeds_of_other_questions_are_compared_by_their_means_alone() -> None:
    one, other = score_of([1, 0, 1, 1], "aabb"), score_of([0, 0, 1, 0], "aacc")
    gap = Spread((0.75,), (one,)) - Spread((0.25,), (other,))
    for found in (gap, Spread((0.75,), (one,)) - Spread((0.25,))):
        (alone,) = found.within()
        assert (alone.mean, alone.low, alone.high, alone.standard_error) == (0.5, 0.5, 0.5, None)
        assert Test("", found, low=0.4).passed() == [True] == Test("", found, high=0.4).opposed()
