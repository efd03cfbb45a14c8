"""search: which lambdas, layers and parameters help most, and whether that is more than noise.

A sampler and, beside it, random search with the same budget ask the search items. The report items
are asked once, at the end, of the target, lambda = 1 and what both found. All is kept in a storage
of Optuna, so that a search goes on where it was, on several machines at once.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillvec.analysis.wording import say_duration
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.engine.outputs import PathLike
from skillvec.errors import SkillvecError, UsageError, up_to_five
from skillvec.report import Report, TrialWatcher
from skillvec.trials.choosing import (
    NBYTES,
    PLAIN,
    RANDOM,
    TARGET,
    WINNER,
    Answers,
    Goal,
    choose,
)
from skillvec.trials.evaluators import open_evaluator, refuse_metric
from skillvec.trials.folder import take_folder
from skillvec.trials.scores import (
    ALL,
    HALVES,
    Evaluator,
    Function,
    Score,
    Scores,
    less_is_better,
    names_of,
)
from skillvec.trials.search_report import RECIPE, describe, write_report
from skillvec.trials.spaces import Space, read_space
from skillvec.trials.studies import (
    SAMPLERS,
    FailedError,
    Found,
    Study,
    make_sampler,
    open_storage,
    sqlite_url,
)
from skillvec.trials.trial import Trials
from skillvec.vectors.recipe import Recipe
from skillvec.vectors.vector import SkillVector
from skillvec.verbs import combine
from skillvec.verbs._apply import plan_request

SEARCH, REPORT = HALVES
DATABASE = "study.db"
ASKED = "asked"  # of the first study: the attribute that says which search this is
BEFORE, BESIDE, AFTER = ", lambda 1", ", random", ", report"  # end the names of the other studies


def search(
    target: PathLike,
    *vectors: PathLike,
    eval: str | Function | Evaluator,
    output: PathLike,
    space: str | Mapping[str, Any] = "lam",
    budget: int = 50,
    metric: str | None = None,
    second: str | None = None,
    minimize: str | Sequence[str] = (),
    keep: float = 0.95,
    sampler: str = "tpe",
    eval_options: Mapping[str, Any] | None = None,
    report_eval: str | Function | Evaluator | None = None,
    storage: str | None = None,
    study: str = "search",
    seed: int = 0,
    scratch: PathLike | None = None,
    timeout: float | None = None,
    dtype: str = "auto",
    device: str | None = None,
    rounding: str = "nearest",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    rows: str = "strict",
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: TrialWatcher | None = None,
) -> Report:
    """Search a space of recipes of `vectors` for what helps `target` most, by an evaluator.

    `space` is what may be chosen (docs/search.md), `budget` the trials of `sampler` (tpe, cmaes,
    random), and as many of random search. `eval`, `eval_options`, `timeout`, `scratch`, `dtype`,
    `device`, `rounding` and `seed` as of sweep. `metric` is the evaluator's first by default; less
    of it is better where its name or `minimize` says so. `second`, another metric or "bytes", is
    made as good as can be while `keep` of the gain of lambda = 1 is kept. Items that no sampler
    sees judge the winner: the evaluator's other half, or `report_eval`. With `storage`, a URL of
    Optuna's (study.db in `output` if not), processes share `study`. The same call goes on where it
    was; `force` begins anew. `output` gets winner.yaml, a recipe, report.json, trials.csv, and a
    page. Raises UsageError for what cannot work, SkillvecError where the first trials all fail.
    """
    evaluator = open_evaluator(eval, eval_options or {})
    reporter = None if report_eval is None else open_evaluator(report_eval, eval_options or {})
    _check_asked(evaluator, reporter, budget, keep, sampler, metric, second, scratch)
    _refuse_metrics(evaluator, names_of(minimize))
    opened, found = _open_space(vectors, space)
    read = [os.fspath(target), *opened]
    folder = take_folder(output, read, RECIPE if storage else DATABASE, "search")
    taken: dict[str, Any] = {
        "dtype": dtype, "rounding": rounding, "seed": seed, "include": [*include],
        "exclude": [*exclude], "rename": [*rename], "rows": rows,
    }  # fmt: skip
    asked: dict[str, Any] = {
        "eval": evaluator.spec, "report_eval": reporter.spec if reporter else None,
        "space": describe(found), "metric": metric, "second": second,
        "minimize": names_of(minimize), "keep": keep, "sampler": sampler, **taken,
    }  # fmt: skip
    named = {"target": os.fspath(target), "vectors": [*opened], "budget": budget,
             "output": os.fspath(output), "study": study, "workers": workers}  # fmt: skip
    _refuse_unfit(target, opened.values(), taken)
    if watcher:
        watcher.planned(Report("search", asked | named))
    taken |= {"scratch": scratch, "timeout": timeout, "device": device, "workers": workers}
    with Trials(os.fspath(target), evaluator, **taken) as trials:
        if dry_run:
            return Report("search", asked | named)
        folder.mkdir(parents=True, exist_ok=True)
        place = open_storage(storage or sqlite_url(folder / DATABASE))
        same = {"target": trials.target_digest, "vectors": list(map(_identify, opened.values()))}
        studies = Studies(place, study, force, asked | same)
        run = Search(found, studies, asked | named, scratch, watcher)
        run.search(trials, SEARCH if SEARCH in evaluator.splits else ALL)
        if reporter is None:
            run.report(trials, REPORT)
    if reporter is not None:
        with Trials(os.fspath(target), reporter, **taken) as trials:
            run.report(trials, ALL)
    return write_report(folder, run)


def _open_space(
    vectors: Sequence[PathLike], space: str | Mapping[str, Any]
) -> tuple[dict[str, SkillVector], Space]:
    """Return the vectors by their references, and the space; refuse what cannot be combined."""
    refs = [_absolute(vector) for vector in vectors]
    if not refs or len({*refs}) < len(refs):
        raise UsageError(f"expected vectors, each once, found {', '.join(refs) or 'none'}")
    opened = {ref: SkillVector.open(ref) for ref in refs}
    found = read_space(space, {ref: [*vector.deltas] for ref, vector in opened.items()})
    for recipe in (found.recipe(found.start()), found.unchanged()):
        combine(recipe=recipe.to_dict())
    return opened, found


def _refuse_metrics(evaluator: Evaluator, names: Sequence[object]) -> None:
    """Raise UsageError for metrics that an evaluator does not give; bytes are measured here."""
    for name in names:
        if name not in (None, NBYTES):
            refuse_metric(evaluator, str(name))


def _refuse_unfit(
    target: PathLike, vectors: Iterable[SkillVector], taken: Mapping[str, Any]
) -> None:
    """Raise IncompatibleError for a vector that does not fit, before anything is made."""
    point = open_checkpoint(target, "target")
    for vector in vectors:
        plan_request(point, vector, {**taken, "lam": 1.0, "dtype": None})


def _identify(vector: SkillVector) -> str:
    return vector.manifest["identity"]


def _check_asked(evaluator: Evaluator, reporter: Evaluator | None, budget: int, keep: float,
                 sampler: str, metric: str | None, second: str | None,
                 scratch: PathLike | None) -> None:  # fmt: skip
    """Raise UsageError for what cannot be asked of these evaluators."""
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if scratch is not None and not os.path.isdir(scratch):
        raise UsageError(f"scratch {os.fspath(scratch)}: no such folder")
    if reporter is not None and reporter.spec == evaluator.spec:
        raise UsageError(
            f"report_eval {reporter.spec}: these are the items that are searched by: take others"
        )
    if not isinstance(budget, int) or budget < 1:
        raise UsageError(f"budget {budget}: expected at least one trial")
    if not 0 < keep <= 1:
        raise UsageError(f"keep {keep}: expected a share of the gain, above 0 and at most 1")
    if second is not None and (sampler == "cmaes" or second == metric):
        raise UsageError(
            f"second {second}: CMA-ES takes one objective; use tpe or random"
            if sampler == "cmaes"
            else f"second {second}: that is the first metric"
        )
    if second is not None and metric is None:
        raise UsageError(f"second {second}: say also which metric is the first")
    for one in (evaluator, reporter):
        if one is not None:
            _refuse_metrics(one, (metric, second))
    if reporter is None and not {*HALVES} <= {*evaluator.splits}:
        raise UsageError(
            f"{evaluator.spec} cannot be asked for one half of its items to search by and the"
            " other to report: give it a split (docs/search.md), or report by a second evaluator"
            " with --report-eval"
        )


def _absolute(ref: PathLike) -> str:
    """Return a reference with paths that hold wherever the recipe is read."""
    sides = os.fspath(ref).split("::")
    return "::".join(os.path.abspath(side) if os.path.exists(side) else side for side in sides)


class Studies:
    """The studies of one search in a storage; another search under their name is refused."""

    def __init__(self, storage: Any, name: str, force: bool, asked: Mapping[str, Any]) -> None:
        self.storage, self.name = storage, name
        if force:
            self._delete()
        self.before = self.open(BEFORE, {}, 1)
        known = self.before.facts.get(ASKED)
        if known is None:
            self.before.study.set_user_attr(ASKED, dict(asked))
        elif different := [key for key in asked if known.get(key) != asked[key]]:
            lines = [f"{k}: {known.get(k)!s:.80}, now {asked[k]!s:.80}" for k in different]
            raise UsageError(
                f"the study {name} of the storage is of another search; take another output or"
                f" study, or --force to begin anew:\n{up_to_five(lines)}"
            )

    def open(self, suffix: str, dimensions: Mapping[str, Any], budget: int, **given: Any) -> Study:
        given.setdefault("sampler", make_sampler("random", 0))
        return Study.open(self.storage, self.name + suffix, dimensions, budget, **given)

    def _delete(self) -> None:
        import optuna

        for suffix in ("", BEFORE, BESIDE, AFTER):
            try:
                optuna.delete_study(study_name=self.name + suffix, storage=self.storage)
            except KeyError:
                continue


@dataclass
class Search:
    """What is asked and found: `search` runs the trials, `report` asks the report items once."""

    space: Space
    studies: Studies
    asked: Mapping[str, Any]
    scratch: PathLike | None
    watcher: TrialWatcher | None
    goal: Any = None  # a Goal, once the target's metrics are known
    before: Answers = field(init=False)  # the search items: target and lambda 1
    nbytes: dict[str, int] = field(default_factory=dict)  # of stored vectors, by point
    main: Study = field(init=False)
    beside: Study | None = None
    answers: Answers = field(init=False)  # the report items
    chosen: dict[str, Any] = field(default_factory=dict)  # the trials of WINNER and RANDOM

    def say(self, line: str) -> None:
        """Say what came of a trial, or what is waited for."""
        if self.watcher:
            self.watcher.tried(line)

    def search(self, trials: Trials, split: str) -> None:
        """Run the trials of the sampler and of random search, one of each in turn."""
        before, asked = self.studies.before, self.asked
        before.finish(lambda _: self._ask({TARGET: None, PLAIN: self.space.unchanged()},
                                          trials, split), self.say)  # fmt: skip
        said = before.complete()[0].user_attrs
        self.before = _read_answers(said)
        self.goal = self._make_goal()
        if self.goal.second == NBYTES:
            self.nbytes[PLAIN] = said[NBYTES][PLAIN]
        made = {"minimized": self.goal.minimized}
        dimensions, budget = self.space.dimensions, asked["budget"]
        sampler = make_sampler(asked["sampler"], asked["seed"])
        self.main = self.studies.open("", dimensions, budget, sampler=sampler, **made)
        self.main.start_at(self.space.start())
        both = [self.main]
        if asked["sampler"] != "random":
            sampler = make_sampler("random", asked["seed"])
            self.beside = self.studies.open(BESIDE, dimensions, budget, sampler=sampler, **made)
            both.append(self.beside)
        if self.studies.open(AFTER, {}, 1).complete():
            return  # the report items have spoken
        measure = self._progress(both, lambda point: self._measure(point, trials, split))
        while sum(study.run_one(measure) for study in both):
            pass
        for study in both:
            study.finish(measure, self.say)

    def report(self, trials: Trials, split: str) -> None:
        """Ask the report items of the target, lambda = 1 and what was found, unless it was done."""
        base, plain = (self.before[name][self.goal.metric].mean for name in (TARGET, PLAIN))
        for name, study in ((WINNER, self.main), (RANDOM, self.beside)):
            if study and (taken := choose(study.complete(), self.goal, base, plain)):
                self.chosen[name] = taken
                if NBYTES in taken.user_attrs:
                    self.nbytes[name] = taken.user_attrs[NBYTES]
        if WINNER not in self.chosen:
            raise SkillvecError("no trial has a value, so there is nothing to report")
        points = {TARGET: None, PLAIN: self.space.unchanged()}
        points |= {name: self.space.recipe(taken.params) for name, taken in self.chosen.items()}
        after = self.studies.open(AFTER, {}, 1)
        after.finish(lambda _: self._ask(points, trials, split), self.say)
        self.answers = _read_answers(after.complete()[0].user_attrs)

    def _make_goal(self) -> Goal:
        given = self.before[TARGET]
        metric, second = self.asked["metric"], self.asked["second"]
        metric = metric or next(iter(given))
        names = [name for name in (metric, second) if name is not None]
        minimized = tuple(n == NBYTES or less_is_better(n, self.asked["minimize"]) for n in names)
        return Goal(metric, minimized, second, self.asked["keep"])

    def _ask(self, points: Mapping[str, Recipe | None], trials: Trials, split: str) -> Found:
        """Return the answers of several points as the values and attributes of one trial."""
        answers: dict[str, Any] = {}
        known: list[tuple[Recipe | None, Any]] = []
        for name, recipe in points.items():
            said = next((said for other, said in known if other == recipe), None)
            if said is None:
                vector = combine(recipe=recipe.to_dict()) if recipe else None
                outcome = trials.run(vector, 1.0, split)
                wanted = [n for n in (self.asked["metric"], self.asked["second"]) if n is not None]
                wanted = (
                    self.goal.metrics if self.goal else wanted or [*answers.get(TARGET, ())][:1]
                )
                named = (*wanted, *self.asked["minimize"])
                missing = [n for n in named if n not in (NBYTES, *outcome.scores)]
                if not outcome.is_done and (missing or not outcome.scores):
                    raise SkillvecError(
                        f"{name}: the evaluation {outcome.status}: {outcome.message or 'no reason'}"
                    )
                _refuse_missing(missing, outcome.scores)
                said = {metric: vars(score) for metric, score in outcome.scores.items()}
                known.append((recipe, said))
            answers[name] = said
        plain = points[PLAIN]
        attributes: dict[str, Any] = {"scores": answers}
        if self.asked["second"] == NBYTES and plain is not None:
            with self._stored(plain) as (_, nbytes):
                attributes[NBYTES] = {PLAIN: nbytes}
        return [next(iter(answers[PLAIN].values()))["mean"]], attributes

    def _measure(self, point: Mapping[str, Any], trials: Trials, split: str) -> Found:
        """Return the values of a point on the search items; FailedError where it has none."""
        with self._made(self.space.recipe(point)) as (vector, nbytes):
            outcome = trials.run(vector, 1.0, split)
        missing = [name for name in self.goal.metrics if name not in outcome.scores]
        if missing and not outcome.is_done:
            raise FailedError(f"{outcome.status}: {outcome.message}")
        _refuse_missing(missing, outcome.scores)
        values: list[float] = [outcome.scores[name].mean for name in self.goal.metrics]
        said = {
            "scores": {n: [s.mean, s.standard_error] for n, s in outcome.scores.items()},
            "seconds": outcome.seconds,
            **{key: getattr(outcome, key) for key in ("gain", "cosine", "changed")},
        }
        if nbytes is not None:
            said[NBYTES] = nbytes
            values.append(nbytes)
        return values, said

    @contextmanager
    def _made(self, recipe: Recipe) -> Iterator[tuple[SkillVector, int | None]]:
        """Yield the vector of a recipe: where bytes count the file of it, with its size."""
        if self.goal.second != NBYTES:
            yield _combined(recipe), None
            return
        with self._stored(recipe) as (vector, nbytes):
            yield vector, nbytes

    @contextmanager
    def _stored(self, recipe: Recipe) -> Iterator[tuple[SkillVector, int]]:
        """Yield what `combine -o` stores of a recipe, and its bytes; it is removed after."""
        with tempfile.TemporaryDirectory(prefix="skillvec-", dir=self.scratch) as folder:
            vector = _combined(recipe, output=Path(folder, "v.safetensors"))
            files = (path for path in Path(folder).rglob("*") if path.is_file())
            yield vector, sum(path.stat().st_size for path in files)

    def _progress(
        self, both: Sequence[Study], measure: Callable[[Any], Found]
    ) -> Callable[[Any], Found]:
        """Return `measure`, and say after each trial what came and how long the rest may take."""
        begun, count = time.monotonic(), 0

        def tell(shown: str) -> None:
            nonlocal count
            count += 1
            whole = sum(study.budget for study in both)
            done = min(sum(len(study.trials()) for study in both) + 1, whole)
            left = (time.monotonic() - begun) / count * (whole - done)
            self.say(f"{done} of {whole}: {shown} (about {say_duration(left)} left)")

        def measured(point: Any) -> Found:
            try:
                values, said = measure(point)
            except FailedError as error:
                tell(str(error).partition("\n")[0])
                raise
            tell(", ".join(f"{value:.4g}" for value in values))
            return values, said

        return measured


def _combined(recipe: Recipe, **stored: Any) -> SkillVector:
    """Return what a recipe makes; FailedError for parameters that no operator takes together."""
    try:
        return combine(recipe=recipe.to_dict(), **stored)
    except UsageError as error:
        raise FailedError(str(error)) from None


def _refuse_missing(missing: Sequence[str], scores: Scores) -> None:
    if missing:
        raise UsageError(
            f"metric {', '.join(missing)}: the evaluator gives {', '.join(scores) or 'none'}"
        )


def _read_answers(said: Mapping[str, Any]) -> Answers:
    def score(given: Mapping[str, Any]) -> Score:
        values = {key: tuple(given[key]) for key in ("values", "groups")}
        return Score(given["mean"], given["standard_error"], **values)

    return {
        point: {metric: score(given) for metric, given in scores.items()}
        for point, scores in said["scores"].items()
    }
