"""The page of a sweep and its curve."""

from collections.abc import Iterator, Mapping
from typing import Any

from skillvec.analysis import plain_page
from skillvec.analysis.figures import Figure, Spec, shorten
from skillvec.analysis.page import Entry, draw
from skillvec.analysis.plain_page import Page, Table, head
from skillvec.analysis.statistics_table import typeset
from skillvec.analysis.sweep_report import SKILL, TARGET, name_point
from skillvec.analysis.sweep_sentences import (
    list_answers,
    say_lead,
    tabulate_metrics,
    write_p_of,
    write_score,
)
from skillvec.analysis.wording import human_bytes, write_optional
from skillvec.errors import printable
from skillvec.report import Line

Content = Mapping[str, Any]
LEGEND = {SKILL: "vector", "random": "random control", "shuffled": "shuffled control"}
MOST_TICKS = 13  # that stand beside each other
BARS = 1.96  # standard errors: 95 % of one score by itself
TERMS = (
    ("score", "Score and its bars", "The mean over the items of the evaluation. ± is its standard"
     " error; bars are 95 % intervals of one score by itself, 1.96 standard errors. Two points"
     " answered the same items, so their difference is often known better than either score."),
    ("difference", "Difference, interval and p", "The score less the target's, by item, or by group"
     " of items where the evaluation says which belong together. Intervals (95 %) and p hold for"
     " all lambdas at once (Bonferroni, Holm): of a vector that does nothing, one sweep in twenty"
     " shows a p of at most .05."),
    ("gain", "Gain and cosine", "What of lambda times the vector arrived after rounding to the"
     " model's dtype: its length along what was asked for, and its direction. 1 is all of it."),
    ("control", "Controls", "Vectors of the same size, tensor by tensor: random noise, or the"
     " vector's own values in other places. What they do, any change of that size does."),
    ("seconds", "Seconds", "What the evaluation of a point took; to attach is the time before it,"
     " in which the vector was added to the model."),
)  # fmt: skip


def html(content: Content) -> str:
    """Return the page; UsageError where the extra report is missing."""
    said = list_answers(content)
    return plain_page.html(
        Page(
            title=f"{content['metric']} along lambda",
            lead=say_lead(content),
            legend=[("target", content["target"]["ref"]), ("vector", content["name"])],
            figure=curve(content),
            answer=said[1:],
            numbers=_list_numbers(content),
            warnings=content["warnings"],
            tables=[_list_points(content), *_list_others(content)],
            asked=[("answer in full", said[0]), *_list_asked(content)],
            terms=TERMS,
        ),
        {key: value for key, value in content.items() if key != "tensors"},
    )


def _list_numbers(content: Content) -> list[Entry]:
    """Return the few numbers that the answer rests on."""
    metric, best = content["metric"], content["best"]

    def entry(title: str, anchor: str, value: str, beside: str = "") -> Entry:
        found = head(TERMS, title, anchor)
        return found._replace(value=typeset(value), beside=typeset(beside))

    made = [entry("the target", "score", write_score(content["target_score"]))]
    if best is None:
        return made
    score, lam = best["scores"][metric], f"lambda {best['lam']:g}"
    error = score["standard_error"]
    made.append(entry(lam, "score", write_score(score["mean"]),
                      "" if error is None else f"± {write_score(error)}"))  # fmt: skip
    low, high = best.get("low"), best.get("high")
    ends = "" if low is None or high is None else f"{low:+.3g} to {high:+.3g}"
    made.append(entry("difference", "difference", write_optional(best["difference"], "+.3g"), ends))
    made.append(entry("p", "difference", write_p_of(best)))
    for beside in content["beside"]:
        made.append(entry(f"{beside['control']} control", "control", write_score(beside["score"]),
                          f"at {lam}"))  # fmt: skip
    return [*made, entry("gain", "gain", write_optional(best["gain"], ".3f"))]


def figures(content: Content) -> Iterator[tuple[str, bytes]]:
    """Yield file name and bytes of the curve, as SVG and as PNG."""
    return draw([curve(content)])


