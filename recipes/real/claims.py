"""The claims of the real model: the ten of recipes/claims, with what a real model adds to them.

Answers are marked twice, as exact and as containing the gold's words, so that what RL teaches of
form and what it teaches of use are told apart; and every model is asked what the base knew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from skillvec.recipes.claims import claims
from skillvec.recipes.claims.claims import Claim, table
from skillvec.recipes.claims.results import NAMES, Results
from skillvec.recipes.claims.rules import Spread, better

ACROSS = (
    "Facts about people are asked for in questions and answered by a word; tools by a call such as"
    " `load(path)`, of which the function and its argument have to be known. Within a domain S and"
    " T share no name. Across: the skill of answering about one domain, added to a model that was"
    " told about the other."
)
TEXTS = "texts that the base itself wrote"
COPIES = {"bf16": ("in bf16", "bf16 vector", "all in bf16")}
ROUNDED = (
    "Both models of the skill, theta_rl_S and theta_sft_S, are trained in fp32 and rounded to bf16"
    " before one is taken from the other. The difference is added to the fp32 target, and to the"
    " target in bf16. Values changed, cosine and norm are means over seeds of both domains. What a"
    " training in bf16 keeps, and what a learning rate does to it, stands below, under the regimes"
    " of a bf16 skill."
)
FORGETTING = ("told", "kl", "perplexity")  # what the shared claims read of a probe


def knowledge_is_not_enough(results: Results) -> Claim:
    """SFT against what it was told, and the gain of v cut in two: form, and knowledge that is used.

    A reply may hold the answer among other words. What v adds to the replies that hold it at all is
    use; the rest of what it adds to exact answers is form.
    """
    claim = claims.knowledge_is_not_enough(results)
    used = {d: _gap(results, d, "contains") for d in results.where("SFT only", "lambda 1")
            if all((d, arm, "contains") in results.scores
                   for arm in ("SFT only", "lambda 1"))}  # fmt: skip
    if not used or not claim.parts:
        return claim
    rows, said = [], []
    for d, use in used.items():
        whole = _gap(results, d, "exact")
        form = Spread((whole - use).values)
        rows.append([d, *(results.show(d, arm, metric) for arm in ("SFT only", "lambda 1")
                          for metric in ("contains", "exact")),
                     whole.show("+.3f"), use.show("+.3f"), form.show("+.3f")])  # fmt: skip
        share = f" ({use.mean / whole.mean:.0%} of it)" if whole.mean > 0 else ""
        said.append(f"of the gain of v about {d}, {whole.mean:+.3f}, {use.mean:+.3f}{share} is use"
                    f" and {form.mean:+.3f} form")  # fmt: skip
    heads = ["", "SFT holds it", "SFT is exact", "SFT + v holds it", "SFT + v is exact", "gain",
             "of it use", "of it form"]  # fmt: skip
    text = (
        "\n\n*Holds it*: the words of the answer stand in the reply, among others or alone. What v"
        " adds to that is knowledge that is used now and was not before; the rest of what it adds"
        " to exact answers is form: replies that held the answer and now are nothing but it.\n\n"
    )
    tests = {f"{d}: replies with the answer, + v less SFT only": use for d, use in used.items()}
    return replace(
        claim,
        parts=(
            replace(claim.parts[0], name="by facts that are told and not answered"),
            better("by what v adds beyond form", tests),
        ),
        found=f"{claim.found}; {'; '.join(said)}",
        evidence=f"{claim.evidence}{text}{table(heads, rows)}",
    )


def _gap(results: Results, domain: str, metric: str) -> Spread:
    """Return what v adds at lambda 1 to a metric of a domain."""
    return results.scores[domain, "lambda 1", metric] - results.scores[domain, "SFT only", metric]


def forgetting(results: Results) -> Claim:
    """What injection costs of the base, with every other number that a probe measured."""
    claim = claims.forgetting(results, TEXTS)
    kept = sorted({metric for target, _, metric in results.scores
                   if target.endswith(" probe") and metric not in FORGETTING})  # fmt: skip
    if not kept or not claim.parts:
        return claim
    arms = [arm for arm in ("base", "SFT only", "lambda 1", "lambda 2", "lambda -1", "random",
                            "shuffled", "pre-injection", "sequential", "RL on the target")
            if any((f"{d} probe", arm, kept[0]) in results.scores
                   for d in results.domains)]  # fmt: skip
    rows = [[NAMES.get(arm, arm), *(results.show(f"{d} probe", arm, metric) for metric in kept
                                    for d in results.domains)] for arm in arms]  # fmt: skip
    heads = ["model", *(f"{metric}, {d}" for metric in kept for d in results.domains)]
    text = "\n\nThe same models, asked everyday questions that no training here was about:\n\n"
    return replace(claim, evidence=f"{claim.evidence}{text}{table(heads, rows)}")


def list_claims(completions: int) -> Sequence[Callable[[Results], Claim]]:
    """Return the ten claims; RL on the target sampled so many completions."""
    return (
        knowledge_is_not_enough,
        claims.injection_lifts,
        claims.lambda_curve,
        claims.rounds_help,
        claims.order_matters,
        claims.nearly_orthogonal,
        partial(claims.target_rl, completions=completions),
        partial(claims.other_domains, note=ACROSS),
        forgetting,
        partial(claims.half_precision, copies=COPIES, note=ROUNDED),
    )


# what a seed was asked and measured for a claim: (target, arm), or the name of a stage
EVIDENCE: dict[int, tuple[tuple[str, str] | str, ...]] = {
    1: (("people", "SFT only"), ("people probe", "SFT only")),
    2: ("people/round-1/skill.safetensors", ("people", "lambda 1"), ("people", "random")),
    3: (("people", "lambda 0.5"),),
    4: (("people", "K = 2"),),
    5: (("people", "pre-injection"), ("people", "sequential")),
    6: ("angles",),
    7: (("people", "RL on the target"),),
    8: (("people", "skill of tools"),),
    9: (("people probe", "lambda 1"),),
    10: (("people", "bf16 vector"), "people/copies/angles"),
}

# each part of a claim in plain words; what another part says already has none
PLAIN = {
    (1, "by facts that are told and not answered"):
        "texts put facts into the model that it then does not answer with",
    (1, ""): "texts put facts into the model that it then does not answer with",
    (1, "by what v adds beyond form"): "the skill adds answers, and not their form alone",
    (2, "over SFT only"): "the skill lifts answers about subjects that RL never saw",
    (2, "over noise of its size"): "it lifts them more than noise of its size",
    (3, "against smaller lambdas"): "lambda 1 is no worse than 0.5 and 0.75",
    (3, "against larger lambdas"): "lambda 1 is no worse than 1.25 and 1.5",
    (4, "at equal steps"): "two rounds of RL beat one with as many steps",
    (5, "against pre-injection"): "adding the skill after SFT beats adding it before",
    (5, "against sequential"): "adding the skill beats SFT on top of RL",
    (6, "of all weights"): "the updates of RL and SFT are nearly orthogonal",
    (6, "of layers"): "they are so in the layers alone",
    (7, ""): "RL on the target itself is no worse than the skill",
    (8, "across domains"): "the skill of one domain helps in the other",
    (9, ""): "adding the skill forgets hardly more of the base",
    (10, "in bf16"): "a skill of checkpoints that were rounded to bf16 does as well",
}  # fmt: skip
