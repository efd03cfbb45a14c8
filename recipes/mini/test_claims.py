"""Verdicts: exact p-values, the right one for planted effects, the claims and their page."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from skillvec.recipes.mini import claims, rules
from skillvec.recipes.mini.page import write_page
from skillvec.recipes.mini.results import Results, find_pair, gather
from skillvec.recipes.mini.rules import Part, Spread, better, equal, judge, less, no_worse
from skillvec.recipes.mini.seed import BITS, DOMAINS, LAMBDAS, TWICE

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


# -------------------------------------------------------------------------------- claims

ARMS = ("base", "SFT only", "SFT on S", "RL on S", "random", "shuffled", "pre-injection",
        "sequential", "RL on the target", "both skills", "K = 2", f"K = 1, {TWICE}",
        f"K = 2, {TWICE}", "bf16 vector", "all in bf16", "skill of apis", "skill of people",
        "layers", "embeddings", "rank 4", "rank 1", "residual",
        *(f"bits {bits}" for bits in BITS), *(f"lambda {lam:g}" for lam in LAMBDAS))  # fmt: skip
STEPS = np.linspace(-0.01, 0.01, SEEDS)


def spread(mean: float, seeds: int, order: int) -> Spread:
    """Return seeds around a mean, in an order of the arm's own: no two arms rise together."""
    steps = np.random.default_rng(order).permutation(STEPS)[:seeds]
    return Spread(tuple(float(mean + step) for step in steps))


def results(seeds: int = SEEDS, kl: float = 0.9, cosine: float = 0.01, **means: float) -> Results:
    """Return seeds in which every arm has .3 ± .01 but those given (as lambda_1=.8)."""
    named = {key.replace("_", " "): mean for key, mean in means.items()}
    scores = {}
    for k, (domain, arm) in enumerate(itertools.product(DOMAINS, ARMS)):
        scores[domain, arm, "exact"] = spread(named.get(arm, 0.3), seeds, k)
        for metric in ("told", "kl", "perplexity"):
            mean = kl if (metric, arm) == ("kl", "lambda 1") else 0.9
            scores[f"{domain} probe", arm, metric] = spread(mean, seeds, k + 100)
    times = {f"{d}/{stage}": Spread((2.0,) * seeds) for d in DOMAINS
             for stage in ("rl_t", "lambda_1")}  # fmt: skip
    labels = [f"out/{d}/{name}" for d in DOMAINS
              for name in ("round-1/skill.safetensors", "round-1/sft::b", "sft_t::b")]  # fmt: skip
    copies = {d: [report(copied(d), 0.8)] * seeds for d in DOMAINS}
    signs = (-1) ** np.arange(seeds)
    angles = [report(labels, cosine * sign) for sign in signs]
    return Results(scores, times, angles, copies, tuple(range(8, 8 + seeds)))


def copied(domain: str) -> list[str]:
    names = ("bf16/skill", *(f"bits-{bits}/skill" for bits in BITS), "rank-1", "rank-4")
    return [f"out/{domain}/round-1/skill", *(f"out/{domain}/copies/{name}" for name in names)]


def report(labels: list[str], cosine: float) -> dict[str, Any]:
    row = {"cosine": cosine, "p": 0.01, "control_cosine": 0.0, "density_b": 0.9, "norm_a": 2.0,
           "norm_ratio": 0.5}  # fmt: skip
    parts = [row | {"name": "layers", "norm_a": 1.0}, row | {"name": "outside"}]
    cells = [row | {"name": f"model.layers.{k}.self_attn.q_proj.weight"} for k in (0, 1)]
    layers = [row | {"name": f"model.layers.{k}"} for k in (0, 1)]
    pairs = [{"a": a, "b": b, "overall": row, "parts": parts, "layers": layers, "tensors": cells}
             for a, b in itertools.combinations(labels, 2)]  # fmt: skip
    return {"pairs": pairs}


