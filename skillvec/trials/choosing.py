"""What a search is after, which trial it takes, and whether that is more than lambda = 1.

The search items choose; the report items, which no sampler has seen, are asked once and judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skillvec.analysis.differences import Difference, contrast
from skillvec.trials.scores import Score

NBYTES = "bytes"  # as a second objective: of the vector, stored
TARGET, PLAIN, WINNER, RANDOM = "target", "lambda 1", "winner", "random"
FOUND, NOTHING, UNKNOWN = "found", "nothing", "unknown"

Answers = Mapping[str, Mapping[str, Score]]  # scores by metric, by the name of a point


@dataclass(frozen=True)
class Goal:
    """One metric, or a second objective that may not cost more of the gain than 1 - `keep`.

    `minimized` says of each whether less is better.
    """

    metric: str
    minimized: tuple[bool, ...]
    second: str | None = None
    keep: float = 0.95

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that an evaluation has to give."""
        asked = (self.metric, self.second)
        return tuple(name for name in asked if name is not None and name != NBYTES)

    def better(self, values: Sequence[float], k: int) -> float:
        """Return the k-th value, so that more of it is better."""
        return -values[k] if self.minimized[k] else values[k]


def choose(trials: Sequence[Any], goal: Goal, target: float, plain: float) -> Any:
    """Return the trial that a search takes, None of no trials; the earlier of equals.

    `target` and `plain` are the metric without the vector and at lambda = 1. Of two objectives: the
    best second value of the trials that keep enough of the gain; where lambda = 1 gains nothing, or
    no trial keeps enough, the best first value.
    """
    taken, k = trials, 0
    if goal.second is not None:
        base, whole = goal.better([target], 0), goal.better([plain], 0)
        least = base + goal.keep * (whole - base)
        kept = [trial for trial in trials if goal.better(trial.values, 0) >= least]
        if whole > base and kept:
            taken, k = kept, 1

    def rank(trial: Any) -> tuple[float, ...]:
        others = (goal.better(trial.values, i) for i in range(len(goal.minimized)))
        return (goal.better(trial.values, k), *others)

    return max(taken, key=rank, default=None)


def front(trials: Sequence[Any], goal: Goal) -> list[Any]:
    """Return the trials that no other beats in both objectives, by the first."""
    best: list[Any] = []
    order = sorted(trials, key=lambda t: [-goal.better(t.values, k) for k in (0, 1)])
    for trial in order:
        if not best or goal.better(trial.values, 1) > goal.better(best[-1].values, 1):
            best.append(trial)
    return best


@dataclass(frozen=True)
class Comparison:
    """How far a point lies above another, or above what it has to keep: more is better."""

    one: str
    other: str
    metric: str
    difference: Difference

    @property
    def word(self) -> str:
        """Whether that is "better", "worse", "within noise" or "unknown"."""
        if self.difference.standard_error is None:
            return UNKNOWN
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "within noise"


def compare(answers: Answers, goal: Goal) -> list[Comparison]:
    """Return the comparisons of the report items: of the winner, and of lambda = 1."""
    found = []
    for name, down in zip(goal.metrics, goal.minimized, strict=False):
        sign = -1.0 if down else 1.0
        for one, other in ((WINNER, PLAIN), (WINNER, TARGET), (WINNER, RANDOM), (PLAIN, TARGET)):
            if one in answers and other in answers:
                terms = [(sign, answers[one][name]), (-sign, answers[other][name])]
                found.append(Comparison(one, other, name, contrast(terms)))
    if goal.second is not None:
        sign = -1.0 if goal.minimized[0] else 1.0
        terms = [
            (sign, answers[WINNER][goal.metric]),
            (-sign * goal.keep, answers[PLAIN][goal.metric]),
            (-sign * (1 - goal.keep), answers[TARGET][goal.metric]),
        ]
        found.append(Comparison(WINNER, KEPT, goal.metric, contrast(terms)))
    return found


def keep_share(answers: Answers, goal: Goal) -> tuple[float, float, float] | None:
    """Return which share of the gain of lambda = 1 the winner keeps, and its 95 % interval.

    The interval has all shares that the items do not rule out (Fieller, J. R. Stat. Soc. B 16,
    1954): those r for which winner - target - r (lambda 1 - target) is within noise of 0. None
    where there is no such interval: without items, where the gain itself is within noise, or where
    no end is found because hardly any share is ruled out.
    """
    plain, base, won = (answers[point][goal.metric] for point in (PLAIN, TARGET, WINNER))
    gain = contrast([(1.0, plain), (-1.0, base)])
    if gain.standard_error is None or gain.low <= 0 <= gain.high:
        return None
    share = (won.mean - base.mean) / (plain.mean - base.mean)

    def beyond(r: float) -> bool:
        found = contrast([(1.0, won), (r - 1.0, base), (-r, plain)])
        return not found.low <= 0 <= found.high

    ends = []
    for step in (-1.0, 1.0):
        near, far = share, share + step
        while not beyond(far):
            if abs(far - share) > LARGEST:
                return None
            far = share + 2 * (far - share)
        for _ in range(40):
            middle = (near + far) / 2
            near, far = (near, middle) if beyond(middle) else (middle, far)
        ends.append(near)
    return share, ends[0], ends[1]


LARGEST = 1e6  # of shares
KEPT = "kept"  # the share of the gain of lambda = 1 that a winner of two objectives must keep


def judge(compared: Sequence[Comparison], goal: Goal, nbytes: Mapping[str, int]) -> str:
    """Return FOUND, NOTHING or UNKNOWN.

    Of one metric: found is what is better than lambda = 1 and than the target, both beyond noise.
    Of two: what is better than lambda = 1 in the second and keeps enough of the gain, beyond noise;
    bytes are counted, and have no noise.
    """
    words = {(c.one, c.other, c.metric): c.word for c in compared}
    if goal.second is None:
        asked = [words[WINNER, PLAIN, goal.metric], words[WINNER, TARGET, goal.metric]]
    else:
        asked = [words[WINNER, KEPT, goal.metric], words[WINNER, TARGET, goal.metric]]
        if goal.second == NBYTES:
            asked.append("better" if nbytes[WINNER] < nbytes[PLAIN] else "worse")
        else:
            asked.append(words[WINNER, PLAIN, goal.second])
    if UNKNOWN in asked:
        return UNKNOWN
    return FOUND if all(word == "better" for word in asked) else NOTHING
