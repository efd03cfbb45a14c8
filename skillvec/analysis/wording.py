"""How sizes, counts and names are put into words, and tables of words: plain text, no terminal."""

import re
import textwrap
from collections.abc import Sequence
from contextvars import ContextVar
from typing import NamedTuple

TOGETHER = re.compile(  # blanks that end no line
    r"(?<=\d) (?=(?:[kMGT]?B|[KMBT%])(?!\w))"  # a number and its unit
    r"|(?<=^error:) |(?<=^warning:) "  # and what is said
    r"| (?== )|(?<= =) "
    r"|(?<=\bpip) (?=install )|(?<=\bpip install) "  # a command to copy
)
LINE_WIDTH = ContextVar("LINE_WIDTH", default=80)  # of the terminal that sentences are for


class Grid(NamedTuple):
    """A table of words: the columns are set to the right, but for the first and the one `bars`.

    A terminal breaks long heads between words, cuts the middle out of names that are too long, and
    leaves out columns that are empty.
    """

    heads: list[str]
    rows: list[list[str]]
    bars: str = ""


class Document(str):
    """A text that is shown as it is: no line of it is folded."""


def human_bytes(nbytes: float) -> str:
    """Return a byte count in decimal units: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def human_count(count: float) -> str:
    """Return a number of values: 1.24 B."""
    for unit in ("", " K", " M", " B"):
        if count < 1000:
            return f"{count:.3g}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.3g} T"


def say_duration(seconds: float) -> str:
    """Return a time in a unit that suits it: 12 min."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def write_optional(value: float | None, form: str = ".4f") -> str:
    """Return a number, "-" for none."""
    return "-" if value is None else format(value, form)


def count_files(files: Sequence[str], kind: str = "") -> str:
    """Return how many files there are."""
    return f"{len(files)} {kind}file{'' if len(files) == 1 else 's'}"


def name_some(names: list[str]) -> str:
    """Return up to three names of tensors, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def wrap(text: str) -> str:
    """Return text in lines of the terminal's width, those after the first indented."""
    return fill(text, LINE_WIDTH.get(), "  ")


def fill(text: str, width: int, indent: str) -> str:
    """Return text in lines of at most `width`; words and what TOGETHER says stay whole."""
    whole = TOGETHER.sub("\xa0", text)
    lines = textwrap.fill(whole, width, subsequent_indent=indent, break_on_hyphens=False,
                          break_long_words=False)  # fmt: skip
    return lines.replace("\xa0", " ")
