"""A program of the user's that evaluates a folder with merged weights.

`{model}` in its words becomes the folder, `{split}` the split, `{output}` a file that it may write
its scores to; without that they are the last line of what it prints. Hides processes: the program
has a group of its own, which ends with it, and with whatever ends the wait for it. What a program
starts in a session of its own (setsid, daemons) is outside that group and goes on.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from skillvec.errors import SkillvecError, UsageError
from skillvec.trials.scores import HALVES, ScoreError, Scores, read_scores, refuse_split

TAIL_NBYTES = 2**16  # of what a program says, no more is looked at, but for a file of scores
SHOWN_LINES = 8
GRACE_SECONDS = 5.0  # between asking a program to end and ending it
SHELL_WORDS = {"|", "||", "&", "&&", ";", "<", ">", ">>", "(", ")", "2>", "&>", "<<"}


class CommandError(SkillvecError):
    """A program ended with an exit code of its own."""


class CommandEvaluator:
    """`command: TEXT`. A shell runs it only where it holds pipes, lists, redirections or variables.

    Raises UsageError for a text without `{model}`, one that cannot be split into words, and a
    program that is not there.
    """

    takes_folder = True
    metrics = None

    def __init__(self, text: str) -> None:
        self.spec = f"command: {text}"
        self._text = text
        if "{model}" not in text:
            raise UsageError(f"--eval '{self.spec}': expected {{model}}, where the folder goes")
        try:
            self._words = shlex.split(text)
            pieces = [*shlex.shlex(text, posix=True, punctuation_chars=True)]
        except ValueError as error:
            raise UsageError(f"--eval '{self.spec}': {error}") from None
        self._needs_shell = (
            bool({*pieces} & SHELL_WORDS)
            or any(c in text for c in "$`*~\n")
            or "=" in self._words[0]  # NAME=VALUE before a program
        )
        if not self._needs_shell and shutil.which(self._words[0]) is None:
            raise UsageError(f"--eval '{self.spec}': no program {self._words[0]} here")
        self.splits = HALVES if "{split}" in text else ()

    def check(self, target: str) -> None:
        """Accept every target: what a program needs, it knows alone."""

    def evaluate(self, model: Any, tokenizer: Any, split: str) -> Scores:
        """Run the program on a folder and read its scores.

        Raises CommandError with the last lines of what it said for an exit code but 0, ScoreError
        where it left no scores.
        """
        refuse_split(split, self.splits, self.spec)
        with tempfile.TemporaryDirectory(prefix="skillvec-scores-") as place:
            output = Path(place, "scores.json")
            fills = {"{model}": os.fspath(model), "{split}": split, "{output}": os.fspath(output)}
            code = _run_group(self._filled(fills), Path(place))
            if code:
                said = _tail(Path(place, "stderr")) or _tail(Path(place, "stdout"))
                shown = "\n".join(f"  {line:.300}" for line in said[-SHOWN_LINES:])
                ended = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
                raise CommandError(f"{self._words[0]}: {ended}" + (f"\n{shown}" if shown else ""))
            if "{output}" in self._text:
                text = output.read_text(encoding="utf-8") if output.is_file() else ""
                where = "the file {output}"
            else:
                lines = [line for line in _tail(Path(place, "stdout")) if line.strip()]
                text, where = (lines[-1] if lines else ""), "the last line that it printed"
        try:
            said = json.loads(text)
        except ValueError:
            raise ScoreError(f"expected scores as JSON in {where}, found {text!r:.200}") from None
        return read_scores(said)

    def _filled(self, fills: dict[str, str]) -> list[str]:
        """Return the words to run, with what stands in place of the names in braces."""
        texts = [self._text] if self._needs_shell else self._words
        for name, value in fills.items():
            value = shlex.quote(value) if self._needs_shell else value
            texts = [text.replace(name, value) for text in texts]
        return ["/bin/sh", "-c", *texts] if self._needs_shell else texts


def _run_group(words: list[str], place: Path) -> int:
    """Run a program in a group of its own and return its exit code; nothing of it stays behind."""
    with open(place / "stdout", "wb") as out, open(place / "stderr", "wb") as err:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # see _has_ended
            else:
                process.wait()
        finally:
            _end_group(process)
    return process.returncode


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Return whether a process has ended; it is not reaped, so its group's number stays its own.

    Without waitid (macOS before Python 3.13) it is reaped.
    """
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
    return os.waitid(os.P_PID, process.pid, ended) is not None


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ask all of a process's group to end, wait for its first, then end what is left."""
    # macOS denies signals to a group of which nothing runs any more
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        patience = time.monotonic() + GRACE_SECONDS
        while not _has_ended(process) and time.monotonic() < patience:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(file: Path) -> list[str]:
    """Return the last lines of a file."""
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - TAIL_NBYTES))
        return opened.read().decode(errors="replace").splitlines()
