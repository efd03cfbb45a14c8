"""Scores of the arms of a single-passage run: one file an arm, and one table of all.

Hides the sums; layout and rules are those of recipes/evaluate.py. Invariants: a passage is the unit
of the standard error; answers are on the disk before a judge is asked, so a judge that fails costs
no generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillvec.recipes.evaluate import JUDGE, METRICS, summarize, write_scores
from skillvec.recipes.judges import Judge
from skillvec.recipes.training import load_function


@dataclass(frozen=True)
class Scoring:
    """The metrics of a run, and the judge where one of them needs it."""

    metrics: tuple[str, ...]
    judge: Judge | None

    @classmethod
    def check(cls, metrics: Sequence[str], judge: str) -> Scoring:
        """Refuse unknown metrics, and try the judge before hours of training."""
        unknown = [name for name in metrics if name not in (*METRICS, JUDGE)]
        if unknown or not metrics:
            raise ValueError(
                f"metrics: expected {', '.join((*METRICS, JUDGE))}, "
                f"found {', '.join(unknown) or 'none'}"
            )
        asked = load_function(judge)() if JUDGE in metrics else None
        if asked:
            asked.score("Which is the first letter of the alphabet?", "A", ["A"])
        return cls(tuple(metrics), asked)

    def marks(self, rows: Sequence[Mapping[str, Any]], said: Sequence[str]) -> dict[str, list]:
        """Return the marks of every metric, in the order of the rows."""
        marks: dict[str, list[float]] = {}
        for name in self.metrics:
            if name == JUDGE and self.judge:
                items = [
                    (r["question"], text, r["answer"]) for r, text in zip(rows, said, strict=True)
                ]
                marks[name] = self.judge.score_all(items)
            else:
                marks[name] = [
                    METRICS[name](text, row["answer"]) for row, text in zip(rows, said, strict=True)
                ]
        return marks


def write_arm(
    file: Path,
    rows: Sequence[Mapping[str, Any]],
    said: Sequence[str],
    scoring: Scoring,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Score an arm, write its file and return what is in it; `facts`: model, data, settings."""
    marks = scoring.marks(rows, said)
    groups = [row["group"] for row in rows]
    scores = dict(facts) | {
        "metrics": {name: summarize(found, groups) for name, found in marks.items()},
        "questions": len(rows),
        "groups": len(set(groups)),
        "answers": [
            dict(row) | {"said": text} | {name: found[i] for name, found in marks.items()}
            for i, (row, text) in enumerate(zip(rows, said, strict=True))
        ],
    }
    write_scores(scores, file)
    return scores


def show(arms: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> None:
    """Print one line an arm: mean and standard error of every metric."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="closed book, one passage at a time", title_justify="left")
    table.add_column("arm")
    for name in metrics:
        table.add_column(name, justify="right")
        table.add_column("s.e.", justify="right")
    for arm, scores in arms.items():
        cells = []
        for name in metrics:
            error = scores["metrics"][name]["standard_error"]
            cells += [
                f"{scores['metrics'][name]['mean']:.3f}",
                "-" if error is None else f"{error:.3f}",
            ]
        table.add_row(arm, *cells)
    Console().print(table)
