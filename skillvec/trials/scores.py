"""What an evaluation says of a model: metrics with standard errors, and the contract of evaluators.

A metric is a mean over items. Where the evaluator gives the items' own values, two points are
compared item by item; where it gives a standard error alone, as if they were independent.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

ALL = "all"  # the split that every evaluator has: all items


@dataclass(frozen=True)
class Score:
    """One metric: its mean, the standard error of that mean, and the values it is the mean of.

    `values` are in the order of the items, the same for every model; `groups` say which items are
    one draw (questions about one document), one label an item. Both are empty where unknown.
    """

    mean: float
    standard_error: float | None = None
    values: tuple[float, ...] = ()
    groups: tuple[str, ...] = ()


Scores = Mapping[str, Score]
LESS_IS_BETTER = {"loss", "nll", "perplexity", "ppl", "error", "wer", "cer", "bpb", "bits"}


def less_is_better(metric: str, minimize: Collection[str] = ()) -> bool:
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
