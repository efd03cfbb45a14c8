"""The page of a search and its figure: how the best so far grew, or one objective by the other."""

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from skillvec.analysis import plain_page
from skillvec.analysis.figures import Figure, Spec, typeset
from skillvec.analysis.page import Entry, draw
from skillvec.analysis.plain_page import Page, Table
from skillvec.analysis.search_sentences import (
    NAMES,
    list_answers,
    list_choices,
    list_differences,
    tabulate,
)
from skillvec.analysis.wording import Grid
from skillvec.errors import printable

Content = Mapping[str, Any]
READING = (
    ("Items to search by, items to report", "The sampler was told scores of one half of the items"
     " only. The best of many trials is partly luck on these, so its score there is too good. The"
     " other half was asked once, after the search, of the points in the table."),
    ("Better, worse, within noise", "The 95 % interval of the difference lies above 0, below 0 or"
     " holds 0: by item, or by group of items, where the evaluator says their values."),
    ("Random search", "Points drawn evenly from the same space, as many as the sampler had. What"
     " both reach, trying often reaches; what the sampler has beyond it, the sampler found."),
)  # fmt: skip


def html(content: Content) -> str:
    """Return the page; UsageError where the extra report is missing."""
    return plain_page.html(
        Page(
            title=f"A search for {content['metric']}",
            answer=list_answers(content),
            warnings=content["warnings"],
            figures=[history(content)],
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
            reading=READING,
        ),
        {key: value for key, value in content.items() if key != "tensors"},
    )


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
        x = {"field": "number", "type": "quantitative", "title": "trial"}
        marks = [
            {"mark": dots, "encoding": {"x": x, "y": y, "color": colour}},
            {"mark": {"type": "line", "interpolate": "step-after"},
             "encoding": {"x": x, "y": score | {"field": "best", "title": metric},
                          "color": colour}},
        ]  # fmt: skip
        note = "Lines are the best so far."
        title = f"{metric} along the search"
    lines = [{"score": content["searched"][name][content["metric"]], "name": NAMES[name]}
             for name in ("target", "lambda 1")]  # fmt: skip
    y_line: Spec = score | {"field": "score", "title": metric}
    words = {"field": "name", "type": "nominal"}
    marks += [
        {"data": {"values": lines}, "mark": {"type": "rule", "strokeDash": [4, 3], "color": "#888"},
         "encoding": {"y": y_line}},
        {"data": {"values": lines}, "mark": {"type": "text", "align": "right", "dy": -6, "x": 555,
                                             "color": "#888"},
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
    return Table(title, note, grid.heads, [""] * len(grid.heads), rows, words)


def _list_asked(content: Content) -> list[Entry]:
    asked = {
        "target": content["target"], "vectors": ", ".join(content["vectors"]),
        "evaluation": content["eval"], "report evaluation": content["report_eval"] or "the same",
        "operator": content["space"]["op"], "sampler": content["sampler"],
        "trials": f"{content['trials']['complete']} complete, {content['trials']['failed']} failed",
        "seed": str(content["seed"]), "study": content["study"],
    }  # fmt: skip
    return [(title, "", value) for title, value in asked.items()]
