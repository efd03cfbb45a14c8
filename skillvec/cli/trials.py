"""The commands that try vectors: they evaluate, which takes as long as it takes."""

from typing import Any

import click

from skillvec.cli.commands import main
from skillvec.cli.options import (
    INCLUDES,
    MODEL,
    ROWS,
    VECTOR,
    Command,
    add_option,
    add_rename,
    add_seed,
    offer,
    read_weights,
    share_options,
)
from skillvec.cli.screen import Screen


def share_trial_options(command: Command) -> Command:
    """Add the options of commands that try vectors on one loaded model."""
    return add_option(
        click.option(
            "--eval", required=True, metavar="EVALUATOR",
            help="What scores a model: module:function, a Python function that takes model and"
            " tokenizer; 'command: ... {model} ...', a program that gets a folder for {model};"
            " lm-eval:TASK,TASK; or evaluate:QUESTIONS.jsonl, lines with a prompt and an answer."
            " docs/search.md has more.",
        ),
        click.option("--eval-option", "eval_options", multiple=True, metavar="KEY=VALUE",
                     help="Argument that is passed to the evaluator, such as limit=100. May be"
                     " given several times."),
        click.option("--metric", metavar="NAME",
                     help="Name of the score that decides which model is better. By default the"
                     " first that the evaluator gives."),
        click.option("--minimize", multiple=True, metavar="NAME",
                     help="Say that a lower score NAME is better. Of scores called loss, perplexity"
                     " or error this is known. May be given several times."),
        click.option("--scratch", type=click.Path(), metavar="FOLDER",
                     help="Folder for merged models, one at a time, where the evaluator takes"
                     " folders. By default the system's folder for temporary files."),
        click.option("--timeout", type=float, metavar="SECONDS",
                     help="Seconds after which one evaluation counts as failed. By default it may"
                     " take as long as it takes."),
        click.option("--dtype", default="auto", show_default=True, metavar="NAME",
                     shell_complete=offer("auto", "bfloat16", "float16", "float32", "float64"),
                     help="Dtype that TARGET is loaded in: bfloat16, float16, float32 or float64."
                     " auto takes that of its config."),
        click.option("--device", metavar="NAME", shell_complete=offer("cpu", "cuda"),
                     help="Where TARGET is loaded: cpu, cuda or cuda:N. By default a GPU where"
                     " there is one."),
        click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest",
                     show_default=True,
                     help="How the sum is rounded to the dtype, as in skillvec apply."),
        add_seed("the random draws: of the evaluations and of --rounding stochastic"),
        INCLUDES,
        add_rename("the vectors"),
        ROWS,
        click.option("--workers", type=int, metavar="N",
                     help="Add the vector to N tensors at once; by default one for each core."),
        click.option("-o", "--output", required=True, type=click.Path(), metavar="FOLDER",
                     help="Folder for the report. What is done already is kept there: the same"
                     " command goes on with it."),
        click.option("--force", is_flag=True,
                     help="Begin anew where FOLDER holds a run with other options."),
        click.option("--dry-run", is_flag=True,
                     help="Check what can be checked without loading TARGET, show the plan, and"
                     " stop."),
    )(command)  # fmt: skip


@main.command()
@click.argument("target", type=MODEL)
@click.argument("vectors", nargs=-1, required=True, metavar="VECTOR[=WEIGHT]...", type=VECTOR)
@click.option("--lam", multiple=True, default=["-1:2:0.25"], show_default=True,
              metavar="START:STOP:STEP|LIST",
              help="Lambdas to try: a range with both ends, or a LIST such as 0.5,1. Lambda 0,"
              " which is TARGET itself, is always tried too. May be given several times.",
              )  # fmt: skip
@click.option("--control", multiple=True, metavar="random,shuffled",
              shell_complete=offer("random", "shuffled", "random,shuffled"),
              help="Also try a control at every lambda: random is noise of the vector's size,"
              " shuffled its own values in other places.")  # fmt: skip
@share_trial_options
@share_options(selects=False, works=False, more="every score of every lambda")
def sweep(screen: Screen, target: str, vectors: tuple[str, ...], eval_options: tuple[str, ...],
          **options: Any) -> Any:  # fmt: skip
    """Try a vector at many lambdas: does it help, and at which?

    TARGET is loaded once and evaluated at every lambda, with VECTOR added in memory. Several
    vectors are multiplied by their WEIGHT and added up. FOLDER gets the answer as index.html,
    report.json, points.csv and curve.svg. The exit code is 1 if an evaluation failed.
    """
    from skillvec.trials.evaluators import read_options
    from skillvec.trials.sweep import sweep as run

    refs, weights = read_weights(vectors)
    report = run(
        target, *refs, weights=weights, eval_options=read_options(eval_options), watcher=screen,
        **options,
    )  # fmt: skip
    return report, report.facts["output"]


@main.command()
@click.argument("target", type=MODEL)
@click.argument("vectors", nargs=-1, required=True, metavar="VECTOR...", type=VECTOR)
@click.option(
    "--space", default="lam", show_default=True, metavar="SPEC",
    help='What the search may choose, in words such as "lam=0:2 by=layers:4" (a lambda between 0'
    " and 2 for each of 4 groups of layers), or a YAML file with the same keys. docs/search.md"
    " lists them.",
)  # fmt: skip
@click.option(
    "--budget",
    type=int,
    default=50,
    show_default=True,
    metavar="N",
    help="Number of trials of the sampler. Random search, which it is compared with, gets as many.",
)
@click.option(
    "--sampler", type=click.Choice(["tpe", "cmaes", "random"]), default="tpe", show_default=True,
    help="Which sampler of Optuna chooses the trials.",
)  # fmt: skip
@click.option(
    "--second", metavar="NAME|bytes",
    help="Second aim beside --metric: another score of the evaluator, or bytes, the stored size of"
    " the vector. Of all trials that keep at least the share --keep of the gain, the one that is"
    " best by this aim wins.",
)  # fmt: skip
@click.option(
    "--keep", type=float, default=0.95, show_default=True, metavar="SHARE",
    help="With --second: share of the gain of lambda = 1 that has to be kept, between 0 and 1.",
)  # fmt: skip
@click.option(
    "--report-eval", metavar="EVALUATOR",
    help="Evaluator that judges the winner at the end. By default that of --eval does, on the half"
    " of its items that the search does not see.",
)  # fmt: skip
@click.option(
    "--storage",
    metavar="URL",
    help="Database of Optuna, which several machines may share. By default study.db in FOLDER.",
)
@click.option("--study", default="search", show_default=True, metavar="NAME",
              help="Name of the study in the database.")  # fmt: skip
@share_trial_options
@share_options(selects=False, works=False, more="every comparison, and what was chosen")
def search(screen: Screen, target: str, vectors: tuple[str, ...], eval_options: tuple[str, ...],
           **options: Any) -> Any:  # fmt: skip
    """Search for the lambdas and layers that help a model most.

    The search goes by one half of the evaluator's items. The other half, asked once at the end,
    says whether the winner is better than lambda = 1 by more than noise. FOLDER gets the answer as
    index.html, report.json and trials.csv, and the winner as winner.yaml, a recipe that
    skillvec combine and skillvec apply take.
    """
    from skillvec.trials.evaluators import read_options
    from skillvec.trials.search import search as run

    report = run(
        target, *vectors, eval_options=read_options(eval_options), watcher=screen, **options
    )
    return report, report.facts["output"]