def curve(content: Content) -> Figure:
    """Return scores along lambda: vector and controls with bars, the target's own as a line."""
    metric, zero = printable(content["metric"]), content["target_score"]
    shown = [LEGEND[kind] for kind in (SKILL, *content["control"])]
    values = [value for row in content["points"][::-1] for value in _place(row, content)]
    colour = {"field": "curve", "type": "nominal", "scale": {"domain": shown}, "title": None,
              "legend": {"columns": len(shown)}}  # fmt: skip
    lambdas = sorted({row["lam"] for row in content["points"]})
    ticks = {"values": lambdas} if len(lambdas) <= MOST_TICKS else {}
    x: Spec = {"field": "lam", "type": "quantitative", "title": "lambda",
               "axis": {"format": ".6~g", "labelFlush": False, **ticks}}  # fmt: skip
    y: Spec = {"field": "score", "type": "quantitative", "title": metric, "scale": {"zero": False}}
    # a metric's name is a title, never a field: of those, dots and brackets are paths
    tip = [{"field": key, "type": "nominal", "title": title} for key, title in
           (("curve", "curve"), ("lambda", "lambda"), ("said", metric))]  # fmt: skip
    layers: list[Spec] = [
        {"data": {"values": [{"score": zero}]},
         "mark": {"type": "rule", "strokeDash": [4, 3], "color": "#888"}, "encoding": {"y": y}},
        {"mark": {"type": "rule", "strokeWidth": 1.2, "opacity": 0.7},
         "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"},
                      "color": colour}},
        {"mark": {"type": "line"}, "encoding": {"x": x, "y": y, "color": colour}},
        {"mark": {"type": "point", "filled": True, "size": 34, "opacity": 1},
         "encoding": {"x": x, "y": y, "color": colour, "tooltip": tip}},
    ]  # fmt: skip
    if any(row["lam"] == 1 for row in content["points"]):
        mark = {"type": "rule", "strokeDash": [1, 3], "color": "#888"}
        layers.insert(0, {"data": {"values": [{"lam": 1}]}, "mark": mark, "encoding": {"x": x}})
    spec = {
        "title": {"text": f"{metric} along lambda", "subtitle": _head(content)},
        "width": 560, "height": 280, "data": {"values": values}, "layer": layers,
    }  # fmt: skip
    note = (
        "Bars are 95 % intervals of each score. The dashed line is the target's own score, the"
        " dotted one lambda 1."
    )
    if content["less_is_better"]:
        note += f" Less {metric} is better."
    if content["failed"]:
        note += f" Without {len(content['failed'])} that failed."
    return Figure("curve", spec, note)


def _head(content: Content) -> list[str]:
    sides = {"target": content["target"]["ref"], "vector": content["name"]}
    return [f"{side}: {shorten(ref, 80)}" for side, ref in sides.items()]


def _place(row: Line, content: Content) -> Iterator[Line]:
    """Yield a point for each curve that it is on: the target begins them all."""
    if (score := row["scores"].get(content["metric"])) is None:
        return
    mean, reach = score["mean"], BARS * (score["standard_error"] or 0.0)
    for kind in (SKILL, *content["control"]) if row["curve"] == TARGET else (row["curve"],):
        yield {
            "curve": LEGEND[kind], "lam": row["lam"], "score": mean, "low": mean - reach,
            "high": mean + reach, "lambda": typeset(f"{row['lam']:g}"),
            "said": typeset(write_score(mean)) + (f" ± {reach:.2g}" if reach else ""),
        }  # fmt: skip


def _list_points(content: Content) -> Table:
    """Return every point with its score, its difference and what arrived of the vector."""
    heads = [("point", ""), (content["metric"], "score"), ("±", "score"),
             ("less target", "difference"), ("interval", "difference"), ("p", "difference"),
             ("gain", "gain"), ("cosine", "gain"), ("values changed", ""), ("seconds", "seconds"),
             ("to attach", "seconds")]  # fmt: skip
    rows = []
    for row in content["points"]:
        score = row["scores"].get(content["metric"])
        cells = [f"{row['status']}: {row['message']}"[:200], "–"]
        if score:
            cells = [typeset(write_score(score["mean"])), write_score(score["standard_error"])]
        low, high = row.get("low"), row.get("high")
        cells += [
            write_optional(row.get("difference"), "+.3g"),
            "-" if low is None or high is None else f"{low:+.3g} to {high:+.3g}",
            write_p_of(row),
            *(write_optional(row[key], ".3f") for key in ("gain", "cosine")),
            write_optional(row["changed"], ","),
            *(write_optional(row[key], ".2f") for key in ("seconds", "attach_seconds")),
        ]
        name = typeset(name_point(row["curve"], row["lam"]))
        rows.append([name, cells[0], *map(typeset, cells[1:])])
    return Table("Points", "", [head(TERMS, *words) for words in heads], rows)


def _list_others(content: Content) -> Iterator[Table]:
    """Yield the table of all metrics, where there are more than the one."""
    grid = tabulate_metrics(content)
    if len(grid.heads) > 2:
        rows = [[*map(typeset, row)] for row in grid.rows]
        yield Table("All metrics", "", [head((), title) for title in grid.heads], rows)


def _list_asked(content: Content) -> list[tuple[str, str]]:
    asked = {
        "target": f"{content['target']['path']}, {human_bytes(content['target_nbytes'])}",
        "vector": content["name"], "verdict": content["verdict"], "evaluation": content["eval"],
        "control": ", ".join(content["control"]) or "none", "seed": str(content["seed"]),
        "rounding": content["rounding"], "dtype": content["dtype"],
    }  # fmt: skip
    return list(asked.items())
