"""Completion of commands, options and paths by the shell: click's scripts, and where they belong.

A file that skillvec wrote begins with MARK and may be written anew; any other file of that name is
left alone. bash and zsh read the script by a block of lines at the end of the user's own file,
which is only ever added to; fish reads its folder by itself.
"""

import os
from pathlib import Path
from typing import NamedTuple

from skillvec.errors import OutputError, UsageError

SHELLS = ("bash", "zsh", "fish")
MARK = "# written by: skillvec completion --install"
BEGIN, END = "# >>> skillvec completion >>>", "# <<< skillvec completion <<<"


class Place(NamedTuple):
    """Where the script of a shell lies, and the user's own file that has to read it, if any."""

    script: Path
    reader: Path | None


def find_shell(name: str | None) -> str:
    """Return the shell of a name, or that of the user; UsageError for one that is not served."""
    found = name or Path(os.environ.get("SHELL", "")).name
    if found not in SHELLS:
        said = f"shell {found!r}" if found else "the shell is not known (SHELL is not set)"
        raise UsageError(f"{said}: name one, skillvec completion {'|'.join(SHELLS)}")
    return found


def make_script(shell: str) -> str:
    """Return the script that makes a shell complete `skillvec`."""
    from click.shell_completion import get_completion_class

    from skillvec.cli.commands import main

    of_shell = get_completion_class(shell)
    assert of_shell is not None
    return of_shell(main, {}, "skillvec", "_SKILLVEC_COMPLETE").source().strip() + "\n"


def find_place(shell: str) -> Place:
    """Return where the script of a shell belongs, by XDG_DATA_HOME, XDG_CONFIG_HOME and ZDOTDIR."""
    home = Path.home()
    if shell == "fish":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        return Place(config / "fish" / "completions" / "skillvec.fish", None)
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    own = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc" if shell == "zsh" else home / ".bashrc"
    return Place(data / "skillvec" / f"completion.{shell}", own)


def install(shell: str) -> list[str]:
    """Write the script of a shell and have it read; return what was done, a line for each file.

    Doing it again changes nothing. UsageError where another file has the script's name,
    OutputError where one cannot be written.
    """
    script, reader = find_place(shell)
    text = f"{MARK}\n{make_script(shell)}"
    try:
        before = _read(script) if script.exists() else None
        if before is not None and not before.startswith(MARK):
            raise UsageError(
                f"{script} exists, and skillvec did not write it: move it away, or put what"
                f" `skillvec completion {shell}` prints where it should be"
            )
        script.parent.mkdir(parents=True, exist_ok=True)
        if before != text:
            script.write_text(text)
        said = [f"{'was there already' if before == text else 'wrote'}: {script}"]
        if reader is not None:
            said.append(_add_block(reader, _make_block(shell, script)))
    except OSError as error:
        raise OutputError(f"{error.filename or script}: {error.strerror or error}") from None
    return [*said, f"completion works in every {shell} that is started from now on"]


def _read(file: Path) -> str:
    """Return the text of a user's file, which may be in any encoding."""
    return file.read_text(encoding="utf-8", errors="surrogateescape")


def _make_block(shell: str, script: Path) -> str:
    """Return the lines that have a script read at the start of a shell."""
    path = str(script).replace("'", "'\\''")
    lines = [f"[ -f '{path}' ] && . '{path}'"]
    if shell == "zsh":  # whose completion the user may not have turned on
        lines.insert(0, "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }")
    return "\n".join([BEGIN, *lines, END]) + "\n"


def _add_block(reader: Path, block: str) -> str:
    """Add a block of lines to the end of a user's file, unless it has one; return what was done."""
    before = _read(reader) if reader.exists() else ""
    if block in before:
        return f"reads it already: {reader}"
    if BEGIN in before:
        raise UsageError(
            f"{reader} has other lines after {BEGIN!r}: remove them up to {END!r}, then try again"
        )
    with reader.open("a") as file:
        file.write(("\n" if before and not before.endswith("\n") else "") + f"\n{block}")
    return f"added {len(block.splitlines())} lines to the end of: {reader}"
