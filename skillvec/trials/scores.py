"""What an evaluation says of a model: metrics with standard errors, and the contract of evaluators.

A metric is a mean over items. Where the evaluator gives the items' own values, two points are
compared item by item; where it gives a standard error alone, as if they were independent.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

from skillvec.errors import SkillvecError, UsageError

ALL = "all"  # the split that every evaluator has: all items
HALVES = ("search", "report")  # those of an evaluator that can be asked for one half of its items


class ScoreError(SkillvecError, ValueError):
    """An evaluation answered in a form that is no scores."""


@dataclass(frozen=True)
class Score:
    """One metric: its mean, the standard error of that mean, and the values it is the mean of.

    `values` are in the order of the items, the same for every model; `groups` say which items are
    one draw (questions about one document), one label an item. Both are empty where unknown.
    """

    mean: float
    standard_error: float | None = None
    values: tuple[float, ...] = field(default=(), repr=False)
    groups: tuple[str, ...] = field(default=(), repr=False)


Scores = Mapping[str, Score]
Function = Callable[..., Any]  # of a user, from model and tokenizer to what `read_scores` reads
LESS_IS_BETTER = {"loss", "nll", "perplexity", "ppl", "error", "wer", "cer", "bpb", "bits"}


def names_of(minimize: str | Iterable[str]) -> list[str]:
    """Return the names of metrics, of which one may be given alone."""
    return sorted({minimize} if isinstance(minimize, str) else {*minimize})


def less_is_better(metric: str, minimize: Sequence[str] = ()) -> bool:
    """Return whether less of a metric is better: by a word of its name, or as `minimize` says."""
    return metric in minimize or bool(LESS_IS_BETTER & {*re.split(r"[\W_]+", metric.lower())})


class Evaluator(Protocol):
    """Something that gives a model scores.

    `spec` is what the user wrote, with its options: what a journal knows it by. `splits` are the
    disjoint parts of its items that it can be asked for, beside `ALL`; empty where it has none.
    `metrics` are their names as far as they are known before a model is there, else None.
    """

    @property
    def spec(self) -> str: ...
    @property
    def splits(self) -> tuple[str, ...]: ...
    @property
    def metrics(self) -> tuple[str, ...] | None: ...

    @property
    def takes_folder(self) -> bool:
        """Whether it is given a folder with merged weights, not a loaded model."""

    def check(self, target: str) -> None:
        """Raise UsageError for what cannot work with this target: before any model is loaded."""

    def evaluate(self, model: Any, tokenizer: Any, split: str) -> Scores:
        """Return the scores of a loaded model, or of the folder `model` where it takes one."""


def score_of(values: Iterable[Any], groups: Iterable[Any] = ()) -> Score:
    """Return the mean of the values of items and its standard error, over groups where given.

    The error is that of a mean of clusters of unequal size: the items of a group are one draw. For
    groups of one size it is the standard deviation of their means over sqrt(groups). None below two
    groups. Raises ScoreError for no values, and for as many groups as there are not values.
    """
    numbers, labels = tuple(map(_number, values)), tuple(map(str, groups))
    if not numbers or (labels and len(labels) != len(numbers)):
        raise ScoreError(f"expected values and a group for each, found {len(numbers)} values"
                         + (f" and {len(labels)} groups" if labels else ""))  # fmt: skip
    mean = fmean(numbers)
    sums: dict[Any, float] = {}
    for number, group in zip(numbers, labels or range(len(numbers)), strict=True):
        sums[group] = sums.get(group, 0.0) + number - mean
    many = len(sums)
    spread = sum(one * one for one in sums.values())
    error = (many / (many - 1) * spread) ** 0.5 / len(numbers) if many > 1 else None
    return Score(mean, error, numbers, labels)


def read_scores(said: Any) -> Scores:
    """Return what an evaluator answered as scores: a mapping of metrics.

    Of each: a Score; a number; a tuple of mean and standard error; a mapping with `mean`,
    `standard_error`, `values` and `groups` (one of mean and values at least); or a sequence of the
    items' values. The mapping may stand under `metrics`, as recipes write it. Raises ScoreError for
    anything else.
    """
    if isinstance(said, Mapping) and isinstance(said.get("metrics"), Mapping):
        said = said["metrics"]
    if not isinstance(said, Mapping) or not said:
        raise ScoreError(
            f'expected metrics by name, such as {{"accuracy": 0.5}}, found {said!r:.200}'
        )
    scores = {}
    for name, value in said.items():
        try:
            scores[str(name)] = _read_score(value)
        except (ValueError, TypeError) as error:
            raise ScoreError(f"metric {name}: {error}") from None
    return scores


def _read_score(value: Any) -> Score:
    if isinstance(value, Score):
        return value
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's and torch's
    if isinstance(value, Mapping):
        unknown = value.keys() - {"mean", "standard_error", "values", "groups"}
        if unknown or not value.keys() & {"mean", "values"}:
            raise ScoreError(
                "expected mean or values, and may be standard_error and groups; found"
                f" {', '.join(map(str, value)) or 'nothing'}"
            )
        values = _plain(value.get("values"))
        if not values:
            return Score(_number(value["mean"]), _error_of(value.get("standard_error")))
        score = score_of(values, _plain(value.get("groups")))
        mean = _number(value.get("mean", score.mean))
        if not math.isclose(mean, score.mean, rel_tol=1e-5, abs_tol=1e-9) and mean == mean:
            raise ScoreError(f"the mean is {mean:g}, but that of its values {score.mean:g}")
        error = _error_of(value.get("standard_error"))
        return score if error is None else Score(mean, error, score.values, score.groups)
    if isinstance(value, tuple) and len(value) == 2:
        return Score(_number(value[0]), _error_of(value[1]))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return score_of(value)
    return Score(_number(value))


def _plain(values: Any) -> Sequence[Any]:
    return values.tolist() if hasattr(values, "tolist") else values or ()


def _number(value: Any) -> float:
    if isinstance(value, str | bytes) or value is None:
        raise ScoreError(f"expected a number, found {value!r:.100}")
    try:
        return float(value)
    except TypeError:
        raise ScoreError(f"expected a number, found {value!r:.100}") from None


def _error_of(value: Any) -> float | None:
    """Return a standard error, None where it is not known: one item has none."""
    if value is None or (error := _number(value)) != error:
        return None
    if error < 0:
        raise ScoreError(f"expected a standard error of 0 or more, found {error:g}")
    return error


def not_finite(scores: Scores) -> list[str]:
    """Return the metrics whose mean or one of whose values is NaN or infinite."""
    return [
        name
        for name, score in scores.items()
        if not all(map(math.isfinite, (score.mean, *score.values)))
    ]


def half_of(labels: Sequence[Any], split: str) -> list[int]:
    """Return the positions of the items that a split has, in their order.

    Items with one label stay together. Which half a label is in depends on the number of labels
    and its place among them alone: halves are drawn once for all models. Raises UsageError where
    there are too few labels to halve.
    """
    if split == ALL:
        return list(range(len(labels)))
    order = list(dict.fromkeys(labels))
    if len(order) < 2:
        raise UsageError("one item cannot be halved into one to search by and one to report")
    first = {*random.Random(0).sample(range(len(order)), (len(order) + 1) // 2)}
    wanted = {label for at, label in enumerate(order) if (at in first) == (split == HALVES[0])}
    return [at for at, label in enumerate(labels) if label in wanted]


def refuse_split(split: str, splits: Sequence[str], what: str) -> None:
    """Raise UsageError for a split that an evaluator does not have."""
    if split not in (ALL, *splits):
        raise UsageError(f"{what} has no split {split!r}: expected {', '.join((ALL, *splits))}")
