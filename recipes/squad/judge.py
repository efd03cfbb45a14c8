"""The yes/no judge of closed-book answers, after SEAL's rule.

Hides the wording. The rule is SEAL's: right is what conveys the gold answer in full and does not
contradict it; more may be said. The words are our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skillvec.recipes.judges import Judge

VERDICTS = {"yes": 1.0, "no": 0.0}
TEMPLATE = """\
You mark answers to a quiz. Use only the gold answer below, nothing that you know yourself.
An answer is right if it conveys all of the gold answer and contradicts none of it. It may say more.
Wording and style do not matter. Of several gold answers, with / between them, one is enough.

Question: {question}
Gold answer: {gold}
Answer to mark: {said}

Is the answer right? Say one word, yes or no."""


def judge() -> Judge:
    """Return the judge that JUDGE_URL, JUDGE_MODEL and JUDGE_KEY name; ValueError without them."""
    from skillvec.recipes.judges import Judge

    return Judge.from_environment(template=TEMPLATE, verdicts=VERDICTS)
