"""What a person sees: plans, reports and progress. Data goes to stdout, talk to stderr.

Only this module imports rich, and only to draw a table or a bar: a quiet run starts faster.
"""

import json
import re
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from skillvec.errors import printable
from skillvec.report import Report

if TYPE_CHECKING:
    from skillvec.analysis.wording import Grid


FORMAT_VERSION = 1  # of what --json prints: docs/json.md says when it rises
HEAD_WIDTH = 7  # of a table's column, where its numbers are no wider


def _print(text: str, to_stderr: bool = False) -> None:
    text = printable(text)
    if to_stderr:
        print(folded(text), file=sys.stderr)
    else:
        print(text)


def print_json(verb: str | None, said: dict[str, Any]) -> None:
    """Print what a verb says as one JSON document, behind its name and the version of its form."""
    head = {"verb": verb, "format_version": FORMAT_VERSION}
    _print(json.dumps(head | said, indent=2))


def folded(text: str) -> str:
    """Return talk for a terminal, lines broken between words below where they begin."""
    if not sys.stderr.isatty():
        return text
    import shutil

    width, lines = shutil.get_terminal_size().columns, []
    for line in text.split("\n"):
        begin = re.match(r" *(?:\w+(?:  +|: ))?", line)
        indent = " " * (begin.end() if begin else 0)
        lines.append(textwrap.fill(line, max(width, 40), subsequent_indent=indent,
                                   break_on_hyphens=False, break_long_words=False))  # fmt: skip
    return "\n".join(lines)


class Screen:
    """The one sink of the command line: human, json or quiet.

    Implements `Watcher`: prints the plan to stderr and, on a terminal, a progress bar.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False
    ) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose
        self._bar: Any = None
        self._task: Any = None

    # ------------------------------------------------------------------------------- talking

    def say(self, text: str) -> None:
        """Print a line of talk to stderr, unless quiet."""
        if not self.quiet:
            _print(text, to_stderr=True)

    def planned(self, report: Report) -> None:
        """Show the plan before the work."""
        if self.quiet:
            return
        from skillvec.verbs.sentences import say_plan

        for line in say_plan(report, self.verbose):
            self.say(line)

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        """Move the bar; only on a terminal, only for work one would notice."""
        if self.quiet or self.as_json or not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total_nbytes)
        self._bar.update(self._task, completed=done_nbytes, total=total_nbytes)

    def tried(self, line: str) -> None:
        """Print what came out of a trial, below the plan."""
        self.say(f"  {line}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # ------------------------------------------------------------------------------- answers

    def show(self, report: Report, last_line: str | None = None) -> None:
        """Print the answer: JSON, or the last line alone if quiet, or tables."""
        self.close()
        for warning in report.warnings:
            if not self.as_json:
                _print(f"warning: {warning}", to_stderr=True)
        if self.as_json:
            print_json(report.verb, report.to_dict() | report.now)
        elif self.quiet:
            if last_line is not None:
                _print(last_line)
        else:
            self._show_human(report)

    def _show_human(self, report: Report) -> None:
        from skillvec.verbs.sentences import say_answer

        for said in say_answer(report, self.verbose):
            if isinstance(said, str):
                _print(said)
            else:
                _draw(said)


def _draw(grid: "Grid") -> None:
    """Print a table no wider than the terminal: names too long lose their beginning."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    rows = [[printable(cell) for cell in row] for row in grid.rows]
    heads = []
    for i, title in enumerate(grid.heads):
        width = max([HEAD_WIDTH, *(len(row[i]) for row in rows)])
        heads.append("\n".join(textwrap.wrap(title, width, break_long_words=False)))
    lines = [[len(line) for line in head.split("\n")] for head in heads]
    widths = [max([*lines[i], *(len(row[i]) for row in rows)]) for i in range(len(heads))]
    room = max(12, console.width - sum(widths[1:]) - 3 * len(widths))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(heads[0], no_wrap=True)
    for title, head, width in zip(grid.heads[1:], heads[1:], widths[1:], strict=True):
        side: Any = "left" if title == grid.bars else "right"
        table.add_column(head, justify=side, vertical="bottom", no_wrap=True, min_width=width)
    for name, *cells in rows:
        table.add_row(name if len(name) <= room else f"\u2026{name[1 - room :]}", *cells)
    console.print(table)
