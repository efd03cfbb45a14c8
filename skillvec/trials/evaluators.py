"""What a user writes after --eval, as an evaluator.

    module:function             a function of model and tokenizer; in Python the function itself
    command: ... {model} ...    a program that is given a folder
    lm-eval:TASK,TASK           tasks of lm-eval
    evaluate:QUESTIONS.jsonl    questions with answers, or what a recipe's configuration evaluates

Hides which kind is which. Nothing is loaded that an evaluation needs beside its own module.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any, cast

from skillvec.errors import UsageError, needs
from skillvec.trials.commands import CommandEvaluator
from skillvec.trials.functions import FunctionEvaluator
from skillvec.trials.harness import HarnessEvaluator
from skillvec.trials.scores import Evaluator, Function

KINDS = "module:function, 'command: ... {model} ...', lm-eval:TASK,TASK or evaluate:QUESTIONS.jsonl"


def open_evaluator(spec: str | Function | Evaluator, options: Mapping[str, Any] = {}) -> Evaluator:
    """Return the evaluator that a text names, or that a function makes; an evaluator as it is.

    `options` go to the function, to lm-eval or to the recipe. Raises UsageError for a text that
    names none, for options that are not taken, and for what cannot be imported or read.
    """
    if not isinstance(spec, str):
        if hasattr(spec, "takes_folder"):  # of an Evaluator; those may be callable as well
            return cast(Evaluator, spec)
        if isinstance(spec, partial) and not spec.args:  # so that a journal knows what is fixed
            return open_evaluator(spec.func, {**spec.keywords, **options})
        if not callable(spec):
            raise UsageError(f"eval {spec!r:.60}: expected a function, an Evaluator, {KINDS}")
        return FunctionEvaluator(getattr(spec, "__module__", "__main__"), spec, options)
    kind, _, rest = spec.partition(":")
    rest = rest.strip()
    if not kind or not rest:
        raise UsageError(f"--eval {spec!r}: expected {KINDS}")
    if kind == "command":
        if options:
            raise UsageError(
                f"--eval-option {next(iter(options))}: a command takes no options beside its words"
            )
        return CommandEvaluator(rest)
    if kind == "lm-eval":
        return HarnessEvaluator(rest, options)
    if kind == "evaluate":
        # upward, by name: the recipes stand above all rooms
        with needs("train", f"--eval {spec}"):
            opened: Evaluator = import_module("skillvec.recipes.questions").open_questions(
                rest, options
            )
        return opened
    return FunctionEvaluator(kind, rest, options)


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Return options written as KEY=VALUE; a value is JSON where it can be, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--eval-option {pair!r}: expected KEY=VALUE")
        if key in options:
            raise UsageError(f"--eval-option {key} is given twice")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def refuse_metric(evaluator: Evaluator, name: str) -> None:
    """Raise UsageError for a metric that an evaluator will not give, where that is known."""
    known = evaluator.metrics
    if known is None or name in known:
        return
    of_a_task = [one for one in known if one.partition("/")[2].partition(",")[0] == name]
    near = of_a_task or get_close_matches(name, known, 1, 0.5)
    raise UsageError(
        f"metric {name!r}: {evaluator.spec} gives {', '.join(known[:20])}"
        + (f"; did you mean {near[0]}?" if near else "")
    )
