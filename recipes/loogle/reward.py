"""Scoring LooGLE answers: the answer in a reply, the judge, and the reward for RL.

Hides the tags and the judge's question. Invariants: what is judged is the content of the first
<answer> tag, or the whole reply where there is none; an empty answer is wrong. With JUDGE_URL set
the reward is the judge's verdict, and a judge that fails stops the training; without it, F1 (a
warning says so once).
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from skillvec.recipes.judges import Judge, f1

TRUE_FALSE = {"true": 1.0, "false": 0.0}
SAME_MEANING = (
    "Question: {question}\nReference answer: {gold}\nPredicted answer: {said}\n\n"
    "As answers to this question, do the reference and the predicted answer mean the same? "
    "Reply with one word: True or False."
)


def answer_of(reply: str) -> str:
    """Return what stands in the first <answer> tag, closed or cut off; else the whole reply."""
    tagged = re.search(r"(?is)<answer>(.*?)(?:</answer>|\Z)", reply)
    return tagged[1].strip() if tagged else reply.strip()


def judge() -> Judge:
    """Return the judge of JUDGE_URL, JUDGE_MODEL and JUDGE_KEY: same meaning, true or false."""
    return Judge.from_environment(template=SAME_MEANING, verdicts=TRUE_FALSE)


def reward(
    completions: Sequence[str | list[dict[str, str]]],
    answer: Sequence[str],
    question: Sequence[str],
    **_: Any,
) -> list[float]:
    """Reward every completion (text or messages) with 0 to 1; TRL passes columns by keyword.

    Raises:
        JudgeError: where a judge is set and gives no verdict.
    """
    replies = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    said = [answer_of(reply) for reply in replies]
    if os.environ.get("JUDGE_URL"):
        return judge().score_all(list(zip(question, said, answer, strict=True)))
    _say_f1()
    return [f1(one, gold) for one, gold in zip(said, answer, strict=True)]


@functools.cache
def _say_f1() -> None:
    logging.getLogger(__name__).warning("JUDGE_URL is not set: answers are rewarded by F1")
