"""The commands that are about this program itself: its help, and completion by the shell."""

import click

from skillvec.cli.commands import main
from skillvec.cli.completion import SHELLS, find_shell, install, make_script


def _complete_command(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    return [name for name in main.commands if name.startswith(begun)]


@main.command("help")
@click.argument("command", required=False, shell_complete=_complete_command)
@click.pass_context
def show_help(context: click.Context, command: str | None) -> None:
    """Show what a command takes, with examples.

    Without COMMAND this lists all commands.
    """
    parent = context.parent
    assert parent is not None
    if command is None:
        click.echo(parent.get_help())
    elif command not in main.commands:
        main.refuse(context, command)
    else:
        asked = main.commands[command]
        click.echo(asked.get_help(click.Context(asked, parent, command)))


@main.command()
@click.argument("shell", required=False, type=click.Choice(SHELLS))
@click.option("--install", "is_installed", is_flag=True,
              help="Write the script to where the shell reads it, say which files were written, and"
              " change nothing if it is there already.")  # fmt: skip
def completion(shell: str | None, is_installed: bool) -> None:
    """Complete commands, options and paths with the Tab key.

    This prints the script that makes a shell do so: bash (4.4 or newer), zsh or fish, by default
    the one that you use. With --install the script is written into your home folder and read by
    every shell that is started from then on. Files that skillvec did not write are not overwritten;
    to .bashrc or .zshrc a few marked lines are added.
    """
    found = find_shell(shell)
    click.echo("\n".join(install(found)) if is_installed else make_script(found).rstrip("\n"))
