"""Tasks of lm-eval, asked of a model in memory by lm-eval's own `simple_evaluate`.

Hides lm-eval: finding tasks without its slow list where that is not needed, which of a task's items
a split has, and turning its results into scores. Tasks and their data are loaded once, before the
model is. Metrics are named `task/metric`, and `task/metric,filter` where a task has several
filters. A metric that is a mean of items has their values; another one has a bootstrapped error.
"""

import contextlib
import io
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from skillvec.errors import UsageError, needs
from skillvec.trials.functions import spelled
from skillvec.trials.scores import ALL, HALVES, Score, Scores, half_of, refuse_split, score_of

# our options, and whose they are: of this file, of lm-eval's evaluation, of its model
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "include_path": str, "limit": (int, float), "bootstrap_iters": int,
    "num_fewshot": int, "apply_chat_template": (bool, str), "fewshot_as_multiturn": bool,
    "system_instruction": str, "gen_kwargs": (str, dict), "confirm_run_unsafe_code": bool,
    "batch_size": (int, str), "max_batch_size": int, "max_length": int, "truncation": bool,
    "add_bos_token": bool,
}  # fmt: skip
OURS = ("include_path", "limit", "bootstrap_iters")
OF_THE_MODEL = ("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token")
BOOTSTRAPS = 100  # of metrics that are no means: an error of 7 % of their standard error


