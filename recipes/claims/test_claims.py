"""The ten claims as the miniature has them: verdicts, what is said, what is left out."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from claim_seeds import GOOD, SEEDS, make_results

from skillvec.recipes.claims import rules
from skillvec.recipes.claims.claims import Claim
from skillvec.recipes.claims.figures import specs
from skillvec.recipes.claims.results import Results, find_pair
from skillvec.recipes.claims.rules import Spread, judge
from skillvec.recipes.claims.sections import judge_claims, summary
from skillvec.recipes.mini.claims import CLAIMS, share
from skillvec.recipes.mini.page import ARMS
from skillvec.recipes.mini.seed import PROBED, TWICE

(
    KNOWLEDGE_IS_NOT_ENOUGH,
    INJECTION_LIFTS,
    LAMBDA_CURVE,
    ROUNDS_HELP,
    ORDER_MATTERS,
    NEARLY_ORTHOGONAL,
    TARGET_RL,
    OTHER_DOMAINS,
    FORGETTING,
    HALF_PRECISION,
) = CLAIMS


def verdicts(make: Callable[[Results], Claim], found: Results) -> str:
    """Return the verdicts of a claim's parts, corrected over the parts of all claims."""
    parts = [part for each in CLAIMS for part in each(found).parts]
    own = {(part.name, test.name) for part in make(found).parts for test in part.tests}
    return ", ".join(
        verdict.word for verdict in judge(parts)
        if {(verdict.part.name, test.name) for test in verdict.part.tests} <= own
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "means", "expected"),
    [
        (KNOWLEDGE_IS_NOT_ENOUGH, {}, "holds"),
        (KNOWLEDGE_IS_NOT_ENOUGH, {"SFT_only": 0.95}, "does not hold"),
        (INJECTION_LIFTS, GOOD, "holds, holds"),
        (INJECTION_LIFTS, GOOD | {"random": 0.8}, "holds, not clear"),
        (INJECTION_LIFTS, GOOD | {"shuffled": 0.9}, "holds, does not hold"),
        (INJECTION_LIFTS, {}, "not clear, not clear"),
        (LAMBDA_CURVE, GOOD | {"lambda_1.5": 0.82}, "holds, holds"),
        (LAMBDA_CURVE, GOOD | {"lambda_1.5": 0.85}, "holds, not clear"),
        (LAMBDA_CURVE, GOOD | {"lambda_1.5": 0.9}, "holds, does not hold"),
        (LAMBDA_CURVE, GOOD | {"lambda_0.75": 0.9}, "does not hold, holds"),
        (ROUNDS_HELP, {"K = 2": 0.5}, "holds, not clear, not clear"),
        (ROUNDS_HELP, {"K = 2": 0.1}, "does not hold, not clear, not clear"),
        (ROUNDS_HELP, {f"K = 2, {TWICE}": 0.5}, "not clear, holds, holds"),
        (ORDER_MATTERS, GOOD, "holds, holds"),
        (ORDER_MATTERS, GOOD | {"pre-injection": 0.9}, "does not hold, holds"),
        (NEARLY_ORTHOGONAL, {}, "holds, holds"),
        (NEARLY_ORTHOGONAL, {"cosine": 0.12}, "does not hold, does not hold"),
        (NEARLY_ORTHOGONAL, {"cosine": 0.1}, "not clear, not clear"),
        (TARGET_RL, {"lambda_1": 0.2}, "holds"),
        (TARGET_RL, {"RL_on_the_target": 0.25}, "not clear"),
        (TARGET_RL, {"lambda_1": 0.9}, "does not hold"),
        (OTHER_DOMAINS, GOOD, "holds, not clear"),
        (OTHER_DOMAINS, {"skill_of_apis": 0.2}, "not clear, does not hold"),
        (FORGETTING, {"kl": 0.92}, "holds"),
        (FORGETTING, {"kl": 0.95}, "not clear"),
        (FORGETTING, {"kl": 0.98}, "does not hold"),
        (HALF_PRECISION, {}, "holds, holds, holds, holds"),
        (HALF_PRECISION, {"bits_1": 0.2}, "holds, holds, does not hold, holds"),
        (HALF_PRECISION, {"bits_0": 0.25}, "holds, holds, holds, not clear"),
    ],
)
def test_verdicts_follow_the_numbers(
    make: Callable[[Results], Claim], means: dict[str, Any], expected: str
) -> None:
    assert verdicts(make, make_results(**means)) == expected


