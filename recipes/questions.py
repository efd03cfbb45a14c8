"""A file of questions as an evaluator of `skillvec sweep` and `skillvec search`.

    skillvec sweep TARGET VECTOR --eval evaluate:questions.jsonl --eval-option max_new_tokens=16
    skillvec sweep TARGET VECTOR --eval evaluate:recipes/mini/past.yaml

The second takes what a pipeline's configuration says under `evaluate` and of one of its targets
(--eval-option target=NAME where there are several). Questions are asked as recipes/evaluate.py asks
them, of the model that is loaded; another module of a configuration runs as a command on a folder.
Hides which of them it is. Halves of the questions share no `group`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from skillvec.errors import UsageError
from skillvec.files.file import digest_bytes
from skillvec.recipes import evaluate
from skillvec.trials.commands import CommandEvaluator
from skillvec.trials.functions import spelled
from skillvec.trials.scores import (
    HALVES,
    Evaluator,
    Scores,
    half_of,
    refuse_split,
    score_of,
)

HERE = "skillvec.recipes.evaluate"
ASKING = ("max_new_tokens", "batch", "temperature", "seed")
CHECKED = ("metrics", "judge", "answer", "limit", "temperature")
JUDGES = {"judge_url": "JUDGE_URL", "judge_model": "JUDGE_MODEL"}


def open_questions(text: str, options: Mapping[str, Any] = {}) -> Evaluator:
    """Return the evaluator of a .jsonl file or of a configuration; UsageError names what is wrong.

    `options` come before those of the configuration.
    """
    try:
        if text.endswith(".jsonl"):
            return QuestionsEvaluator(Path(text), dict(options), text)
        return _of_configuration(text, dict(options))
    except (ValueError, OSError) as error:
        raise UsageError(f"--eval evaluate:{text}: {error}") from None


def _of_configuration(text: str, options: dict[str, Any]) -> Evaluator:
    from skillvec.recipes.past import find_config, read_config
    from skillvec.recipes.stages import flags

    config = read_config(find_config(text))
    name = options.pop("target", None)
    if name is None and len(config.targets) == 1:
        name = next(iter(config.targets))
    if name not in config.targets:
        raise ValueError(f"target {name}: say one by --eval-option target=NAME, of"
                         f" {', '.join(config.targets)}")  # fmt: skip
    asked = config.evaluate.get("with", {}) | config.targets[name]["evaluate"]
    asked = {key.replace("-", "_"): value for key, value in asked.items()} | options
    os.environ.update({key: str(value) for key, value in config.environment.items()})
    module = config.evaluate["run"]
    if module == HERE:
        data = Path(str(asked.pop("data", "")))
        return QuestionsEvaluator(data, asked, f"{text} target={name}")
    words = [sys.executable, "-m", module, "--model", "{model}", "--output", "{output}"]
    return CommandEvaluator(shlex.join([*words, *flags(asked)]))


class QuestionsEvaluator:
    """Questions of a .jsonl file, asked of a loaded model and marked as recipes/evaluate.py does.

    `options` are those of its command line. Raises ValueError for what is wrong with them or the
    file.
    """

    takes_folder = False
    splits = HALVES

    def __init__(self, data: Path, options: Mapping[str, Any], name: str) -> None:
        known = {*ASKING, *CHECKED, *JUDGES}
        if unknown := [key for key in options if key not in known]:
            raise ValueError(f"no option {unknown[0]}: expected {', '.join(sorted(known))}")
        asked = dict(options)
        if isinstance(asked.get("metrics"), str):
            asked["metrics"] = asked["metrics"].split(",")
        self._refuse_values(asked)
        with evaluate.environment({JUDGES[key]: asked.get(key) for key in JUDGES}):
            self._asked = evaluate.prepare(data, **_chosen(asked, CHECKED))
        self._asking = _chosen(asked, ASKING)
        self.metrics = self._asked.metrics
        self.spec = spelled(f"evaluate:{name}", options, digest_bytes(data.read_bytes())[:16])

    @staticmethod
    def _refuse_values(options: Mapping[str, Any]) -> None:
        """Refuse values of another type than the default that they take the place of."""
        defaults = signature(evaluate.evaluate).parameters
        for key, value in options.items():
            default = defaults[key].default if key in defaults else ""
            kinds = {float: (int, float), tuple: (list,), type(None): (int, str)}
            wanted = kinds.get(type(default), (type(default),))
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(f"{key}: expected {wanted[-1].__name__}, found {value!r}")
        for key in ("max_new_tokens", "batch"):
            if options.get(key, 1) < 1:
                raise ValueError(f"{key}: expected 1 or more, found {options[key]}")

    def check(self, target: str) -> None:
        """Accept every target: what is wrong with the questions was said when they were read."""

    def evaluate(self, model: Any, tokenizer: Any, split: str) -> Scores:
        """Ask the questions of a split; ValueError for prompts that do not fit the model."""
        refuse_split(split, self.splits, self.spec)
        rows = self._asked.rows
        chosen = half_of([row.get("group", at) for at, row in enumerate(rows)], split)
        asked = self._asked._replace(rows=[rows[at] for at in chosen])
        marks = evaluate.mark_answers(model, tokenizer, asked, **self._asking)[2]
        groups = [row["group"] for row in asked.rows] if "group" in rows[0] else []
        return {name: score_of(found, groups) for name, found in marks.items()}


def _chosen(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}
