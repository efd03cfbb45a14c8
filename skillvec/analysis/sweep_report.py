"""From the scores of a sweep's points to statements: differences from the target, what was found.

A point that is better by more than noise has a p of at most .05 after Holm's correction over all
lambdas: of a vector that does nothing, one sweep in twenty finds something. Controls are compared
at the lambda that was found best, one correction over them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from skillvec.analysis.differences import Difference, Measured, difference, error_of, holm
from skillvec.errors import printable
from skillvec.report import Line

ALPHA = 0.05  # how often a vector that does nothing is said to do something
TARGET, SKILL = "target", "skill"  # curves; the others are controls
MEASURED = ("gain", "cosine", "changed", "seconds", "attach_seconds")


@dataclass(frozen=True)
class Tried:
    """A point of a sweep and what came out of it: `scores` is empty unless it is done."""

    curve: str
    lam: float
    status: str
    message: str
    scores: Mapping[str, Measured]
    measured: Mapping[str, float | None]


@dataclass(frozen=True)
class Asked:
    """The metric that decides, and whether less of it is better."""

    metric: str
    less: bool

    def is_better(self, change: float) -> bool:
        return change < 0 if self.less else change > 0


def conclude(tried: Sequence[Tried], asked: Asked) -> dict[str, Any]:
    """Return the facts of a report: `points` with their differences, `best`, `found`, `controls`.

    The first point is the target itself, and it is done.
    """
    zero = tried[0].scores[asked.metric]
    rows = [_row(one) for one in tried]
    skill = [i for i, one in enumerate(tried) if one.curve == SKILL and asked.metric in one.scores]
    level = 1 - ALPHA / max(len(skill), 1)
    apart = {i: difference(tried[i].scores[asked.metric], zero, level) for i in skill}
    adjusted = dict(zip(skill, holm([apart[i].p for i in skill]), strict=True))
    for i in skill:
        rows[i] |= _facts(apart[i], adjusted[i])
    sign = -1 if asked.less else 1
    better = [i for i in skill if adjusted[i] <= ALPHA and asked.is_better(apart[i].mean)]
    best = max(better or skill, key=lambda i: sign * tried[i].scores[asked.metric].mean,
               default=None)  # fmt: skip
    beside = [] if best is None else _beside(tried, best, asked)
    return {
        "metric": asked.metric, "less_is_better": asked.less, "points": rows,
        "target_score": zero.mean, "best": None if best is None else rows[best],
        "found": bool(better), "compared": len(skill), "beside": beside,
        "is_known": any(one.standard_error is not None for one in apart.values()),
        "failed": [name_point(one.curve, one.lam) for one in tried if not one.scores],
    }  # fmt: skip


def name_point(curve: str, lam: float) -> str:
    """Return what a point is called."""
    return {TARGET: "target", SKILL: f"lambda {lam:g}"}.get(curve, f"{curve} {lam:g}")


def _row(one: Tried) -> Line:
    scores = {
        name: {"mean": score.mean, "standard_error": error_of(score), "items": len(score.values)}
        for name, score in one.scores.items()
    }
    return {"curve": one.curve, "lam": one.lam, "status": one.status, "message": one.message,
            "scores": scores, **{key: one.measured.get(key) for key in MEASURED}}  # fmt: skip


def _facts(apart: Difference, adjusted: float) -> Line:
    """Return what a row says of a difference; ends that are not known are None."""
    low, high = (end if isfinite(end) else None for end in (apart.low, apart.high))
    return {"difference": apart.mean, "difference_error": apart.standard_error, "low": low,
            "high": high, "p": adjusted, "is_paired": apart.is_paired}  # fmt: skip


def _beside(tried: Sequence[Tried], best: int, asked: Asked) -> list[Line]:
    """Return how the best point stands beside each control at the same lambda."""
    point = tried[best]
    same = [one for one in tried if one.curve not in (TARGET, SKILL) and one.lam == point.lam
            and asked.metric in one.scores]  # fmt: skip
    level = 1 - ALPHA / max(len(same), 1)
    ours = point.scores[asked.metric]
    apart = [difference(ours, one.scores[asked.metric], level) for one in same]
    return [
        {"control": one.curve, "score": one.scores[asked.metric].mean, **_facts(found, p),
         "beaten": p <= ALPHA and asked.is_better(found.mean)}
        for one, found, p in zip(same, apart, holm([one.p for one in apart]), strict=True)
    ]  # fmt: skip


def csv_text(points: Sequence[Line]) -> str:
    """Return the points as CSV: a row each, two columns for each metric."""
    from skillvec.analysis.report_csv import table_text  # with csv

    metrics = dict.fromkeys(name for point in points for name in point["scores"])
    rows = []
    for point in points:
        row = {key: point[key] for key in ("curve", "lam", "status")}
        for name in metrics:
            score = point["scores"].get(name, {})
            row |= {name: score.get("mean"), f"{name} standard error": score.get("standard_error")}
        row |= {key: value for key, value in point.items() if key != "scores"}
        rows.append(row | {"message": printable(point["message"])})
    return table_text(rows)
