"""The page of a search and its figure: how the best so far grew, or one objective by the other."""

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from skillvec.analysis import plain_page
from skillvec.analysis.figures import Figure, Spec
from skillvec.analysis.page import Entry, draw
from skillvec.analysis.plain_page import Page, Table, head
from skillvec.analysis.search_sentences import (
    NAMES,
    list_answers,
    list_choices,
    list_differences,
    tabulate,
    write_ends,
)
from skillvec.analysis.statistics_table import typeset
from skillvec.analysis.sweep_sentences import write_score
from skillvec.analysis.wording import Grid, write_optional
from skillvec.errors import printable

Content = Mapping[str, Any]
TERMS = (
    ("items", "Items to search by, items to report", "The sampler was told scores of one half of"
     " the items only. The best of many trials is partly luck on these, so its score there is too"
     " good. The other half was asked once, after the search, of the points in the table. ± is the"
     " standard error."),
    ("verdict", "Better, worse, within noise", "The 95 % interval of the difference lies above 0,"
     " below 0 or holds 0: by item, or by group of items, where the evaluator says their values. p"
     " is how often noise alone gives a difference as large."),
    ("random", "Random search", "Points drawn evenly from the same space, as many as the sampler"
     " had. What both reach, trying often reaches; what the sampler has beyond it, the sampler"
     " found."),
)  # fmt: skip
EXPLAINED = {"±": "items", "p": "verdict", "verdict": "verdict", "better by": "verdict",
             "95 % interval": "verdict"}  # heads of the tables  # fmt: skip


def html(content: Content) -> str:
    """Return the page; UsageError where the extra report is missing."""
    first, *others = list_answers(content)
    lead, _, scores = first.partition(". Its ")
    return plain_page.html(
        Page(
            title=f"A search for {content['metric']}",
            lead=lead if lead.endswith(".") else f"{lead}.",
            legend=[("target", content["target"]),
                    *(("vector", ref) for ref in content["vectors"])],
            figure=history(content),
            answer=[f"Its {scores}"] * bool(scores) + others,
            numbers=_list_numbers(content),
            warnings=content["warnings"],
            tables=[
                _table(
                    "Points",
                    "Scores of the items to report; beside them, those of the items to search by.",
                    tabulate(content),
                ),
                _table(
                    "Differences",
                    "Of the items to report; more is better.",
                    list_differences(content),
                    3,
                ),
                _table("Choices", "", list_choices(content), 2),
            ],
            asked=_list_asked(content),
            terms=TERMS,
        ),
        {key: value for key, value in content.items() if key != "tensors"},
    )  # fmt: skip


def _list_numbers(content: Content) -> list[Entry]:
    """Return the scores on the items to report, and how far the winner is above lambda = 1."""
    metric, made = content["metric"], []
    for point, scores in content["reported"].items():
        score = scores[metric]
        error = score["standard_error"]
        made.append(head(TERMS, NAMES[point], "random" if point == "random" else "items")._replace(
            value=typeset(write_score(score["mean"])),
            beside="" if error is None else f"± {error:.2g}",
        ))  # fmt: skip
    for row in content["comparisons"]:
        if (row["one"], row["other"], row["metric"]) == ("winner", "lambda 1", metric):
            made.append(head(TERMS, "better than lambda = 1 by", "verdict")._replace(
                value=typeset(write_optional(row["difference"], "+.3g")),
                beside=typeset(write_ends(row)),
            ))  # fmt: skip
    return made


def figures(content: Content) -> Iterator[tuple[str, bytes]]:
    """Yield file name and bytes of the figure, as SVG and as PNG."""
    return draw([history(content)])


def history(content: Content) -> Figure:
    """Return the trials in their order with the best so far; of two objectives, one by the other.

    Scores are those of the search items.
    """
    metric = printable(content["metric"])
    colour = {"field": "by", "type": "nominal", "title": None}
    score: Spec = {"type": "quantitative", "scale": {"zero": False}}
    y = score | {"field": "score", "title": metric}
    dots = {"type": "point", "filled": True, "size": 26, "opacity": 0.5}
    if content["second"] is not None:
        second = printable(content["second"])
        x = score | {"field": "second", "title": second}
        marks: list[Spec] = [{"mark": dots, "encoding": {"x": x, "y": y, "color": colour}}]
        marks.append({
            "transform": [{"filter": "datum.front"}],
            "mark": {"type": "line", "interpolate": "step-after", "color": "#888"},
            "encoding": {"x": x, "y": y, "order": {"field": "score"}},
        })  # fmt: skip
        note = "The line joins the trials that no other beats in both."
        title = f"{metric} and {second}"
    else:
        x = {"field": "number", "type": "quantitative", "title": "trial",
             "axis": {"tickMinStep": 1}}  # fmt: skip
        marks = [
            {"mark": dots, "encoding": {"x": x, "y": y, "color": colour}},
            {"mark": {"type": "line", "interpolate": "step-after"},
             "encoding": {"x": x, "y": score | {"field": "best", "title": metric},
                          "color": colour}},
        ]  # fmt: skip
        note = "Lines are the best so far."
        if content["less_is_better"]:
            note += f" Less {metric} is better."
        title = f"{metric} along the search"
    lines = [{"score": content["searched"][name][content["metric"]], "name": NAMES[name]}
             for name in ("target", "lambda 1")]  # fmt: skip
    y_line: Spec = score | {"field": "score", "title": metric}
    words = {"field": "name", "type": "nominal"}
    marks += [
        {"data": {"values": lines}, "mark": {"type": "rule", "strokeDash": [4, 3], "color": "#888"},
         "encoding": {"y": y_line}},
        {"data": {"values": lines}, "mark": {"type": "text", "align": "right", "dy": -6,
                                             "x": {"expr": "width - 5"}, "color": "#888"},
         "encoding": {"y": y_line, "text": words}},
    ]  # fmt: skip
    said = wrap(content["answer"][0].partition(". Its ")[0], 95)
    spec = {
        "title": {"text": title, "subtitle": [printable(line) for line in said[:3]]},
        "width": 560, "height": 280, "data": {"values": content["history"]}, "layer": marks,
    }  # fmt: skip
    note += " Scores are those of the items to search by; dashed are the target's and lambda = 1's."
    return Figure("history", spec, note)


def _table(title: str, note: str, grid: Grid, words: int = 1) -> Table:
    rows = [[*row[:words], *map(typeset, row[words:])] for row in grid.rows]
    heads = [head(TERMS, title, EXPLAINED.get(title, "")) for title in grid.heads]
    return Table(title, note, heads, rows, words)


def _list_asked(content: Content) -> list[tuple[str, str]]:
    asked = {
        "target": content["target"], "vectors": ", ".join(content["vectors"]),
        "evaluation": content["eval"], "report evaluation": content["report_eval"] or "the same",
        "operator": content["space"]["op"], "sampler": content["sampler"],
        "trials": f"{content['trials']['complete']} complete, {content['trials']['failed']} failed",
        "seed": str(content["seed"]), "study": content["study"],
    }  # fmt: skip
    return list(asked.items())
