"""The claims of the miniature: the ten of recipes/claims, and what it alone tries.

These are a vector of checkpoints of few bits, rounds of twice the steps, parts of v and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from skillvec.recipes.claims import claims
from skillvec.recipes.claims.claims import Claim, gain, gained, table
from skillvec.recipes.claims.results import NAMES, Results, find_pair, find_row
from skillvec.recipes.claims.rules import Spread
from skillvec.recipes.mini.seed import BITS, DOMAINS, SETTINGS, TWICE
from skillvec.recipes.past import read_config


def target_rl(results: Results) -> Claim:
    rl = read_config(SETTINGS).rl
    return claims.target_rl(results, int(rl["max_steps"] * rl["per_device_train_batch_size"]))


def what_carries(results: Results) -> str:
    """Return the text about parts of v and its low-rank copies, which no claim is about."""
    rows = [["v", "100%", *gain(results, "lambda 1")]]
    for arm in ("layers", "embeddings", "rank 4", "rank 1", "residual"):
        shares = [share(results, d, arm).mean for d in DOMAINS]
        rows.append([NAMES[arm], " / ".join(f"{one:.0%}" for one in shares),
                     *gain(results, arm)])  # fmt: skip
    heads = ["added to theta_sft_T", f"squared norm of v, {' / '.join(DOMAINS)}",
             *gained(results)]  # fmt: skip
    return table(heads, rows)


def share(results: Results, domain: str, arm: str) -> Spread:
    """Return the share of v's squared norm that a part of v has, or its copy of a rank."""
    if arm == "residual":
        return share(results, domain, "layers") - share(results, domain, "rank 4")
    found = []
    for report, copies in zip(results.angles, results.copies[domain], strict=True):
        if arm.startswith("rank"):  # best factors are a projection of v
            name = f"copies/{arm.replace(' ', '-')}"
            cosine = find_pair(copies, f"{domain}/round-1/skill", name)["overall"]["cosine"]
            found += [] if cosine is None else [cosine**2]
            continue
        pair = find_pair(report, f"{domain}/round-1/skill", f"{domain}/sft_t")
        layers, whole = find_row(pair, "layers")["norm_a"], pair["overall"]["norm_a"]
        within = (layers / whole) ** 2 if whole else None
        found += [] if within is None else [within if arm == "layers" else 1 - within]
    return Spread(tuple(found))


COPIES = {  # folder: title, and the arms that it was added in
    "bf16": ("in bf16", "bf16 vector", "all in bf16"),
    **{f"bits-{bits}": (f"in {bits} bit{'s' * (bits != 1)} of mantissa", f"bits {bits}")
       for bits in BITS},
}  # fmt: skip
ROUNDED = (
    "The updates of this miniature are large (the learning rate of RL is 300 times that of the"
    " paper's tool training), so bf16, which has 7 bits of mantissa, rounds little away."
    " Where the authors train, most changes of a bf16 model are lost"
    " ([docs/orthogonality.md](orthogonality.md)); to see what that costs, theta_rl_S and"
    " theta_sft_S are rounded to so few bits that as many are lost here, before one is taken"
    " from the other, and the difference is added to the fp32 target. Values changed, cosine"
    " and norm are means over seeds of both domains."
)
ACROSS = (
    "Calls learned on one set of APIs, used on another; and across: the skill of answering"
    " about people on APIs, which are asked for and called in words of their own."
)
CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    claims.knowledge_is_not_enough,
    claims.injection_lifts,
    claims.lambda_curve,
    partial(claims.rounds_help, longer=TWICE),
    claims.order_matters,
    claims.nearly_orthogonal,
    target_rl,
    partial(claims.other_domains, note=ACROSS),
    partial(
        claims.forgetting,
        texts="the texts about the general population that the base was trained on",
    ),
    partial(claims.half_precision, copies=COPIES, note=ROUNDED),
)