def verdicts(make: Callable[[Results], claims.Claim], found: Results) -> str:
    """Return the verdicts of a claim's parts, corrected over the parts of all claims."""
    parts = [part for each in claims.CLAIMS for part in each(found).parts]
    own = {(part.name, test.name) for part in make(found).parts for test in part.tests}
    return ", ".join(
        verdict.word for verdict in judge(parts)
        if {(verdict.part.name, test.name) for test in verdict.part.tests} <= own
    )  # fmt: skip


GOOD = {"lambda_1": 0.8, "sequential": 0.1, "RL_on_the_target": 0.9, "lambda_2": 0.7}


@pytest.mark.parametrize(
    ("make", "means", "expected"),
    [
        (claims.knowledge_is_not_enough, {}, "holds"),
        (claims.knowledge_is_not_enough, {"SFT_only": 0.95}, "does not hold"),
        (claims.injection_lifts, GOOD, "holds, holds"),
        (claims.injection_lifts, GOOD | {"random": 0.8}, "holds, not clear"),
        (claims.injection_lifts, GOOD | {"shuffled": 0.9}, "holds, does not hold"),
        (claims.injection_lifts, {}, "not clear, not clear"),
        (claims.lambda_curve, GOOD | {"lambda_1.5": 0.82}, "holds, holds"),
        (claims.lambda_curve, GOOD | {"lambda_1.5": 0.85}, "holds, not clear"),
        (claims.lambda_curve, GOOD | {"lambda_1.5": 0.9}, "holds, does not hold"),
        (claims.lambda_curve, GOOD | {"lambda_0.75": 0.9}, "does not hold, holds"),
        (claims.rounds_help, {"K = 2": 0.5}, "holds, not clear, not clear"),
        (claims.rounds_help, {"K = 2": 0.1}, "does not hold, not clear, not clear"),
        (claims.rounds_help, {f"K = 2, {TWICE}": 0.5}, "not clear, holds, holds"),
        (claims.order_matters, GOOD, "holds, holds"),
        (claims.order_matters, GOOD | {"pre-injection": 0.9}, "does not hold, holds"),
        (claims.nearly_orthogonal, {}, "holds, holds"),
        (claims.nearly_orthogonal, {"cosine": 0.12}, "does not hold, does not hold"),
        (claims.nearly_orthogonal, {"cosine": 0.1}, "not clear, not clear"),
        (claims.target_rl, {"lambda_1": 0.2}, "holds"),
        (claims.target_rl, {"RL_on_the_target": 0.25}, "not clear"),
        (claims.target_rl, {"lambda_1": 0.9}, "does not hold"),
        (claims.other_domains, GOOD, "holds, not clear"),
        (claims.other_domains, {"skill_of_apis": 0.2}, "not clear, does not hold"),
        (claims.forgetting, {"kl": 0.92}, "holds"),
        (claims.forgetting, {"kl": 0.95}, "not clear"),
        (claims.forgetting, {"kl": 0.98}, "does not hold"),
        (claims.half_precision, {}, "holds, holds, holds, holds"),
        (claims.half_precision, {"bits_1": 0.2}, "holds, holds, does not hold, holds"),
        (claims.half_precision, {"bits_0": 0.25}, "holds, holds, holds, not clear"),
    ],
)
def test_verdicts_follow_the_numbers(
    make: Callable[[Results], claims.Claim], means: dict[str, Any], expected: str
) -> None:
    assert verdicts(make, results(**means)) == expected


def test_no_verdict_holds_below_the_least_number_of_seeds() -> None:
    parts = sum(len(make(results()).parts) for make in claims.CLAIMS)
    least = rules.least_seeds(parts)
    # the smallest p of one seed fewer, times both p-values of every part, is above the level
    assert 2**-least * 2 * parts <= rules.ALPHA < 2 ** -(least - 1) * 2 * parts
    for seeds in (1, least - 1):
        judged = judge([part for make in claims.CLAIMS for part in make(results(seeds)).parts])
        assert {verdict.word for verdict in judged} == {"too few seeds"}
        assert min(verdict.p_for for verdict in judged) > rules.ALPHA
    assert verdicts(claims.injection_lifts, results(least, **GOOD)) == "holds, holds"


