"""What commands share: options, their types, what a shell completes, how their values are read."""

import os
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any

import click

from skillvec.cli.near import OPERATORS
from skillvec.cli.screen import Screen

Command = Callable[..., Any]
# where an option stands in the help of a command; what is not named here is the command's own
SECTIONS = {
    "Output": ("output", "force", "codec", "max-shard-size", "method", "notes", "license",
               "figures"),
    "Tensors": ("include", "exclude", "rename", "rows", "allow-nonfinite"),
    "Running": ("dry-run", "engine", "workers", "device", "seed", "stream", "scratch", "timeout"),
    "Printing": ("json", "quiet", "verbose", "help"),
}  # fmt: skip


class Reference(click.types.StringParamType):
    """A path of this disk, a name on the Hub or a URL: the shell completes the path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[Any]:
        """Return that the shell is to complete a file or folder."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


MODEL, VECTOR, FILE = Reference("model"), Reference("vector"), Reference("file")


def offer(*words: str) -> Callable[..., list[str]]:
    """Return what completes an option with words, of which others may be given too."""
    return lambda context, parameter, begun: [word for word in words if word.startswith(begun)]


def add_option(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that adds options in this order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


# ------------------------------------------------------------------------- options of some commands


def add_seed(what: str) -> Callable[[Command], Command]:
    """Return --seed of a command that draws at random."""
    return click.option("--seed", type=int, default=0, show_default=True, metavar="N",
                        help=f"Number that fixes {what}.")  # fmt: skip


def add_rename(whose: str) -> Callable[[Command], Command]:
    """Return --rename of a command that meets two models."""
    return click.option(
        "--rename", multiple=True, metavar="REGEX=TEXT",
        help=f"Rename tensors of {whose} before they are matched by name: what the regular"
        " expression REGEX finds becomes TEXT. May be given several times.",
    )  # fmt: skip


def add_moved(name: str, kind: Reference, what: str) -> Callable[[Command], Command]:
    """Return an option that says where an input is which a file has recorded."""
    return click.option(name, type=kind, help=f"Where {what} is now. Needed if it was moved.")


def add_device(what: str) -> Callable[[Command], Command]:
    """Return --device of a command that may use a GPU."""
    return click.option(
        "--device", default="auto", show_default=True, metavar="NAME",
        shell_complete=offer("auto", "cpu", "cuda"),
        help=f"Where {what} computed: cpu, cuda or cuda:N. auto takes a GPU where there is one.",
    )  # fmt: skip


STORES = add_option(  # of a command that writes a vector
    click.option(
        "--codec", type=click.Choice(["auto", "dense", "sparse", "packed"]), default="auto",
        show_default=True,
        help="How values are stored: packed is compressed, sparse lists the changed values and is"
        " written and read faster, dense is plain tensors. auto takes the smallest.",
    ),
    click.option(
        "--max-shard-size", default="5GB", show_default=True, metavar="SIZE",
        help="Write a folder of several files where the vector is larger than SIZE, such as 500MB.",
    ),
    click.option("--method", metavar="TEXT",
                 help="Label in the vector's header: how the tuned model was trained, such as"
                 " grpo."),
    click.option("--notes", metavar="TEXT", help="Label in the vector's header: any text."),
    click.option("--license", metavar="NAME",
                 help="Label in the vector's header: its licence, such as apache-2.0."),
)  # fmt: skip
STREAMS = click.option(
    "--stream", is_flag=True,
    help="Read models on the Hub file by file, and delete each file once it was read, so that"
    " at most two are on the disk at a time.",
)  # fmt: skip
ROWS = click.option(
    "--rows", type=click.Choice(["strict", "common", "skip"]), default="strict", show_default=True,
    help="What to do where the embedding or head has more rows in one model than in the other:"
    " strict refuses it, common takes the rows that both have, skip leaves the tensor out.",
)  # fmt: skip
NONFINITE = click.option(
    "--allow-nonfinite", is_flag=True,
    help="Go on where a value is a NaN or an infinity, or becomes one. Without this option such"
    " tensors are refused and named.",
)  # fmt: skip
INCLUDES = add_option(
    click.option("--include", multiple=True, metavar="GLOB",
                 help="Take only tensors whose name matches GLOB, such as '*.mlp.*'. May be given"
                 " several times."),
    click.option("--exclude", multiple=True, metavar="GLOB",
                 help="Leave out tensors whose name matches GLOB. May be given several times."),
)  # fmt: skip
COMBINES = add_option(  # of a command that merges several vectors
    click.option(
        "--op", default="linear", show_default=True, metavar="NAME",
        shell_complete=offer(*OPERATORS),
        help=f"Operator that merges the vectors: {', '.join(OPERATORS)}. docs/operators.md says"
        " what each one does.",
    ),
    click.option(
        "--param", "params", multiple=True, metavar="NAME=VALUE",
        help="Parameter of the operator, such as density=0.3. May be given several times;"
        " fisher=FILE once for each vector.",
    ),
    click.option(
        "--recipe", type=FILE, metavar="FILE",
        help="Take vectors, weights and operator from a YAML or JSON file, or from a stored"
        " combination, in place of VECTOR, --op and --param.",
    ),
)  # fmt: skip


def add_reports(draws: str) -> Callable[[Command], Command]:
    """Return the options of a command that measures vectors; --seed fixes what it draws."""
    return add_option(
        click.option(
            "--against", type=MODEL, metavar="MODEL",
            help="Model that a vector was trained from. Its weights show how much of the vector is"
            " explained by rounding to 16 bits and, with --subspace, whether the vector lies along"
            " the model's own leading directions. By default the base of a TUNED::BASE.",
        ),
        click.option(
            "--subspace", type=int, default=0, metavar="K",
            help="Also measure the K leading singular directions of every matrix. By default they"
            " are left out, because they take much longer.",
        ),
        click.option(
            "--activations", type=FILE, metavar="FILE",
            help="Also measure how a vector changes the outputs of modules. FILE holds the second"
            " moments of their inputs; python -m skillvec.recipes.calibrate makes it.",
        ),
        add_device("--subspace and --activations are"),
        add_seed(draws),
        click.option(
            "-o", "--output", type=click.Path(), metavar="FOLDER",
            help="Write report.json, report.csv and the page report.html into FOLDER.",
        ),
        click.option("--figures", is_flag=True,
                     help="Also write the figures of the page into FOLDER, as SVG and PNG."),
        click.option("--force", is_flag=True, help="Overwrite a report that is in FOLDER already."),
    )  # fmt: skip


# ------------------------------------------------------------------------- options of all commands


def share_options(
    *, writes: bool = False, selects: bool = True, globs: bool = True, works: bool = True,
    more: str = "a line for every tensor", until: str = "anything is written",
) -> Callable[[Command], Command]:  # fmt: skip
    """Add the options that commands share, and show the report that the command returns.

    The command is given the screen; it returns a report and what `--quiet` prints. `more` is what
    `--verbose` adds, and `until` what `--dry-run` stops before.
    """
    options: list[Callable[[Command], Command]] = [
        click.option("--json", "as_json", is_flag=True,
                     help="Print the whole report as JSON, every tensor included."),
        click.option("-q", "--quiet", is_flag=True,
                     help="Print the result alone: a path, or what was measured, without units."),
        click.option("-v", "--verbose", is_flag=True, help=f"Also print {more}."),
    ]  # fmt: skip
    if works:
        options[:0] = [
            click.option(
                "--engine", type=click.Choice(["threads", "serial", "ray"]), default="threads",
                show_default=True,
                help="What does the work: threads of this process, the calling thread alone"
                " (serial), or the Ray cluster that RAY_ADDRESS names or that runs here (ray).",
            ),
            click.option("--workers", type=int, metavar="N",
                         help="Work on N blocks, of a million values each, at once; by default one"
                         " for each core."),
        ]  # fmt: skip
    if selects:
        options.insert(
            0, click.option("--dry-run", is_flag=True,
                            help="Check all inputs by their headers, show the plan, and stop before"
                            f" {until}."),
        )  # fmt: skip
    if selects and globs:
        options.insert(0, INCLUDES)
    if writes:
        options[:0] = [
            click.option("-o", "--output", required=True, type=click.Path(), metavar="PATH",
                         help="File or folder to write."),
            click.option("--force", is_flag=True, help="Overwrite PATH if it exists."),
        ]  # fmt: skip

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


# --------------------------------------------------------------------------------- what is returned


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
    """Return parameters by name: numbers, booleans, text, or of text that is repeated a list."""
    found: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for word in params:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{word!r}: expected NAME=VALUE", param_hint="--param")
        try:
            found[name] = {"true": True, "false": False}.get(text.lower())
            found[name] = float(text) if found[name] is None else found[name]
        except ValueError:
            found[name] = text if name not in texts else [*texts[name], text]
            texts[name] = [*texts.get(name, ()), text]
    return found
