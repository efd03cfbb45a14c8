"""The group of commands: its help in sections, near misses, errors as messages and exit codes."""

import errno
import sys
from typing import Any

import click

from skillvec import __version__
from skillvec.cli.examples import EXAMPLES
from skillvec.cli.near import COMMANDS_ALSO, OPTIONS_ALSO, ask_if, find_near
from skillvec.cli.options import SECTIONS
from skillvec.cli.screen import find_width, fold, print_json, tell
from skillvec.errors import SkillvecError, printable

OF_PROGRAM = ("help", "completion")  # the commands that are no verbs
# where a command stands in the help of the program
GROUPS = {
    "Make a vector": ("diff", "combine", "import-patch"),
    "Use it": ("apply", "extract-lora", "export-patch"),
    "Look at it": ("inspect", "verify", "norms", "orthogonality"),
    "Find out whether it helps": ("sweep", "search"),
    "Share it": ("push", "pull"),
    "This program": OF_PROGRAM,
}

WIDEST = 26  # characters of an option that stands in one line with what is said of it


class Verb(click.Command):
    """A command whose help has its own options first, then those of many, then examples."""

    def __init__(self, name: str, **given: Any) -> None:
        examples = EXAMPLES.get(name, [])
        title = "Example:" if len(examples) == 1 else "Examples:"
        lines = "\n".join(f"  {line}" for line in examples)
        super().__init__(name, epilog=f"\b\n{title}\n{lines}", **given)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections, all in the same two columns."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Options", *SECTIONS)}
        of = {option: name for name, options in SECTIONS.items() for option in options}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record and isinstance(option, click.Option):
                long = max(option.opts, key=len).removeprefix("--")
                sections[of.get(long, "Options")].append(record)
        spelled = [spelling for records in sections.values() for spelling, _ in records]
        width = max(len(spelling) for spelling in spelled if len(spelling) <= WIDEST)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    rows = [(f"{spelling:{width}}", said) for spelling, said in records]
                    formatter.write_dl(rows, col_max=width)


class Verbs(click.Group):
    """The commands; turns errors into a message and an exit code; with --json also into JSON."""

    command_class = Verb

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        as_json = "--json" in ctx.args  # of a command that is not parsed yet

        def end(kind: str, message: str, said: str, code: int) -> None:
            tell(said)
            if as_json:
                _print_error(ctx, kind, message, code)
            ctx.exit(code)

        try:
            return super().invoke(ctx)
        except SkillvecError as error:
            end(type(error).__name__, str(error), f"error: {error}", error.exit_code)
        except KeyboardInterrupt as stop:
            told = str(stop) or "nothing was published"
            end("Interrupted", told, f"interrupted; {told}", 1)
        except click.UsageError as error:
            told = error.format_message()
            if isinstance(error, click.NoSuchOption):
                told = self._explain(error)
            if as_json:
                _print_error(ctx, "UsageError", told, error.exit_code)
            raise click.UsageError(
                fold(printable(told), find_width(sys.stderr)), error.ctx
            ) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader went away; click ends quietly
                raise
            where = f"{error.filename}: " if error.filename else ""  # none of the standard output
            told = f"{where}{error.strerror or error}"
            end("OSError", told, f"error: {told}", 1)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the words name; UsageError with near ones where none is."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            self.refuse(ctx, args[0])
        return super().resolve_command(ctx, args)

    def refuse(self, ctx: click.Context, word: str) -> None:
        """Raise UsageError for a word that is no command, with those that may be meant."""
        near = find_near(word, [*self.commands, "--version"], COMMANDS_ALSO)
        said = f"There is no command {word!r}.{ask_if(near)}"
        lines = [f"  {name:14} {self.commands[name].get_short_help_str(80)}"
                 for name in near if name in self.commands]  # fmt: skip
        raise click.UsageError(
            "\n".join([said, *lines, "'skillvec help' lists all commands."]), ctx
        )

    def _explain(self, error: click.NoSuchOption) -> str:
        """Return what to say of an option that a command does not have."""
        word, command = error.option_name, error.ctx.command if error.ctx else self
        having = [name for name, other in self.commands.items() if word in _spell(other)]
        said = f"{command.name} has no option {word}."
        if having:
            said += f" {word} is an option of {', '.join(having)}."
        else:
            said += ask_if(find_near(word, _spell(command), OPTIONS_ALSO))
        return said

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by what they are for."""
        groups = {title: [name for name in names if name in self.commands]
                  for title, names in GROUPS.items()}  # fmt: skip
        width = max(map(len, self.commands))
        for title, names in groups.items():
            with formatter.section(title):
                formatter.write_dl([
                    (f"{name:{width}}", self.commands[name].get_short_help_str(80))
                    for name in names
                ])  # fmt: skip


def _print_error(ctx: click.Context, kind: str, message: str, code: int) -> None:
    """Print what stands in place of a report."""
    said = {"type": kind, "exit_code": code, "message": message}
    print_json(ctx.invoked_subcommand, {"error": said})


def _spell(command: click.Command) -> list[str]:
    """Return the long options of a command."""
    return [text for option in command.params for text in option.opts if text.startswith("--")]


def show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the version, and with -v what it runs on, and end."""
    if not wanted:
        return
    lines = [f"skillvec, version {__version__}"]
    if ctx.params["verbose"]:
        from skillvec.cli.versions import say_versions

        try:
            lines += say_versions()
        except SkillvecError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
    click.echo("\n".join(lines))
    ctx.exit()
