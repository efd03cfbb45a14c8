"""The reward of the miniature: 1 for the exact answer, else 0; the same rule as the evaluation."""

from __future__ import annotations

from typing import Any

from skillvec.recipes.judges import exact_match


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Score completions; TRL passes the columns of the data by keyword."""
    return [exact_match(said, gold) for said, gold in zip(completions, answer, strict=True)]
