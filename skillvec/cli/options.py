"""What commands share: options, their types and how their values are read."""

import os
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any

import click

from skillvec.cli.screen import Screen

Command = Callable[..., Any]


def add_option(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that adds options in this order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


def share_options(
    *, writes: bool = False, selects: bool = True, globs: bool = True, works: bool = True
) -> Callable[[Command], Command]:
    """Add the options that commands share, and show the report that the command returns.

    The command is given the screen; it returns a report and what `--quiet` prints.
    """
    options = [
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        click.option("-q", "--quiet", is_flag=True, help="Print the path or the answer alone."),
        click.option("-v", "--verbose", is_flag=True, help="Show every tensor."),
    ]
    if works:
        options[:0] = [
            click.option("--engine", type=click.Choice(["threads", "serial", "ray"]),
                         default="threads", show_default=True,
                         help="ray: the cluster that RAY_ADDRESS names, or that runs here."),
            click.option("--workers", type=int, help="Tasks at once; one a core."),
        ]  # fmt: skip
    if selects:
        options.insert(
            0, click.option("--dry-run", is_flag=True, help="Check headers, show the plan, stop.")
        )
    if selects and globs:
        options[:0] = [
            click.option("--include", multiple=True, metavar="GLOB", help="Only these tensors."),
            click.option("--exclude", multiple=True, metavar="GLOB", help="Not these tensors."),
        ]
    if writes:
        options[:0] = [
            click.option("-o", "--output", required=True, type=click.Path(), help="What to write."),
            click.option("--force", is_flag=True, help="Overwrite an existing output."),
        ]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def shown(as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
            screen = Screen(as_json=as_json, quiet=quiet, verbose=verbose)
            try:
                report, last_line = command(screen, **given)
            finally:
                screen.close()
            screen.show(report, last_line=last_line)
            if report.facts.get("failed"):  # trials, and the report says which
                click.get_current_context().exit(1)

        return add_option(*options)(shown)

    return decorate


def write_options(vector: Any) -> tuple[Any, str]:
    """Return the report of a vector that was stored, and its path."""
    return vector.report, vector.report.facts["output"]


def read_weights(words: tuple[str, ...]) -> tuple[list[str], list[float] | None]:
    """Split VECTOR=WEIGHT words; a file that has the whole word as its name is meant by it."""
    refs, weights = [], []
    for word in words:
        ref, _, weight = word.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            ref = ""
        whole = not ref or os.path.exists(word.rpartition("::")[2])
        refs.append(word if whole else ref)
        weights.append(1.0 if whole else number)
    return refs, weights


def read_parameters(params: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in params:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{word!r}: expected NAME=VALUE", param_hint="--param")
        try:
            found[name] = {"true": True, "false": False}.get(text.lower())
            found[name] = float(text) if found[name] is None else found[name]
        except ValueError:
            found[name] = text
    return found
