"""What the stages of all seeds wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillvec.recipes.mini.rules import Spread
from skillvec.recipes.mini.seed import DOMAINS, plan_seed
from skillvec.recipes.stages import read_marker


@dataclass(frozen=True)
class Results:
    """What the stages of all seeds wrote."""

    scores: dict[tuple[str, str, str], Spread]  # (target, arm, metric)
    seconds: dict[str, Spread]  # stage
    angles: list[dict[str, Any]]  # report.json of each seed
    copies: dict[str, list[dict[str, Any]]]  # domain: of v and what stands in its place
    seeds: tuple[int, ...]

    def exact(self, domain: str, arm: str) -> Spread:
        return self.scores[domain, arm, "exact"]

    def probe(self, domain: str, arm: str, metric: str) -> Spread:
        return self.scores[f"{domain} probe", arm, metric]

    def pair(self, a: str, b: str, key: str, part: str = "overall") -> Spread:
        """Return a number of two deltas, named by the ends of their labels: of all weights, or of a
        part of the model.

        Seeds in which one of them is zero, and has no angle, are left out.
        """
        rows = [find_row(find_pair(report, a, b), part) for report in self.angles]
        return Spread(tuple(row[key] for row in rows if row[key] is not None))

    def share(self, domain: str, arm: str) -> Spread:
        """Return the share of v's squared norm that a part of v has, or its copy of a rank."""
        if arm == "residual":
            return self.share(domain, "layers") - self.share(domain, "rank 4")
        found = []
        for report, copies in zip(self.angles, self.copies[domain], strict=True):
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
    angles: list[dict[str, Any]] = []
    copies: dict[str, list[dict[str, Any]]] = {domain: [] for domain in DOMAINS}
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
        for domain in DOMAINS:
            report = line.out / domain / "copies" / "angles" / "report.json"
            copies[domain].append(json.loads(report.read_text()))
    return Results(
        {key: Spread(tuple(values)) for key, values in scores.items()},
        {key: Spread(tuple(values)) for key, values in seconds.items()},
        angles, copies, tuple(seeds),
    )  # fmt: skip


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
