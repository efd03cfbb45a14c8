"""What a person reads of a sweep: the answer in sentences, the plan and the table of its points.

Terminal and page say the same. Facts are those of skillvec.analysis.sweep_report.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from skillvec.analysis.sweep_report import ALPHA, SKILL, TARGET, name_point
from skillvec.analysis.wording import Grid, human_bytes, wrap, write_optional
from skillvec.report import Line

Facts = Mapping[str, Any]
OPTIMISTIC = (
    "The best of several lambdas is picked by the very items that score it, so its score is"
    " optimistic: skillvec search keeps items apart for an honest one."
)


def write_score(value: float | None) -> str:
    """Return a score at three digits behind the point, large and small ones at four digits."""
    if value is None:
        return "-"
    small, large = value and abs(value) < 0.01, abs(value) >= 10
    return f"{value:{'.2g' if small else '#.4g' if large else '.3f'}}"


# ----------------------------------------------------------------------------------------- the plan


def say_sweep_plan(facts: dict[str, Any]) -> list[str]:
    """Return what is evaluated, and what that takes."""
    target, size = facts["target"], human_bytes(facts["target_nbytes"])
    took = (
        f"written to a folder of {size} for each point" if facts["takes_folder"] else "loaded once"
    )
    lambdas = ", ".join(f"{lam:g}" for lam in facts["lam"][:12])
    more = f" and {len(facts['lam']) - 12} more" if len(facts["lam"]) > 12 else ""
    resumed = facts.get("resumed")
    return [
        "TARGET + LAM * V, evaluated at every lambda",
        f"  target  {target['path']} ({'+'.join(target['dtypes'])}, {size}), {took}",
        f"  vector  {facts['name']}",
        f"  verdict {facts['verdict']}",
        f"  eval    {facts['eval']}",
        f"  lam     {lambdas}{more}",
        *(
            [f"  control {', '.join(facts['control'])}, at the same lambdas"]
            * bool(facts["control"])
        ),
        f"  points  {facts['planned']}" + (f", {resumed} of them done before" if resumed else ""),
    ]


# --------------------------------------------------------------------------------------- the answer


def say_sweep(facts: Facts, verbose: bool) -> list[str | Grid]:
    """Return what the terminal shows in the end: the answer, then the points.

    If verbose also all metrics of every point.
    """
    if "points" not in facts:
        return [
            f"{facts['planned']} points would be evaluated; what one costs is not known before the"
            " target was"
        ]
    said: list[str | Grid] = [wrap(line) for line in list_answers(facts)]
    return [*said, tabulate(facts), *([tabulate_metrics(facts)] if verbose else [])]


def list_answers(facts: Facts) -> list[str]:
    """Return the answer, what the controls make of it, and what to think of it."""
    said = [_say_answer(facts)]
    if controls := _say_controls(facts):
        said.append(controls)
    if facts["failed"]:
        count = len(facts["failed"])
        said.append(
            f"{count} point{'' if count == 1 else 's'} failed: {_enumerate(facts['failed'])};"
            " the same command tries them again."
        )
    if facts["found"] and facts["compared"] > 1:
        said.append(OPTIMISTIC)
    return said


def say_lead(facts: Facts) -> str:
    """Return the answer in one plain sentence, without how sure it is."""
    return "".join(_say_finding(facts)[:1]) + "."


def _say_answer(facts: Facts) -> str:
    return "".join(_say_finding(facts)) + "."


def _say_finding(facts: Facts) -> tuple[str, ...]:
    """Return what was found, how sure that is, and what lambda 1 gives."""
    metric, best = facts["metric"], facts["best"]
    zero = write_score(facts["target_score"])
    if best is None:
        return (f"No lambda could be compared with the target, whose {metric} is {zero}",)
    score, lam = write_score(best["scores"][metric]["mean"]), f"{best['lam']:g}"
    of = f"the best of {facts['compared']} lambdas" if facts["compared"] > 1 else "the one lambda"
    one, sure = _say_one(facts), f" ({_say_interval(best, facts['compared'])})"
    if not facts["is_known"]:
        return (
            f"{metric} is {zero} at lambda 0 and {score} at lambda {lam}, {of}",
            one,
            "; no standard error is known, so nobody can say whether that is more than noise",
        )
    if facts["found"]:
        goes = "falls" if best["difference"] < 0 else "rises"
        return f"{metric} {goes} from {zero} to {score} at lambda {lam}, {of}", sure, one
    least = f"lambda {lam} with {score}" if facts["compared"] > 1 else score
    # in the wrong direction, or it were found; no ends where few items all moved by the same
    is_apart = best["low"] is not None and (best["low"] > 0 or best["high"] < 0)
    stands = "worse than" if is_apart else "within noise of"
    return (
        f"Nothing was found: {metric} of {of}, {least}, is {stands} the target's own {zero}",
        sure,
        one,
    )


def _say_interval(row: Line, count: int) -> str:
    """Return a difference with its interval, which holds for all that were compared at once."""
    size = f"difference {row['difference']:+.3g}"
    if row["low"] is None:
        return f"{size}, spread unknown"
    all_at_once = f", for all {count} at once" if count > 1 else ""
    return (
        f"{size}, {100 * (1 - ALPHA):.0f} % interval {row['low']:+.3g} to {row['high']:+.3g}"
        f"{all_at_once}"
    )


def _say_one(facts: Facts) -> str:
    """Return what lambda 1 gives, where it is neither the best nor missing."""
    metric = facts["metric"]
    for row in facts["points"]:
        if (row["curve"], row["lam"]) == (SKILL, 1) and row is not facts["best"]:
            if row["lam"] == facts["best"]["lam"] or metric not in row["scores"]:
                break
            return f"; lambda 1 gives {write_score(row['scores'][metric]['mean'])}"
    return ""


def _say_controls(facts: Facts) -> str:
    """Return where the controls stay, and whether the best point is better than they are."""
    metric, said = facts["metric"], []
    for kind in facts["control"]:
        means = [row["scores"][metric]["mean"] for row in facts["points"]
                 if row["curve"] == kind and metric in row["scores"]]  # fmt: skip
        if means:
            low, high = map(write_score, (min(means), max(means)))
            where = f"is {low}" if low == high else f"stays between {low} and {high}"
            said.append(f"the {kind} control {where}")
    if not said:
        return ""
    text = _enumerate(said)
    text = text[0].upper() + text[1:]
    if not facts["found"] or not facts["beside"]:
        return f"{text}."
    lam = f"{facts['best']['lam']:g}"
    if equal := [one["control"] for one in facts["beside"] if not one["beaten"]]:
        return (
            f"{text}; at lambda {lam} the vector is not clearly better than the"
            f" {_enumerate(equal)} control: any change of that size may do the same."
        )
    return f"{text}; at lambda {lam} the vector is clearly better."


def _enumerate(words: Sequence[str]) -> str:
    shown = [*words[:5], *([f"{len(words) - 5} more"] if len(words) > 5 else [])]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


# ---------------------------------------------------------------------------------------- the table


def tabulate(facts: Facts) -> Grid:
    """Return a row for each lambda, the controls at the same one beside it."""
    metric, points = facts["metric"], facts["points"]
    at = {(row["curve"], row["lam"]): row for row in points}
    lambdas = sorted(row["lam"] for row in points if row["curve"] in (TARGET, SKILL))
    rows = []
    for lam in lambdas:
        row = at[(SKILL, lam) if lam else (TARGET, 0)]
        score = row["scores"].get(metric)
        cells = [row["status"], "-"]
        if score:
            cells = [write_score(score["mean"]), write_score(score["standard_error"])]
        cells += [write_optional(row.get("difference"), "+.3g"), write_p(row.get("p"))]
        cells.append(write_optional(row["gain"], ".3f"))
        for kind in facts["control"]:
            beside = at.get((kind, lam), {"scores": {}, "status": "-"})
            found = beside["scores"].get(metric)
            cells.append(write_score(found["mean"]) if found else beside["status"])
        rows.append([f"{lam:g}{' (target)' * (not lam)}", *cells])
    heads = ["lambda", metric, "±", "less target", "p", "gain", *facts["control"]]
    return Grid(heads, rows)


def write_p(p: float | None) -> str:
    """Return a p-value, "-" for none."""
    return "-" if p is None else "< .001" if p < 0.001 else f"{p:.3f}"


def tabulate_metrics(facts: Facts) -> Grid:
    """Return a row for each point with the means of all metrics."""
    points = facts["points"]
    metrics = list(dict.fromkeys(name for row in points for name in row["scores"]))
    rows = []
    for row in points:
        means = [row["scores"][name]["mean"] if name in row["scores"] else None for name in metrics]
        rows.append([name_point(row["curve"], row["lam"]), *map(write_score, means)])
    return Grid(["point", *metrics], rows)
