"""Commands in pages: found, run on small models, compared with the output that the page shows.

`python tests/support/console.py` writes into the pages what their commands print now.

A page holds commands in blocks of two languages:

- `console`: a command behind "$ " and below it what it prints on standard output, line for line.
  An output that is cut ends with a line "[... N more lines]".
- `shell`: commands without their output.

Both may be continued with a backslash. `skillvec` and `python -m skillvec.recipes...` are run, in
this process; of `pip install` and `make` it is checked that there is what they ask for. Every other
command is refused, so that a page cannot hold one that nothing tries.
"""

import contextlib
import importlib
import io
import re
import shlex
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from hubserver import HubServer

from skillvec.cli.commands import main

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "start.md", ROOT / "docs" / "verbs.md"]
FOLDER = "~/try"  # what pages call the folder in which their commands run
CUT = re.compile(r"\[\.\.\. (\d+) more lines\]")


class Command(NamedTuple):
    """A command of a page, and the lines that the page shows below it (None: it shows none)."""

    text: str
    shown: list[str] | None


def fences(text: str, language: str) -> list[str]:
    """Return what stands in the blocks of a language, in their order."""
    return [block for found, block in _blocks(text) if found == language]


def _blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[Command]:
    """Return the commands of a page, in their order."""
    found = []
    for language, block in _blocks(text):
        if language == "console":
            found += _of_console(block)
        elif language == "shell":
            found += [Command(line, None) for line in block.replace("\\\n", " ").splitlines()]
    return found


def _of_console(block: str) -> Iterator[Command]:
    assert block.startswith("$ "), f"a block of console begins with a command: {block[:60]!r}"
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.replace("\\\n", " ").partition("\n")
        yield Command(command, output.splitlines())


def run(command: str) -> list[str]:
    """Run a command in the current folder; returns the lines of its standard output."""
    words = shlex.split(command, comments=True)
    if words[0] == "skillvec":
        result = CliRunner().invoke(main, words[1:], env={"COLUMNS": "80"})
        assert result.exit_code == 0, (command, result.output, result.exception)
        said = result.stdout.replace(str(Path.cwd()), FOLDER)
        return [line.rstrip() for line in said.splitlines()]
    if words[:2] == ["python", "-m"] and words[2].startswith("skillvec.recipes."):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert importlib.import_module(words[2]).main(words[3:]) == 0, command
        return printed.getvalue().splitlines()
    if words[:2] == ["pip", "install"]:
        _find_extras(words[2:])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in words[1:]:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), command
    else:
        raise AssertionError(f"nothing tries this command: {command}")
    return []


def _find_extras(requirements: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in requirements:
        name, _, extras = requirement.rstrip("]").partition("[")
        assert name == project["name"], requirement
        for extra in filter(None, extras.split(",")):
            assert extra in project["optional-dependencies"], requirement


def cut_like(printed: list[str], shown: list[str]) -> list[str]:
    """Return the output as the page has to show it: cut after as many lines, if it is cut there."""
    if not (shown and CUT.fullmatch(shown[-1])):
        return printed
    first = len(shown) - 1
    return [*printed[:first], f"[... {len(printed) - first} more lines]"]


def with_outputs(text: str) -> str:
    """Return a page with what its commands print now, run in the current folder."""
    outputs = []
    for command in commands(text):
        printed = run(command.text)
        if command.shown is not None:
            outputs.append(cut_like(printed, command.shown))
    waiting = iter(outputs)

    def rewritten(block: re.Match[str]) -> str:
        lines = re.findall(r"^\$ (?:.*\\\n)*.*\n", block[1], re.MULTILINE)
        return "```console\n" + "".join(
            line + "".join(f"{out}\n" for out in next(waiting)) for line in lines
        )

    return re.sub(r"^```console\n(.*?)(?=^```$)", rewritten, text, flags=re.MULTILINE | re.DOTALL)


def run_page(page: Path) -> str:
    """Return a page with what its commands print in an empty folder, beside a Hub on loopback.

    The folder has a short name, so that no line is broken because of it, and is printed as FOLDER.
    """
    with (
        tempfile.TemporaryDirectory() as name,
        pytest.MonkeyPatch.context() as patch,
        HubServer() as server,
    ):
        server.adopt(patch, Path(name, "hub"))
        (work := Path(name, "w")).mkdir()
        patch.chdir(work)
        written = with_outputs(page.read_text())
        return written.replace(server.endpoint, "https://huggingface.co")


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(run_page(page))
