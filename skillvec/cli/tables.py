"""How a table of words fits a terminal: names cut, empty columns away, what is left in parts.

Without a terminal nothing is cut, so that a file or a program gets whole names.
"""

import textwrap
from typing import TYPE_CHECKING

from skillvec.cli.labels import measure, shorten
from skillvec.errors import printable

if TYPE_CHECKING:
    from skillvec.analysis.wording import Grid

HEAD_WIDTH = 7  # of a column, where its cells are no wider
GAP = 2  # characters between columns
LEAST_ROOM = 12  # for names beside all columns; with less, the columns come in parts
ROOM = 26  # for names beside a part of the columns
EMPTY = {"", "-"}


def draw(grid: "Grid", width: int | None) -> str:
    """Return a table in lines of at most `width` characters; None for as wide as it is.

    Columns without a value are left out. Where the others do not stand beside names that can be
    told apart, they come in parts, one below the other, each with all names.
    """
    rows = [[printable(cell) for cell in row] for row in grid.rows]
    columns = [_Column(title, cells, title == grid.bars)
               for title, *cells in zip(grid.heads, *rows, strict=True)]  # fmt: skip
    names, *others = columns
    others = [column for column in others if not rows or not EMPTY.issuperset(column.cells)]
    longest = max([0, *map(measure, names.cells)])
    parts = [others]
    if width is not None:
        room = width - _measure(others)
        labels = shorten(names.cells, room) if room >= min(LEAST_ROOM, longest) else names.cells
        if max(map(measure, labels), default=0) > room:
            parts = _part(others, width - max(map(measure, shorten(names.cells, ROOM)), default=0))
    drawn = []
    for part in parts:
        labels = names.cells if width is None else shorten(names.cells, width - _measure(part))
        drawn.append(_draw([_Column(names.title, labels, True), *part]))
    return "\n\n".join(drawn)


class _Column:
    """A title, broken between words where it is wider than its cells, and what stands below it."""

    def __init__(self, title: str, cells: list[str], is_left: bool) -> None:
        self.title, self.cells, self.is_left = title, cells, is_left
        width = max([HEAD_WIDTH, *map(measure, cells)])
        self.head = "\n".join(textwrap.wrap(title, width, break_long_words=False))
        self.width = max(map(measure, [*self.head.split("\n"), *cells]))

    def set(self, text: str) -> str:
        """Return a text as wide as the column."""
        blanks = " " * (self.width - measure(text))
        return text + blanks if self.is_left else blanks + text


def _measure(columns: list[_Column]) -> int:
    """Return how wide columns are behind another."""
    return sum(GAP + column.width for column in columns)


def _part(columns: list[_Column], room: int) -> list[list[_Column]]:
    """Return the columns in parts that fit the room, each of one column at least."""
    parts: list[list[_Column]] = [[]]
    for column in columns:
        if parts[-1] and _measure([*parts[-1], column]) > room:
            parts.append([])
        parts[-1].append(column)
    return parts


def _draw(columns: list[_Column]) -> str:
    """Return a table as it is, without blanks at the ends of its lines.

    rich would draw the same, in seconds where a model has thousands of experts.
    """
    heads = [column.head.split("\n") for column in columns]
    height = max(map(len, heads))
    rows = [*zip(*([""] * (height - len(head)) + head for head in heads), strict=True)]
    above = len(rows)
    rows += zip(*(column.cells for column in columns), strict=True)
    blank = " " * GAP
    lines = [blank.join(column.set(cell) for column, cell in zip(columns, row, strict=True))
             for row in rows]  # fmt: skip
    lines.insert(above, "\u2500" * (_measure(columns) - GAP))
    return "\n".join(line.rstrip() for line in lines)