class HarnessEvaluator:
    """`lm-eval:TASK,TASK`; options are those of lm-eval's command line.

    Raises UsageError for options that are not taken, tasks that lm-eval does not know, and data
    that it cannot load.
    """

    takes_folder = False
    splits = HALVES

    def __init__(self, tasks: str, options: Mapping[str, Any] = {}) -> None:
        self._names = [name.strip() for name in tasks.split(",") if name.strip()]
        self._what = f"lm-eval:{','.join(self._names)}"
        self._options = _checked(options)
        if not self._names:
            raise UsageError(f"--eval {self._what}: expected one task or more")
        self.spec = spelled(self._what, options)

    @cached_property
    def _manager(self) -> Any:
        """lm-eval's list of tasks, its own 14,000 only where a task is not in the user's folder."""
        with needs("eval", f"--eval {self._what}"):
            import lm_eval.evaluator
            import lm_eval.models.huggingface
        manager, folder = lm_eval.evaluator.TaskManager, self._options.get("include_path")
        if folder is not None and not os.path.isdir(folder):
            raise UsageError(f"--eval-option include_path: {folder}: no such folder")
        own = manager(include_path=folder, include_defaults=False)
        if all(_is_known(own, name) for name in self._names):
            return own
        return manager(include_path=folder)

    @cached_property
    def _loaded(self) -> Any:
        """Tasks with their data, and groups of them."""
        with quiet():
            return self._load()

    def _load(self) -> Any:
        manager = self._manager
        unknown = [name for name in self._names if not _is_known(manager, name)]
        if unknown:
            near = get_close_matches(unknown[0], manager.all_tasks, 3, 0.5)
            raise UsageError(
                f"--eval {self._what}: lm-eval knows no task {unknown[0]}"
                + (f"; near are {', '.join(near)}" if near else "")
                + "; tasks of your own: --eval-option include_path=FOLDER"
            )
        try:
            loaded = manager.load(list(self._names))
        except Exception as error:  # whatever data sets, their servers and functions of tasks raise
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"--eval {self._what}: the task cannot be loaded: {said:.500}"
            ) from None
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self._options.get(
                "confirm_run_unsafe_code"
            ):
                raise UsageError(
                    f"--eval {self._what}: task {name} runs code that the model writes; to allow"
                    " it: --eval-option confirm_run_unsafe_code=true"
                )
        return loaded

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics; loads the tasks."""
        return tuple(self._directions)

    @property
    def lower_is_better(self) -> tuple[str, ...]:
        """The metrics of which a task says that less is better; loads the tasks."""
        return tuple(name for name, is_higher in self._directions.items() if is_higher is False)

    @cached_property
    def _directions(self) -> dict[str, bool | None]:
        """Every metric, and whether more of it is better, None where no task says so."""
        found: dict[str, bool | None] = {}
        for name, task in self._loaded["tasks"].items():
            filters = [one.name for one in task._filters]
            better = task.higher_is_better()
            for metric in task.aggregation():
                names = [_metric_name(name, metric, key, filters) for key in filters]
                found |= dict.fromkeys(names, better.get(metric))
        for name, group in self._loaded["groups"].items():
            within = group.get_all_tasks()
            kept = dict.fromkeys(one.name for task in within for one in task._filters)
            for one in group.aggregate_metric_list or []:
                filters = [*(one.filter_list or kept)]
                says = {task.higher_is_better().get(one.metric) for task in within}
                names = [_metric_name(name, one.metric, key, filters) for key in filters]
                found |= dict.fromkeys(names, says.pop() if len(says) == 1 else None)
        return found

    def check(self, target: str) -> None:
        """Load the tasks and their data; UsageError names what is missing."""
        _ = self._loaded

    def evaluate(self, model: Any, tokenizer: Any, split: str) -> Scores:
        """Return the scores of every task and group; what lm-eval prints is not shown."""
        refuse_split(split, self.splits, self._what)
        self.check("")
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        of_the_model = {k: v for k, v in self._options.items() if k in OF_THE_MODEL}
        rest = {k: v for k, v in self._options.items() if k not in (*OURS, *OF_THE_MODEL)}
        with quiet(), _without_surroundings(evaluator):
            results = evaluator.simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, **of_the_model),
                tasks=_outermost(self._loaded),
                task_manager=self._manager,
                samples=self._samples(split),
                bootstrap_iters=self._options.get("bootstrap_iters", BOOTSTRAPS),
                log_samples=True,
                **rest,
            )
        return self._scores(results)

    def _samples(self, split: str) -> dict[str, list[int]] | None:
        """Return which items of each task are asked, None for all of them.

        `limit` comes first: halves are halves of what would be asked without a split.
        """
        limit = self._options.get("limit")
        if split == ALL and limit is None:
            return None
        samples = {}
        for name, task in self._loaded["tasks"].items():
            count = total = len(task.eval_docs)
            if limit is not None:
                count = min(total, math.ceil(total * limit) if limit < 1 else int(limit))
            samples[name] = half_of(range(count), split)
        return samples

    def _scores(self, results: Mapping[str, Any]) -> Scores:
        from lm_eval.api.metrics import mean

        scores = {}
        tasks = self._loaded["tasks"]
        for name, found in results["results"].items():
            keys = [key for key in found if "," in key and "_stderr," not in key]
            filters = [*dict.fromkeys(key.partition(",")[2] for key in keys)]
            for key in keys:
                metric, _, kept = key.partition(",")
                values: list[Any] = []
                if name in tasks and tasks[name].aggregation().get(metric, mean) is mean:
                    values = _values(results["samples"][name], metric, kept)
                error = found.get(f"{metric}_stderr,{kept}")
                scores[_metric_name(name, metric, kept, filters)] = (
                    score_of(values)
                    if values
                    else Score(float(found[key]), None if isinstance(error, str) else error)
                )
        return scores


def _values(samples: Sequence[Mapping[str, Any]], metric: str, kept: str) -> list[Any]:
    """Return a metric's values in the order of the items; none where not every item has a number.

    A document without one would shift those behind it, so that items of two models would not
    match.
    """
    ours = sorted((one for one in samples if one["filter"] == kept), key=lambda one: one["doc_id"])
    values = [one.get(metric) for one in ours]
    return values if all(isinstance(value, bool | int | float) for value in values) else []


def _outermost(loaded: Mapping[str, Any]) -> list[Any]:
    """Return the groups that stand in no other, and the tasks that stand in none."""
    groups, tasks = loaded["groups"], loaded["tasks"]
    inner = {one.name for group in groups.values() for one in group.get_all_groups()}
    inner |= {one.task_name for group in groups.values() for one in group.get_all_tasks()}
    return [one for name, one in (groups | tasks).items() if name not in inner]


def _metric_name(task: str, metric: str, kept: str, filters: Sequence[str]) -> str:
    return f"{task}/{metric}" if len(filters) < 2 else f"{task}/{metric},{kept}"


def _is_known(manager: Any, name: str) -> bool:
    """Return whether a name is that of a task, group or tag, or a path of a task's YAML file."""
    return name in manager.task_index or (name.endswith(".yaml") and os.path.isfile(name))


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, 1, 0.5)
            raise UsageError(
                f"--eval-option {name}: lm-eval takes {', '.join(OPTIONS)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        kinds = OPTIONS[name]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise UsageError(f"--eval-option {name}: expected {wanted}, found {value!r}")
    if "limit" in options and not options["limit"] > 0:
        raise UsageError(f"--eval-option limit: expected more than 0, found {options['limit']}")
    return dict(options)


class _Sink(io.StringIO):
    """A place for what nobody reads; rich goes on writing to the stream that was there before."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.rich_proxied_file = getattr(before, "rich_proxied_file", before)

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def _without_surroundings(evaluator: Any) -> Iterator[None]:
    """Keep `simple_evaluate` from describing this machine in its results, for every point anew.

    lm-eval 0.4.13 runs pip and git for that, a second a call.
    """
    names = [name for name in ("add_env_info", "get_git_commit_hash") if hasattr(evaluator, name)]
    before = {name: getattr(evaluator, name) for name in names}
    for name in names:
        setattr(evaluator, name, lambda *given: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(evaluator, name, function)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what lm-eval prints and logs from the screen, and its bootstraps in this process."""
    logger, key = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, before = logger.level, os.environ.get(key)
    logger.setLevel(logging.ERROR)
    os.environ[key] = "1"
    try:
        with (
            contextlib.redirect_stdout(_Sink(sys.stdout)),
            contextlib.redirect_stderr(_Sink(sys.stderr)),
        ):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
