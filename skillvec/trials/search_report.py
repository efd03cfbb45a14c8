"""What a search leaves: facts, and a folder with the winner's recipe, the trials and the page."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillvec.analysis import search_page
from skillvec.analysis.differences import error_of
from skillvec.analysis.report_csv import table_text
from skillvec.analysis.search_sentences import list_answers
from skillvec.errors import UsageError, printable
from skillvec.report import Line, Report
from skillvec.trials.choosing import PLAIN, TARGET, compare, front, judge, keep_share
from skillvec.trials.folder import write_files
from skillvec.trials.spaces import Space
from skillvec.trials.studies import WHY, Study

if TYPE_CHECKING:
    from skillvec.trials.search import Search

RECIPE = "winner.yaml"
WRITTEN = ("report.json", "trials.csv", RECIPE, "index.html", "history.svg", "history.png")


def describe(space: Space) -> dict[str, Any]:
    """Return a space as plain data, wherever its vectors lie."""
    form = space.recipe(space.start()).to_dict()
    shares = [{k: v for k, v in share.items() if k != "vector"} for share in form["vectors"]]
    return {"op": space.op, "dimensions": space.describe(), "start": form | {"vectors": shares}}


def conclude(run: "Search") -> dict[str, Any]:
    """Return the facts of a search that has come to its end."""
    goal = run.goal
    compared = compare(run.answers, goal)
    reported = {
        point: {name: {"mean": score.mean, "standard_error": error_of(score),
                       "items": len(score.values)} for name, score in scores.items()}
        for point, scores in run.answers.items()
    }  # fmt: skip
    searched = {point: {name: score.mean for name, score in scores.items()}
                for point, scores in run.before.items()}  # fmt: skip
    for point, trial in run.chosen.items():
        searched[point] = {name: mean for name, (mean, _) in trial.user_attrs["scores"].items()}
    ended, complete = run.main.trials(), run.main.complete()
    facts: dict[str, Any] = {
        **run.asked,
        "metric": goal.metric,
        "less_is_better": goal.minimized[0],
        "verdict": judge(compared, goal, run.nbytes),
        "trials": {"complete": len(complete), "failed": len(ended) - len(complete)},
        "reported": {point: reported[point] for point in (*run.chosen, PLAIN, TARGET)},
        "searched": searched,
        "comparisons": [
            {"one": c.one, "other": c.other, "metric": c.metric, "word": c.word,
             "difference": c.difference.mean, "low": c.difference.low, "high": c.difference.high,
             "p": c.difference.p, "is_paired": c.difference.is_paired}
            for c in compared
        ],
        "chosen": {
            point: {"trial": trial.number, "point": trial.params,
                    "recipe": run.space.recipe(trial.params).to_dict()}
            for point, trial in run.chosen.items()
        },
        "nbytes": run.nbytes,
        "history": _list_history(run),
    }  # fmt: skip
    if goal.second is not None and (share := keep_share(run.answers, goal)) is not None:
        facts["kept"] = dict(zip(("share", "low", "high"), share, strict=True))
    return facts | {"answer": list_answers(facts)}


def _list_history(run: "Search") -> list[Line]:
    """Return the trials of sampler and random search, in their order, with the best so far."""
    rows: list[Line] = []
    for name, study in _studies(run):
        best: Any = None
        complete = study.complete()
        beaten = front(complete, run.goal) if run.goal.second is not None else []
        for trial in complete:
            score = trial.values[0]
            if best is None or run.goal.better(trial.values, 0) > run.goal.better([best], 0):
                best = score
            row = {"by": name, "number": trial.number, "score": score, "best": best}
            if run.goal.second is not None:
                row |= {"second": trial.values[1], "front": trial in beaten}
            rows.append(row)
    return rows


def _studies(run: "Search") -> Iterator[tuple[str, Study]]:
    yield run.asked["sampler"], run.main
    if run.beside is not None:
        yield "random", run.beside


def _csv_text(run: "Search") -> str:
    """Return every trial that counts as a row: its values, choices and what was measured."""
    rows: list[Line] = []
    for name, study in _studies(run):
        for trial in study.trials():
            said = dict(trial.user_attrs)
            row = {"search": name, "trial": trial.number, "state": trial.state.name.lower(),
                   **dict.fromkeys(run.space.dimensions), **trial.params}  # fmt: skip
            for metric, (mean, error) in said.pop("scores", {}).items():
                row |= {metric: mean, f"{metric} standard error": error}
            rows.append(row | {key: printable(str(v)) if key == WHY else v
                               for key, v in said.items()})  # fmt: skip
    return table_text(rows)


def write_report(folder: Path, run: "Search") -> Report:
    """Write the folder of a search that has come to its end, and return its report.

    Without the extra report there are neither page nor pictures, which a warning says.
    """
    report = Report("search", conclude(run))
    files: dict[str, bytes] = {}
    content = report.to_dict()
    try:
        files["index.html"] = search_page.html(content).encode()
        files |= dict(search_page.figures(content))
    except UsageError as error:  # an extra that is not installed
        report.warnings.append(f"{error}; report.json and trials.csv are written without it")
    yaml: Any = import_module("yaml")
    recipe = report.facts["chosen"]["winner"]["recipe"]
    head = "".join(f"# {printable(line)}\n" for line in report.facts["answer"])
    body = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    files[RECIPE] = f"{head}{body}".encode()
    files["trials.csv"] = _csv_text(run).encode()
    files["report.json"] = (json.dumps(report.to_dict(), indent=1) + "\n").encode()
    write_files(folder, WRITTEN, files)
    return report