def test_no_verdict_holds_below_the_least_number_of_seeds() -> None:
    parts = sum(len(make(make_results()).parts) for make in CLAIMS)
    least = rules.least_seeds(parts)
    # the smallest p of one seed fewer, times both p-values of every part, is above the level
    assert 2**-least * 2 * parts <= rules.ALPHA < 2 ** -(least - 1) * 2 * parts
    for seeds in (1, least - 1):
        judged = judge([part for make in CLAIMS for part in make(make_results(seeds)).parts])
        assert {verdict.word for verdict in judged} == {"too few seeds"}
        assert min(verdict.p_for for verdict in judged) > rules.ALPHA
    assert verdicts(INJECTION_LIFTS, make_results(least, **GOOD)) == "holds, holds"


def test_more_forgetting_is_said_even_if_it_is_within_the_margin() -> None:
    assert (
        "does forget more of the base about people and about apis"
        in FORGETTING(make_results(kl=0.92)).found
    )
    assert "does forget" not in FORGETTING(make_results()).found


def test_seeds_of_either_sign_do_not_cancel() -> None:
    claim = NEARLY_ORTHOGONAL(make_results(cosine=0.12))
    assert "largest cosine of v and an SFT update is 0.120 in size" in claim.found
    assert "| +0.000 ± 0.125 | 0.120 | 0.120 |" in claim.evidence


def test_seeds_in_which_injection_passes_rl_are_named() -> None:
    found = make_results(**GOOD | {"RL_on_the_target": 0.82})
    upper = found.exact("apis", "RL on the target").values
    found.scores["apis", "RL on the target", "exact"] = Spread((0.0, *upper[1:]))
    evidence = TARGET_RL(found).evidence
    assert "more than the margin for apis in seed 8. Where" in evidence


def test_a_seed_without_a_skill_is_named_and_counted() -> None:
    whole = make_results(**GOOD)
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
    assert len(share(some, "apis", "layers").values) == SEEDS - 1
    assert "about apis in seed 9" in INJECTION_LIFTS(some).evidence
    assert "learnt nothing" not in INJECTION_LIFTS(whole).evidence
    assert verdicts(NEARLY_ORTHOGONAL, some) == "holds, holds"


def test_a_report_without_the_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one pair x, y in the report, found 0"):
        find_pair({"pairs": []}, "x", "y")


# -------------------------------------------------------------------------------- what is left out


def without(found: Results, *arms: str) -> Results:
    kept = {key: spread for key, spread in found.scores.items() if key[1] not in arms}
    return replace(found, scores=kept)


@pytest.mark.parametrize(
    ("arms", "claim", "parts"),
    [
        (("K = 2",), ROUNDS_HELP, []),
        (("pre-injection",), ORDER_MATTERS, ["against sequential"]),
        (("pre-injection", "sequential"), ORDER_MATTERS, []),
        (("random", "shuffled"), INJECTION_LIFTS, ["over SFT only"]),
        (("bf16 vector",), HALF_PRECISION,
         [f"in {bits} of mantissa" for bits in ("2 bits", "1 bit", "0 bits")]),
        (("RL on the target",), TARGET_RL, []),
        (("SFT only",), KNOWLEDGE_IS_NOT_ENOUGH, []),
        (("lambda 0.25",), LAMBDA_CURVE, []),
        (("skill of apis", "skill of people"), OTHER_DOMAINS, []),
        (("lambda 1",), FORGETTING, []),
    ],
)  # fmt: skip
def test_an_arm_that_is_not_there_is_left_out(
    arms: tuple[str, ...], claim: Callable[[Results], Claim], parts: list[str]
) -> None:
    assert [part.name for part in claim(without(make_results(**GOOD), *arms)).parts] == parts


def test_an_arm_of_one_domain_alone_is_tested_there() -> None:
    found = make_results(**GOOD)
    scores = {key: each for key, each in found.scores.items() if key[:2] != ("apis", "sequential")}
    claim = ORDER_MATTERS(replace(found, scores=scores))
    assert [test.name for test in claim.parts[1].tests] == ["people: post-hoc less sequential"]
    assert "| sequential | 0.100 ± 0.007 | - |" in claim.evidence


def test_claims_without_numbers_keep_the_numbers_of_the_others() -> None:
    found = replace(without(make_results(**GOOD), "K = 2"), angles=[])
    judged = judge_claims([make(found) for make in CLAIMS])
    assert [*judged] == [1, 2, 3, 5, 7, 8, 9, 10]
    assert "[5](#5-post-hoc-beats-the-other-orders)" in summary(judged)
    assert {*specs(found, ARMS, PROBED)} == {"arms", "lambda", "forgetting"}
