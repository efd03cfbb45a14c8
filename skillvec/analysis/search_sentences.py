"""What a person reads of a search: the answer in sentences, the plan and the table of points.

Terminal and page say the same. Facts are those of skillvec.trials.search_report.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from skillvec.analysis.sweep_sentences import write_p, write_score
from skillvec.analysis.wording import Grid, human_bytes, wrap, write_optional

Facts = Mapping[str, Any]
NAMES = {"target": "the target", "lambda 1": "lambda = 1", "winner": "the winner",
         "random": "the best of random search"}  # fmt: skip
UNSEEN = "on items that the search never saw"


def say_search_plan(facts: dict[str, Any]) -> list[str]:
    """Return what may be chosen, by what, and what that takes."""
    bounds = [f"{name} {words}" for name, words in facts["space"]["dimensions"].items()]
    beside = "" if facts["sampler"] == "random" else ", and as many of random search"
    lines = [
        "a recipe for TARGET, searched",
        f"  target  {facts['target']}",
        *(f"  vector  {ref}" for ref in facts["vectors"]),
        f"  eval    {facts['eval']}",
    ]
    if facts["report_eval"]:
        lines.append(f"  report  {facts['report_eval']}")
    lines += [f"  {'space' if i == 0 else '':7} {line}" for i, line in enumerate(bounds)]
    return [*lines, f"  trials  {facts['budget']} of {facts['sampler']}{beside}"]


def say_search(facts: Facts, verbose: bool) -> list[str | Grid]:
    """Return what the terminal shows in the end: the answer, then the points."""
    if "verdict" not in facts:
        return ["nothing was evaluated"]
    said: list[str | Grid] = [wrap(line) for line in list_answers(facts)]
    said.append(tabulate(facts))
    return [*said, list_differences(facts), list_choices(facts)] if verbose else said


def list_answers(facts: Facts) -> list[str]:
    """Return the answer, what lambda = 1 and random search are beside it, and what failed."""
    said = [_say_finding(facts)]
    if kept := facts.get("kept"):
        said.append(
            f"It keeps {kept['share']:.3g} of the gain, 95 % interval {kept['low']:.3g} to"
            f" {kept['high']:.3g}."
        )
    if facts["verdict"] != "found":
        said.append("Its recipe, winner.yaml, is a candidate only.")
    if plain := _find(facts, "lambda 1", "target"):
        said.append(f"The vector as it is, at lambda = 1, is {_say(plain)} the target.")
    if beside := _find(facts, "winner", "random"):
        said.append(
            f"Random search with as many trials came to {_score(facts, 'random')}"
            f"{_say_second(facts, 'random')}: the winner is {_say(beside)} that."
        )
    failed = facts["trials"]["failed"]
    if failed:
        said.append(f"{failed} of {failed + facts['trials']['complete']} trials failed.")
    return said


def _say_finding(facts: Facts) -> str:
    metric, second = facts["metric"], facts["second"]
    if facts["verdict"] == "unknown":
        return (
            "Nothing can be said: the evaluator gives neither the values of its items nor standard"
            f" errors. {_say_scores(facts, metric)}."
        )
    if second is not None:
        return _say_two(facts)
    plain, target = _find(facts, "winner", "lambda 1"), _find(facts, "winner", "target")
    scores = _say_scores(facts, metric)
    if facts["verdict"] == "found":
        return f"Found a better recipe: {UNSEEN} it is {_say(plain)} lambda = 1. {scores}."
    of = f"the best of {facts['trials']['complete']} trials is"
    if plain["word"] != "better":
        return f"Nothing found: {UNSEEN} {of} {_say(plain)} lambda = 1. {scores}."
    return (
        f"Nothing found: {UNSEEN} {of} {_say(plain)} lambda = 1, but {_say(target)} the target"
        f" without any vector. {scores}."
    )


def _say_two(facts: Facts) -> str:
    """Return what was found of two objectives: what the recipe buys, and what it keeps."""
    metric, second = facts["metric"], facts["second"]
    share = f"{facts['keep']:.3g} of the gain of lambda = 1"
    kept = _find(facts, "winner", "kept")
    if second == "bytes":
        own, whole = (facts["nbytes"][name] for name in ("winner", "lambda 1"))
        recipe = f"a recipe of {human_bytes(own)}, {100 * own / whole:.0f} % of lambda = 1,"
    else:
        better = _say(_find(facts, "winner", "lambda 1", second))
        recipe = f"a recipe, whose {second} is {better} lambda = 1,"
    scores = _say_scores(facts, metric)
    if facts["verdict"] == "found":
        return (
            f"Found: {recipe} keeps at least {share}; {UNSEEN} its {metric} is {_say(kept)} that."
            f" {scores}."
        )
    return (
        f"Nothing found beyond noise: the best of {facts['trials']['complete']} trials is {recipe}"
        f" but {UNSEEN} its {metric} is {_say(kept)} {share}, and"
        f" {_say(_find(facts, 'winner', 'target'))} the target. {scores}."
    )


def _say_second(facts: Facts, point: str) -> str:
    """Return the second objective of a point, ready to stand behind its score; "" for one."""
    if facts["second"] is None:
        return ""
    if facts["second"] == "bytes":
        return f" with {human_bytes(facts['nbytes'][point])} stored"
    return f" with a {facts['second']} of {_score(facts, point, facts['second'])}"


def _find(facts: Facts, one: str, other: str, metric: str | None = None) -> Any:
    wanted = (one, other, metric or facts["metric"])
    rows = facts["comparisons"]
    return next((r for r in rows if (r["one"], r["other"], r["metric"]) == wanted), None)


def _say(row: Mapping[str, Any]) -> str:
    """Return how far one point is above another, ready for what it is compared with."""
    size = abs(row["difference"])
    ends = f"95 % interval {interval}" if (interval := write_ends(row)) else "too few items"
    if row["word"] == "unknown":
        side = "above" if row["difference"] >= 0 else "below"
        return f"{size:.3g} {side} (its spread is not known)"
    if row["low"] == row["high"] == 0:
        return "no different from"
    if row["word"] == "within noise":
        return f"within noise (by {_signed(row['difference'])}, {ends}) of"
    return f"{row['word']} (by {size:.3g}, {ends}) than"


def write_ends(row: Mapping[str, Any]) -> str:
    """Return the ends of the interval of a difference, "" where there are none."""
    if None in (row["low"], row["high"]) or not isfinite(row["low"]):
        return ""
    return f"{_signed(row['low'])} to {_signed(row['high'])}"


def _signed(value: float | None) -> str:
    return write_optional(value, "+.3g")


def _score(facts: Facts, point: str, metric: str | None = None) -> str:
    return write_score(facts["reported"][point][metric or facts["metric"]]["mean"])


def _say_scores(facts: Facts, metric: str) -> str:
    own, plain, target = (_score(facts, name) for name in ("winner", "lambda 1", "target"))
    less = " (less is better)" if metric == facts["metric"] and facts["less_is_better"] else ""
    return (
        f"Its {metric}{less} is {own}, that of lambda = 1 {plain} and that of the target {target}"
    )


def tabulate(facts: Facts) -> Grid:
    """Return the points with what the search items and the report items say of them."""
    metrics = [name for name in (facts["metric"], facts["second"]) if name not in (None, "bytes")]
    heads = ["point"]
    for name in metrics:
        heads += [name, "±", f"{name} when searched"]
    heads += ["stored"] * (facts["second"] == "bytes")
    rows = []
    for point, scores in facts["reported"].items():
        cells = [NAMES[point]]
        for name in metrics:
            score, seen = scores[name], facts["searched"].get(point, {}).get(name)
            cells += [write_score(score["mean"]),
                      write_optional(score["standard_error"], ".2g"),
                      write_score(seen)]  # fmt: skip
        if facts["second"] == "bytes":
            nbytes = facts["nbytes"].get(point)
            cells.append("-" if nbytes is None else human_bytes(nbytes))
        rows.append(cells)
    return Grid(heads, rows)


def list_differences(facts: Facts) -> Grid:
    """Return the comparisons of the items to report; more is better in all of them."""
    rows = []
    for row in facts["comparisons"]:
        other = NAMES.get(row["other"], f"{facts['keep']:g} of the gain of lambda = 1")
        p = None if row["word"] == "unknown" else row["p"]
        rows.append([NAMES[row["one"]], other, row["metric"], _signed(row["difference"]),
                     write_ends(row) or "-", write_p(p), row["word"]])  # fmt: skip
    heads = ["point", "compared with", "metric", "better by", "95 % interval", "p", "verdict"]
    return Grid(heads, rows)


def list_choices(facts: Facts) -> Grid:
    """Return what the winner and the best of random search chose."""
    points = [name for name in ("winner", "random") if name in facts["chosen"]]
    rows = []
    for name, bounds in facts["space"]["dimensions"].items():
        chosen = [facts["chosen"][point]["point"][name] for point in points]
        rows.append(
            [name, bounds, *(f"{c:.4g}" if isinstance(c, float) else str(c) for c in chosen)]
        )
    return Grid(["choice", "allowed", *(NAMES[name] for name in points)], rows)
