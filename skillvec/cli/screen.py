"""What a person sees: plans, reports and progress. Data goes to stdout, talk to stderr.

rich is imported only to draw a bar, or for letters wider than one place: a quiet run starts faster.
"""

import json
import os
import re
import shutil
import sys
from typing import Any, TextIO

from skillvec.cli.tables import draw
from skillvec.errors import printable
from skillvec.report import Report

LEAST_WIDTH = 40  # characters that lines have on the narrowest terminal
WIDEST_TEXT = 100  # of sentences, on a terminal of any width: longer lines are hard to read
FORMAT_VERSION = 1  # of what --json prints: docs/json.md says when it rises


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:  # closed by the caller: `>&-`
        return
    encoding = stream.encoding or "utf-8"  # which may lack what tables are drawn with
    print(printable(text).encode(encoding, "replace").decode(encoding), file=stream)


def print_json(verb: str | None, said: dict[str, Any]) -> None:
    """Print what a verb says as one JSON document, behind its name and the version of its form."""
    head = {"verb": verb, "format_version": FORMAT_VERSION}
    _write(json.dumps(head | said, indent=2), sys.stdout)


def tell(text: str) -> None:
    """Print talk to stderr, in lines of the terminal's width."""
    _write(fold(printable(text), find_width(sys.stderr)), sys.stderr)


def find_width(stream: TextIO | None) -> int | None:
    """Return the columns of the terminal behind a stream, or of COLUMNS; None where neither is."""
    if (stream is not None and stream.isatty()) or os.environ.get("COLUMNS", "").isdecimal():
        return max(shutil.get_terminal_size().columns, LEAST_WIDTH)
    return None


def fold(text: str, width: int | None) -> str:
    """Return text with lines of more than `width` broken between words below where they begin.

    A command line stays whole, so that it can be copied.
    """
    if width is None:
        return text
    from skillvec.analysis.wording import fill

    lines = []
    for line in text.split("\n"):
        if len(line) > width and not line.startswith("  skillvec "):
            begin = re.match(r" *(?:\w+(?:  +|: ))?", line)
            at = begin.end() if begin else 0
            room = width - max(map(len, line[at:].split()))  # beside a digest, which stays whole
            indent = " " * (min(at, room) if room >= 0 else at)
            line = fill(line, width, indent)
        lines.append(line)
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
            tell(text)

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
                tell(f"warning: {warning}")
        if self.as_json:
            print_json(report.verb, report.to_dict() | report.now)
        elif self.quiet:
            if last_line is not None:
                _write(last_line, sys.stdout)
        else:
            self._show_human(report)

    def _show_human(self, report: Report) -> None:
        from skillvec.analysis.wording import LINE_WIDTH, Document
        from skillvec.verbs.sentences import say_answer

        width = find_width(sys.stdout)
        before = LINE_WIDTH.set(LINE_WIDTH.get() if width is None else min(width, WIDEST_TEXT))
        try:
            answer = say_answer(report, self.verbose)
        finally:
            LINE_WIDTH.reset(before)  # other answers of this process may go elsewhere
        after_table = False
        for said in answer:
            if isinstance(said, Document):
                _write(said, sys.stdout)
            elif isinstance(said, str):
                _write(fold(said, width), sys.stdout)
            else:
                _write("\n" * after_table + draw(said, width), sys.stdout)
            after_table = not isinstance(said, str)
