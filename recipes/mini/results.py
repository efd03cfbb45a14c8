"""What the stages of all seeds of the miniature wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.claims.results import Results
from skillvec.recipes.claims.rules import Spread
from skillvec.recipes.mini.seed import DOMAINS, LAMBDAS, plan_seed
from skillvec.recipes.stages import read_marker


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
        angles, copies, tuple(seeds), DOMAINS, LAMBDAS,
    )  # fmt: skip
