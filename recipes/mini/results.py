"""What the stages of all seeds wrote, and the spread of a number over seeds.

A number over seeds is mean ± standard deviation, and two arms are compared seed by seed: a
difference counts when the 95 % Student interval of its mean leaves out 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from skillvec.recipes.mini.seed import plan_seed
from skillvec.recipes.stages import read_marker


@dataclass(frozen=True)
class Spread:
    """One number of every seed."""

    values: tuple[float, ...]

    def __sub__(self, other: Spread) -> Spread:
        return Spread(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Student interval of the mean; all reals from one seed."""
        from scipy.stats import t

        if len(self.values) < 2:
            return float("-inf"), float("inf")
        n = len(self.values)
        half = float(t.ppf(0.975, n - 1)) * stdev(self.values) / n**0.5
        return self.mean - half, self.mean + half

    def above(self, limit: float = 0.0) -> bool:
        return self.interval()[0] > limit

    def below(self, limit: float = 0.0) -> bool:
        return self.interval()[1] < limit

    def show(self, form: str = ".3f") -> str:
        spread = f" ± {stdev(self.values):{form.lstrip('+')}}" if len(self.values) > 1 else ""
        return f"{self.mean:{form}}{spread}"


@dataclass(frozen=True)
class Results:
    """What the stages of all seeds wrote."""

    scores: dict[tuple[str, str, str], Spread]  # (target, arm, metric)
    seconds: dict[str, Spread]  # stage
    angles: list[dict[str, Any]]  # report.json of each seed
    bf16: list[dict[str, Any]]
    seeds: tuple[int, ...]

    def exact(self, domain: str, arm: str) -> Spread:
        return self.scores[domain, arm, "exact"]

    def probe(self, domain: str, arm: str, metric: str) -> Spread:
        return self.scores[f"{domain} probe", arm, metric]

    def pair(self, a: str, b: str, key: str) -> Spread:
        """Return an overall number of two deltas, named by the ends of their labels.

        Seeds in which one of them is zero, and has no angle, are left out.
        """
        rows = [find_pair(report, a, b)["overall"] for report in self.angles]
        return Spread(tuple(row[key] for row in rows if row[key] is not None))

    def empty(self, domain: str) -> list[int]:
        """Return the seeds in which RL changed nothing: it never met a reward, and v is zero."""
        name = f"{domain}/round-1/skill"
        found = []
        for seed, report in zip(self.seeds, self.angles, strict=True):
            row = find_pair(report, name, f"{domain}/sft_t")["overall"]
            found += [seed] * (row["norm_a"] == 0)
        return found


def gather(out: Path, seeds: Sequence[int], size: str) -> Results:
    """Read every score, time and angle; ValueError names a stage that is not done."""
    scores: dict[tuple[str, str, str], list[float]] = {}
    seconds: dict[str, list[float]] = {}
    angles, bf16 = [], []
    for seed in seeds:
        line = plan_seed(out / f"seed-{seed}", seed, size)
        for stage in line.stages:
            marker = read_marker(line, stage)
            if not marker.get("finished"):
                raise ValueError(f"{line.out}: {stage.name} is not done")
            seconds.setdefault(stage.name, []).append(marker["seconds"])
        for (target, arm), path in line.scores.items():
            for metric, value in json.loads(path.read_text())["metrics"].items():
                scores.setdefault((target, arm, metric), []).append(value["mean"])
        angles.append(json.loads((line.out / "angles" / "report.json").read_text()))
        bf16.append(json.loads((line.out / "bf16" / "angles" / "report.json").read_text()))
    return Results(
        {key: Spread(tuple(values)) for key, values in scores.items()},
        {key: Spread(tuple(values)) for key, values in seconds.items()},
        angles, bf16, tuple(seeds),
    )  # fmt: skip


def find_pair(report: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    """Return the pair whose labels hold `a` and `b`, such as people/sft_t."""
    found = [pair for pair in report["pairs"] if a in str(pair["a"]) and b in str(pair["b"])]
    if len(found) != 1:
        raise ValueError(f"expected one pair {a}, {b} in the report, found {len(found)}")
    return found[0]


NAMES = {
    "lambda 1": "post-hoc: + v",
    "lambda -1": "- v",
    "lambda 2": "+ 2 v",
    "random": "+ random, norm of v",
    "shuffled": "+ v shuffled",
    "pre-injection": "pre-injection",
    "sequential": "sequential",
}
