"""The three-way judge of a dialogue: solved, partial or unsolved."""

from __future__ import annotations

from typing import Any

from skillvec.recipes.judges import Judge

VERDICTS = {"solved": 1.0, "partial": 0.5, "unsolved": 0.0}
TEMPLATE = (
    "You grade how an assistant served a user. You see the request, then everything that the "
    "assistant thought and called, with the results, and its final answer.\n\n"
    "solved: the calls succeeded, and the final answer is right by their results and covers every "
    "part of the request.\n"
    "partial: some calls succeeded, but the final answer misses a part or has small errors.\n"
    "unsolved: the calls failed, or the final answer is missing, wrong, or not what the results "
    "say.\n\nRequest:\n{question}\n\nAssistant:\n{said}\n\n"
    "Reply with one word: solved, partial or unsolved."
)


def judge_from_environment(**fields: Any) -> Judge:
    """Return the three-way judge at JUDGE_URL; ValueError says what to set."""
    return Judge.from_environment(template=TEMPLATE, verdicts=VERDICTS, **fields)
