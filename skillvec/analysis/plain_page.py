"""A page of an answer, a figure, few numbers and tables: what reports of trials look like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from skillvec.analysis.charts import WIDTHS
from skillvec.analysis.figures import Figure
from skillvec.analysis.page import Entry, draw_chart, render


class Table(NamedTuple):
    """A table with its caption and a note; heads are terms, those without a meaning are words.

    The first `words` columns are text, set to the left.
    """

    caption: str
    note: str
    heads: Sequence[Entry]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True)
class Page:
    """What a page shows, from top to bottom: first of all the answer, in a sentence.

    `answer` is what else is said of it; `terms` are (anchor, name, meaning).
    """

    title: str
    lead: str
    legend: Sequence[tuple[str, str]]
    figure: Figure
    answer: Sequence[str]
    numbers: Sequence[Entry]
    warnings: Sequence[str]
    tables: Sequence[Table]
    asked: Sequence[tuple[str, str]]
    terms: Sequence[tuple[str, str, str]]


def html(page: Page, report: Mapping[str, Any]) -> str:
    """Return a page that holds its report as JSON; as of skillvec.analysis.page."""
    return render("plain_page.html.jinja", report, title=page.title, page=page,
                  charts=[draw_chart(page.figure, WIDTHS)])  # fmt: skip


def head(terms: Sequence[tuple[str, str, str]], title: str, anchor: str = "") -> Entry:
    """Return the head of a column, or the name of a number, that one of the terms explains."""
    meaning = next((meaning for name, _, meaning in terms if name == anchor), "")
    return Entry(anchor, title, meaning, "")
