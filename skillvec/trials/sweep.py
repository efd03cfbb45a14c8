"""sweep: one loaded model, one vector, many lambdas, and what an evaluation says of each."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skillvec.analysis.sweep_report import (
    SKILL,
    TARGET,
    Asked,
    Tried,
    conclude,
    csv_text,
    name_point,
)
from skillvec.analysis.sweep_sentences import write_score
from skillvec.analysis.wording import say_duration
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.engine.outputs import PathLike
from skillvec.errors import SkillvecError, UsageError, printable
from skillvec.report import Report, TrialWatcher
from skillvec.trials.controls import CONTROLS, read_controls
from skillvec.trials.evaluators import open_evaluator, refuse_metric
from skillvec.trials.folder import take_folder, write_files
from skillvec.trials.journal import Journal
from skillvec.trials.lambdas import read_lambdas
from skillvec.trials.scores import Evaluator, Function, Score, less_is_better, names_of
from skillvec.trials.trial import Outcome, Trials
from skillvec.vectors.vector import SkillVector
from skillvec.verbs import combine
from skillvec.verbs._apply import plan_request

JOURNAL = "journal.jsonl"
WRITTEN = ("report.json", "points.csv", "index.html", "curve.svg", "curve.png")


@dataclass(frozen=True)
class Point:
    """A curve and a lambda: what is evaluated once."""

    curve: str
    lam: float

    @property
    def name(self) -> str:
        return name_point(self.curve, self.lam)


def sweep(
    target: PathLike,
    *vectors: PathLike | SkillVector,
    eval: str | Function | Evaluator,
    output: PathLike,
    lam: str | float | Sequence[float | str] = "-1:2:0.25",
    weights: Sequence[float] | None = None,
    eval_options: Mapping[str, Any] | None = None,
    metric: str | None = None,
    minimize: str | Sequence[str] = (),
    control: str | Sequence[str] = (),
    scratch: PathLike | None = None,
    timeout: float | None = None,
    dtype: str = "auto",
    device: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    rows: str = "strict",
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: TrialWatcher | None = None,
) -> Report:
    """Evaluate target + lam * vector at every lambda, on a model that is loaded once.

    `lam` are numbers and ranges "START:STOP:STEP" with both ends; 0, the `target` itself, is always
    among them and comes first. Several `vectors` are one linear combination by `weights`. `eval` is
    a function of model and tokenizer that returns scores, or a text that says how (docs/search.md),
    with `eval_options`; `metric` says which score decides, `minimize` of which less is better,
    `timeout` how many seconds one evaluation may take, `scratch` where folders for it are written.
    `control` are random and shuffled: noise of the vector's size, or its own values in other
    places. The model is loaded in `dtype` on `device`; `rounding` and `seed` as of apply. The
    folder `output` gets report.json, points.csv, and with the extra report index.html and the
    curve; in its journal every point stands as soon as it is done, and the same call goes on from
    there. Points that fail are marked. Raises UsageError, IncompatibleError where the vector does
    not fit, SkillvecError where the target itself cannot be evaluated.
    """
    lambdas, controls = read_lambdas(lam), read_controls(control)
    evaluator = open_evaluator(eval, eval_options or {})
    minimize = names_of(minimize)
    for name in (metric, *minimize):
        if name is not None:
            refuse_metric(evaluator, name)
    vector = combine(*(SkillVector.open(one, rename=rename) for one in vectors), weights=weights)
    inputs = [os.fspath(target), *(side.ref for side in vector.inputs())]
    folder = take_folder(output, inputs, JOURNAL, "sweep")
    chosen: dict[str, Any] = {
        "dtype": dtype, "device": device, "rounding": rounding, "seed": seed,
        "include": list(include), "exclude": list(exclude), "rename": list(rename), "rows": rows,
    }  # fmt: skip
    points = [Point(TARGET, 0.0)]
    points += [Point(curve, x) for curve in (SKILL, *controls) for x in lambdas if x]
    with Trials(os.fspath(target), evaluator, scratch=scratch, timeout=timeout, workers=workers,
                **chosen) as trials:  # fmt: skip
        asked = {"form": 1, "target": trials.target_digest, "vector": _identify(vector),
                 "eval": evaluator.spec, **chosen}  # fmt: skip
        report = _plan(target, vector, evaluator, points, controls, chosen)
        report.facts |= {"output": os.fspath(output), "scratch": scratch and os.fspath(scratch)}
        report.facts |= {"lam": lambdas, "workers": workers}
        if dry_run:
            if watcher:
                watcher.planned(report)
            return report
        folder.mkdir(parents=True, exist_ok=True)
        with Journal(folder / JOURNAL, asked, force) as journal:
            run = _Run(trials, journal, _make_vectors(vector, controls, seed),
                       metric, minimize, watcher)  # fmt: skip
            report.facts["resumed"] = sum(point in run.done for point in points)
            if watcher:
                watcher.planned(report)
            tried = run.try_all(points)
    assert run.metric is not None
    report.facts |= conclude(tried, Asked(run.metric, less_is_better(run.metric, minimize)))
    report.facts["load_seconds"] = trials.load_seconds
    _write(folder, report)
    return report


def _plan(
    target: PathLike, vector: SkillVector, evaluator: Evaluator, points: Sequence[Point],
    controls: Sequence[str], chosen: Mapping[str, Any],
) -> Report:  # fmt: skip
    """Return the report of a plan: what is known before any model is loaded.

    Raises IncompatibleError where the vector does not fit the target.
    """
    point = open_checkpoint(target, "target")
    plan, _ = plan_request(point, vector, {**chosen, "lam": 1.0, "dtype": None})
    facts = {
        "formula": "TARGET + LAM * V",
        "target": point.facts,
        "target_nbytes": sum(spec.nbytes for spec in point.values()),
        "vector": vector.describe(),
        "scale": vector.scale,
        "name": vector.ref if vector.scale == 1 else f"{vector.scale:g} * {vector.ref}",
        "lineage": vector.dtypes,
        "verdict": plan.verdict,
        "eval": evaluator.spec,
        "takes_folder": evaluator.takes_folder,
        "control": list(controls),
        "planned": len(points),
        **chosen,
    }
    return Report("sweep", facts, warnings=plan.warnings)


def _make_vectors(
    vector: SkillVector, controls: Sequence[str], seed: int
) -> dict[str, SkillVector | None]:
    """Return what is attached for the points of each curve."""
    made: dict[str, SkillVector | None] = {TARGET: None, SKILL: vector}
    for kind in controls:
        parts: Any = vector.terms()
        vectors, weights = [part for part, _ in parts], [weight for _, weight in parts]
        made[kind] = combine(*vectors, weights=weights, op=CONTROLS[kind](), seed=seed)
    return made


def _identify(vector: SkillVector) -> list[Any]:
    """Return what a journal knows a vector by: digests and factors, wherever its files lie."""
    if vector.parts:
        recipe = {key: value for key, value in vector.describe().items() if key != "formula"}
        shares = [
            {key: value for key, value in share.items() if key != "vector"}
            for share in recipe.get("recipe", {}).get("vectors", ())
        ]
        return [vector.scale, shares, [_identify(part) for part in vector.parts]]  # type: ignore[arg-type]
    if vector.digest is not None:
        return [vector.scale, vector.digest]
    sides = [vector.manifest["tuned"], vector.manifest["base"]]
    return [vector.scale, vector.manifest.get("identity"),
            *(side and side["probe"] for side in sides)]  # fmt: skip


class _Run:
    """The points of a sweep one after the other, each in the journal before the next."""

    def __init__(
        self, trials: Trials, journal: Journal, vectors: Mapping[str, SkillVector | None],
        metric: str | None, minimize: Sequence[str], watcher: TrialWatcher | None,
    ) -> None:  # fmt: skip
        self.trials, self.journal, self.vectors = trials, journal, vectors
        self.metric, self._minimize, self._watcher = metric, minimize, watcher
        self.done = {
            Point(line["curve"], line["lam"]): _read_outcome(line["outcome"])
            for line in journal.found
        }

    def try_all(self, points: Sequence[Point]) -> list[Tried]:
        """Evaluate every point that is not done, and return what came out of all of them."""
        tried, spent, fresh = [], 0.0, 0
        left = sum(point not in self.done for point in points)
        for number, point in enumerate(points, 1):
            outcome = self.done.get(point)
            if outcome is None:
                outcome = self._try(point, number - 1, len(points))
                spent, fresh = spent + outcome.seconds + outcome.attach_seconds, fresh + 1
                self._tell(number, len(points), point, outcome, spent / fresh * (left - fresh))
            self._refuse(point, outcome)
            measured = {
                "gain": outcome.gain,
                "cosine": outcome.cosine,
                "changed": outcome.changed,
                "seconds": outcome.seconds,
                "attach_seconds": outcome.attach_seconds,
            }
            tried.append(Tried(point.curve, point.lam, outcome.status, outcome.message,
                               outcome.scores if outcome.is_done else {}, measured))  # fmt: skip
        return tried

    def _try(self, point: Point, before: int, count: int) -> Outcome:
        """Evaluate a point; what is done goes into the journal, what failed is tried again."""
        try:
            outcome = self.trials.run(self.vectors[point.curve], point.lam)
        except KeyboardInterrupt:
            where = self.journal.path.parent
            raise KeyboardInterrupt(
                f"{before} of {count} points are done; the same command goes on from {where}"
            ) from None
        if outcome.is_done:
            self.journal.add({"curve": point.curve, "lam": point.lam, "outcome": asdict(outcome)})
        return outcome

    def _refuse(self, point: Point, outcome: Outcome) -> None:
        """Settle the metric with the target's scores; raise where there are none."""
        if point.curve != TARGET:
            return
        if not outcome.is_done:
            raise SkillvecError(
                f"eval: the target itself cannot be evaluated ({outcome.status}):"
                f" {printable(outcome.message)}; nothing else was tried"
            )
        self.metric = self.metric or next(iter(outcome.scores), None)
        for metric in (self.metric, *self._minimize):
            if metric not in outcome.scores:
                names = ", ".join(outcome.scores)
                raise UsageError(f"metric {metric}: the evaluation gives {names or 'no metric'}")

    def _tell(self, number: int, count: int, point: Point, outcome: Outcome, left: float) -> None:
        if self._watcher is None:
            return
        name = self.metric or next(iter(outcome.scores), "")
        score = outcome.scores.get(name) if outcome.is_done else None
        said = f"{outcome.status}: {outcome.message}" if score is None else f"{name} {_show(score)}"
        more = f", about {say_duration(left)} left" if left else ""
        spent = say_duration(outcome.seconds + outcome.attach_seconds)
        self._watcher.tried(f"{number} of {count}: {point.name}: {said} ({spent}{more})")


def _show(score: Score) -> str:
    error = "" if score.standard_error is None else f" ± {score.standard_error:.2g}"
    return f"{write_score(score.mean)}{error}"


def _read_outcome(said: Mapping[str, Any]) -> Outcome:
    """Return an outcome as the journal has it."""
    scores = {
        name: Score(**score | {key: tuple(score[key]) for key in ("values", "groups")})
        for name, score in said["scores"].items()
    }
    return Outcome(**{**said, "scores": scores})


def _write(folder: Path, report: Report) -> None:
    """Write the report in all its forms; without the extra report, what can be."""
    from skillvec.analysis import sweep_page

    content = report.to_dict()
    files: dict[str, bytes] = {}
    try:
        files["index.html"] = sweep_page.html(content).encode()
        files |= dict(sweep_page.figures(content))
    except UsageError as error:  # an extra that is not installed
        report.warnings.append(f"{error}; report.json and points.csv are written without it")
    files["points.csv"] = csv_text(content["points"]).encode()
    files["report.json"] = (json.dumps(report.to_dict(), indent=1) + "\n").encode()
    write_files(folder, WRITTEN, files)
