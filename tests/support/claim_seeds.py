"""Seeds of an experiment as claims read them, made of numbers that a test gives."""

import itertools
from typing import Any

import numpy as np

from skillvec.recipes.claims.results import Results
from skillvec.recipes.claims.rules import Spread
from skillvec.recipes.mini.seed import BITS, LAMBDAS, TWICE

SEEDS = 12
GOOD = {"lambda_1": 0.8, "sequential": 0.1, "RL_on_the_target": 0.9, "lambda_2": 0.7}
ARMS = ("base", "SFT only", "SFT on S", "RL on S", "random", "shuffled", "pre-injection",
        "sequential", "RL on the target", "both skills", "K = 2", f"K = 1, {TWICE}",
        f"K = 2, {TWICE}", "bf16 vector", "all in bf16", "skill of people",
        "layers", "embeddings", "rank 4", "rank 1", "residual",
        *(f"bits {bits}" for bits in BITS), *(f"lambda {lam:g}" for lam in LAMBDAS))  # fmt: skip
STEPS = np.linspace(-0.01, 0.01, SEEDS)


def spread(mean: float, seeds: int, order: int) -> Spread:
    """Return seeds around a mean, in an order of the arm's own: no two arms rise together."""
    steps = np.random.default_rng(order).permutation(STEPS)[:seeds]
    return Spread(tuple(float(mean + step) for step in steps))


def make_results(
    seeds: int = SEEDS, kl: float = 0.9, cosine: float = 0.01, other: str = "apis", **means: float
) -> Results:
    """Return seeds in which every arm has .3 ± .01 but those given (as lambda_1=.8)."""
    domains = ("people", other)
    named = {key.replace("_", " "): mean for key, mean in means.items()}
    scores = {}
    for k, (domain, arm) in enumerate(itertools.product(domains, (*ARMS, f"skill of {other}"))):
        scores[domain, arm, "exact"] = spread(named.get(arm, 0.3), seeds, k)
        for metric in ("told", "kl", "perplexity"):
            mean = kl if (metric, arm) == ("kl", "lambda 1") else 0.9
            scores[f"{domain} probe", arm, metric] = spread(mean, seeds, k + 100)
    times = {f"{d}/{stage}": Spread((2.0,) * seeds) for d in domains
             for stage in ("rl_t", "lambda_1")}  # fmt: skip
    labels = [f"out/{d}/{name}" for d in domains
              for name in ("round-1/skill.safetensors", "round-1/sft::b", "sft_t::b")]  # fmt: skip
    copies = {d: [make_report(copied(d), 0.8)] * seeds for d in domains}
    signs = (-1) ** np.arange(seeds)
    angles = [make_report(labels, cosine * sign) for sign in signs]
    numbers = tuple(range(8, 8 + seeds))
    return Results(scores, times, angles, copies, numbers, domains, LAMBDAS)


def copied(domain: str) -> list[str]:
    names = ("bf16/skill", *(f"bits-{bits}/skill" for bits in BITS), "rank-1", "rank-4")
    return [f"out/{domain}/round-1/skill", *(f"out/{domain}/copies/{name}" for name in names)]


def make_report(labels: list[str], cosine: float) -> dict[str, Any]:
    row = {"cosine": cosine, "p": 0.01, "control_cosine": 0.0, "density_b": 0.9, "norm_a": 2.0,
           "norm_ratio": 0.5}  # fmt: skip
    parts = [row | {"name": "layers", "norm_a": 1.0}, row | {"name": "outside"}]
    cells = [row | {"name": f"model.layers.{k}.self_attn.q_proj.weight"} for k in (0, 1)]
    layers = [row | {"name": f"model.layers.{k}"} for k in (0, 1)]
    pairs = [{"a": a, "b": b, "overall": row, "parts": parts, "layers": layers, "tensors": cells}
             for a, b in itertools.combinations(labels, 2)]  # fmt: skip
    return {"pairs": pairs}