def test_more_forgetting_is_said_even_if_it_is_within_the_margin() -> None:
    assert (
        "does forget more of the base about people and about apis"
        in claims.forgetting(results(kl=0.92)).found
    )
    assert "does forget" not in claims.forgetting(results()).found


def test_seeds_of_either_sign_do_not_cancel() -> None:
    claim = claims.nearly_orthogonal(results(cosine=0.12))
    assert "largest cosine of v and an SFT update is 0.120 in size" in claim.found
    assert "| +0.000 ± 0.125 | 0.120 | 0.120 |" in claim.evidence


def test_seeds_in_which_injection_passes_rl_are_named() -> None:
    found = results(**GOOD | {"RL_on_the_target": 0.82})
    upper = found.exact("apis", "RL on the target").values
    found.scores["apis", "RL on the target", "exact"] = Spread((0.0, *upper[1:]))
    evidence = claims.target_rl(found).evidence
    assert "more than the margin for apis in seed 8. Where" in evidence


# -------------------------------------------------------------------------------- the page


def test_the_page_and_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert")
    page = tmp_path / "docs" / "reproduction.md"
    page.parent.mkdir()
    found = results(**GOOD, rank_4=0.7)
    write_page(found, None, found.seeds, page)
    text = page.read_text()
    assert "Each of 12 seeds (8, 9, 10," in text
    assert "{" not in text and "nan" not in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1 and len(rows) > 2
    assert len(tables) == 24
    parts = [part for make in claims.CLAIMS for part in make(found).parts]
    shown = [row.split(" | ") for row in tables[0][2:]]
    assert [(row[2], row[5], row[6]) for row in shown] == [
        (f"**{verdict.word}**", rules.show_p(verdict.p_for), rules.show_p(verdict.p_against))
        for verdict in judge(parts)
    ]
    for title in (make(found).title for make in claims.CLAIMS):
        assert f". {title}\n" in text
    # rank 4 gives .7 where v gives .8 and SFT only .3
    assert "| rank 4 of v's layers | 64% / 64% | 0.700 ± 0.007 | 80% |" in text
    assert "| layers of v alone | 25% / 25% |" in text
    assert "| outside of the layers alone | 75% / 75% |" in text
    for name in ("lambda", "arms", "layers", "forgetting"):
        assert (page.parent / "images" / f"{name}.svg").read_text().startswith("<svg")
        assert f"images/{name}.svg" in text
    monkeypatch.setattr("skillvec.recipes.mini.page.draw", lambda _: [])  # drawn already
    write_page(found, results(lambda_1=0.6), found.seeds, page)
    assert "| people | 0.300 ± 0.007 | 0.600 ± 0.007 |" in page.read_text()


def test_a_seed_without_a_skill_is_named_and_counted() -> None:
    whole = results(**GOOD)
    pairs = json.loads(json.dumps(whole.angles[0]["pairs"]))
    nothing = {"cosine": None, "p": None, "control_cosine": None, "norm_a": 0}
    for pair in pairs:
        if "apis/round-1/skill" in pair["a"] + pair["b"]:
            for row in (pair["overall"], *pair["parts"], *pair["layers"], *pair["tensors"]):
                row |= nothing
    angles = [whole.angles[0], {"pairs": pairs}, *whole.angles[2:]]
    some = replace(whole, angles=angles)
    assert some.empty("apis") == [9] and some.empty("people") == []
    assert len(some.pair("apis/round-1/skill", "apis/sft_t", "cosine").values) == SEEDS - 1
    assert len(some.share("apis", "layers").values) == SEEDS - 1
    assert "about apis in seed 9" in claims.injection_lifts(some).evidence
    assert "learnt nothing" not in claims.injection_lifts(whole).evidence
    assert verdicts(claims.nearly_orthogonal, some) == "holds, holds"


def test_a_report_without_the_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one pair x, y in the report, found 0"):
        find_pair({"pairs": []}, "x", "y")


def test_a_page_wants_finished_seeds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed-8: start is not done"):
        gather(tmp_path, [8], "mini")
