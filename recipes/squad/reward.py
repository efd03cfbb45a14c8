"""The reward of reinforcement learning on closed-book questions.

Hides which of two rules pays: the yes/no judge where JUDGE_URL is set, else F1 with the best of the
answers (SQuAD's normalisation). What the paper rewards is not known in detail; both are our choice.
An empty completion earns 0. A judge that fails raises JudgeError, which ends the training: a zero
in its place would teach the model that right answers are wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def reward(
    completions: Sequence[str | list[dict[str, str]]],
    answer: Sequence[str | list[str]],
    question: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    """Return one number in 0..1 a completion; TRL gives the columns by keyword.

    Raises:
        ValueError: an empty answer key, or a judge without the column `question`.
        skillvec.recipes.judges.JudgeError: the judge fails for good.
    """
    from skillvec.recipes.judges import f1
    from skillvec.recipes.squad.judge import judge

    said = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    golds = [[gold] if isinstance(gold, str) else list(gold) for gold in answer]
    if not os.environ.get("JUDGE_URL"):
        return [f1(text, gold) for text, gold in zip(said, golds, strict=True)]
    if question is None:
        raise ValueError("reward: the judge needs the column 'question'; add it to the rows")
    return judge().score_all(list(zip(question, said, golds, strict=True)))
