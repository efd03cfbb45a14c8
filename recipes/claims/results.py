"""What the seeds of an experiment measured: the numbers that claims, figures and pages read.

An experiment asks about some domains (people, tools) and knows models by the names of its arms.
What it did not measure in every seed is not in its results, and is left out of every table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skillvec.recipes.claims.rules import Spread


@dataclass(frozen=True)
class Results:
    """Numbers of all seeds, in the order of `seeds`.

    `scores`: of (target, arm, metric); a target is a domain, or "DOMAIN probe". `seconds`: of a
    stage. `angles`: the report of `skillvec orthogonality` of each seed; none: not measured.
    `copies`: of a domain that has them, such a report of each seed about v and what stands in its
    place. `lambdas`: those that v was added with. `pictures`: how its figures' addresses begin.
    """

    scores: dict[tuple[str, str, str], Spread]
    seconds: dict[str, Spread]
    angles: list[dict[str, Any]]
    copies: dict[str, list[dict[str, Any]]]
    seeds: tuple[int, ...]
    domains: tuple[str, ...]
    lambdas: tuple[float, ...]
    pictures: str = "images/"

    @property
    def curve(self) -> dict[float, str]:
        """Return the arm of every lambda, in their order; 0 is the target without v."""
        lambdas = sorted((*self.lambdas, 0.0))
        return {lam: f"lambda {lam:g}" if lam else "SFT only" for lam in lambdas}

    def where(self, *arms: str, **probed: tuple[str, ...]) -> tuple[str, ...]:
        """Return the domains that were asked of all these arms, and probed for each metric."""
        return tuple(
            domain
            for domain in self.domains
            if all((domain, arm, "exact") in self.scores for arm in arms)
            and all((f"{domain} probe", arm, metric) in self.scores
                    for metric, each in probed.items() for arm in each)
        )  # fmt: skip

    def exact(self, domain: str, arm: str) -> Spread:
        return self.scores[domain, arm, "exact"]

    def show(self, domain: str, arm: str, metric: str = "exact") -> str:
        """Return a score in words, of a target or a domain's probe; a dash where there is none."""
        found = self.scores.get((domain, arm, metric))
        return found.show() if found else "-"

    def probe(self, domain: str, arm: str, metric: str) -> Spread:
        return self.scores[f"{domain} probe", arm, metric]

    def pair(self, a: str, b: str, key: str, part: str = "overall") -> Spread:
        """Return a number of two deltas, named by the ends of their labels: of all weights, or of a
        part of the model.

        Seeds in which one of them is zero, and has no angle, are left out.
        """
        rows = [find_row(find_pair(report, a, b), part) for report in self.angles]
        return Spread(tuple(row[key] for row in rows if row[key] is not None))

    def empty(self, domain: str) -> list[int]:
        """Return the seeds in which RL changed nothing: it never met a reward, and v is zero."""
        name = f"{domain}/round-1/skill"
        found: list[int] = []
        if not self.angles:
            return found
        for seed, report in zip(self.seeds, self.angles, strict=True):
            row = find_pair(report, name, f"{domain}/sft_t")["overall"]
            found += [seed] * (row["norm_a"] == 0)
        return found


def find_pair(report: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    """Return the pair whose labels hold `a` and `b`, such as people/sft_t."""
    found = [pair for pair in report["pairs"] if a in str(pair["a"]) and b in str(pair["b"])]
    if len(found) != 1:
        raise ValueError(f"expected one pair {a}, {b} in the report, found {len(found)}")
    return found[0]


def find_row(pair: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the numbers of all weights, or of a part of the model: layers, outside."""
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in pair["parts"]}
    return (rows | {"overall": pair["overall"]})[part]


NAMES = {
    "lambda 1": "post-hoc: + v",
    "lambda -1": "- v",
    "lambda 2": "+ 2 v",
    "random": "+ random, norm of v",
    "shuffled": "+ v shuffled",
    "pre-injection": "pre-injection",
    "sequential": "sequential",
    "bf16 vector": "v of bf16 checkpoints",
    "all in bf16": "the same, on a bf16 target",
    "bits 2": "v of checkpoints of 2 bits",
    "bits 1": "v of checkpoints of 1 bit",
    "bits 0": "v of checkpoints of 0 bits",
    "layers": "layers of v alone",
    "embeddings": "outside of the layers alone",
    "rank 4": "rank 4 of v's layers",
    "rank 1": "rank 1 of v's layers",
    "residual": "layers of v without rank 4",
}
