"""A page of an answer, figures and tables: what reports of trials look like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from skillvec.analysis.figures import Figure
from skillvec.analysis.page import Entry, render


class Table(NamedTuple):
    """A table with its title and a note; `tips` are tooltips of its heads, "" for none.

    The first `words` columns are text, set to the left.
    """

    title: str
    note: str
    heads: Sequence[str]
    tips: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True)
class Page:
    """What a page shows, from top to bottom: first of all the answer, in sentences."""

    title: str
    answer: Sequence[str]
    warnings: Sequence[str]
    figures: Sequence[Figure]
    tables: Sequence[Table]
    asked: Sequence[Entry]
    reading: Sequence[tuple[str, str]] = ()


def html(page: Page, report: Mapping[str, Any]) -> str:
    """Return a page that holds its report as JSON; as of skillvec.analysis.page."""
    return render("plain_page.html.jinja", report, page.figures,
                  title=page.title, warnings=page.warnings, page=page)  # fmt: skip
