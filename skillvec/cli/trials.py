"""The commands that try vectors: they evaluate, which takes as long as it takes."""

from typing import Any

import click

from skillvec.cli.commands import main
from skillvec.cli.options import Command, add_option, read_weights, share_options
from skillvec.cli.screen import Screen


def share_trial_options(command: Command) -> Command:
    """Add the options of commands that try vectors on one loaded model."""
    return add_option(
        click.option("--eval", required=True, metavar="EVALUATOR",
                     help="module:function, 'command: ... {model} ...', lm-eval:TASKS or"
                     " evaluate:QUESTIONS.jsonl."),
        click.option("--eval-option", "eval_options", multiple=True, metavar="KEY=VALUE",
                     help="Of the evaluator, such as limit=100."),
        click.option("--metric", metavar="NAME",
                     help="The one that decides; the first that the evaluator gives."),
        click.option("--minimize", multiple=True, metavar="NAME",
                     help="Less of this metric is better; known of loss, perplexity, error."),
        click.option("--scratch", type=click.Path(), metavar="FOLDER",
                     help="For merged models, one at a time, of evaluators that take folders."),
        click.option("--timeout", type=float, metavar="SECONDS", help="Of one evaluation."),
        click.option("--dtype", default="auto", show_default=True,
                     help="Of the loaded model: auto, bfloat16, float16, float32 or float64."),
        click.option("--device", help="Where the model is loaded: cpu, cuda or cuda:N."),
        click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest",
                     show_default=True, help="As of apply."),
        click.option("--seed", type=int, default=0, show_default=True,
                     help="Of the evaluations and of stochastic rounding."),
        click.option("--include", multiple=True, metavar="GLOB", help="Only these tensors."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Not these tensors."),
        click.option("--rename", multiple=True, metavar="REGEX=TEXT",
                     help="Bring names of the vector to the target's."),
        click.option("--rows", type=click.Choice(["strict", "common", "skip"]), default="strict",
                     show_default=True, help="Of embeddings and heads of another length."),
        click.option("--workers", type=int, help="Tensors at once; one a core."),
        click.option("-o", "--output", required=True, type=click.Path(),
                     help="Folder for the report, and to go on from."),
        click.option("--force", is_flag=True, help="Begin anew in a folder that holds another."),
        click.option("--dry-run", is_flag=True, help="Check what can be checked, show, stop."),
    )(command)  # fmt: skip


@main.command()
@click.argument("target")
@click.argument("vectors", nargs=-1, required=True, metavar="VECTOR[=WEIGHT]...")
@click.option("--lam", multiple=True, default=["-1:2:0.25"], show_default=True,
              metavar="START:STOP:STEP|LIST", help="Lambdas; 0 is always among them.")  # fmt: skip
@click.option("--control", multiple=True, metavar="random,shuffled",
              help="Also a vector of noise, or of shuffled values, of the same size.")  # fmt: skip
@share_trial_options
@share_options(selects=False, works=False)
def sweep(screen: Screen, target: str, vectors: tuple[str, ...], eval_options: tuple[str, ...],
          **options: Any) -> Any:  # fmt: skip
    """Evaluate TARGET + LAM * VECTOR at many lambdas, on one loaded model.

    \b
    skillvec sweep target skill.safetensors --eval my_module:score -o report/
    skillvec sweep target a=0.7 b=-0.3 --lam 0:1:0.1 --control random \\
        --eval lm-eval:my_task -o report/

    Several VECTOR=WEIGHT are one linear combination. The folder has the answer as index.html,
    report.json, points.csv and curve.svg; the same command goes on with a sweep that was cut off.
    Exit code 1 if the evaluation of a point failed.
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
@click.argument("target")
@click.argument("vectors", nargs=-1, required=True, metavar="VECTOR...")
@click.option(
    "--space",
    default="lam",
    show_default=True,
    metavar="SPEC",
    help='What may be chosen: "lam=0:2 by=layers:4", or a YAML file.',
)
@click.option(
    "--budget",
    type=int,
    default=50,
    show_default=True,
    help="Trials of the sampler; as many more of random search.",
)
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "cmaes", "random"]),
    default="tpe",
    show_default=True,
    help="Of Optuna.",
)
@click.option(
    "--second",
    metavar="NAME|bytes",
    help="Another metric, or the stored size: the best that keeps the gain.",
)
@click.option(
    "--keep",
    type=float,
    default=0.95,
    show_default=True,
    metavar="SHARE",
    help="Of the gain of lambda = 1, which --second may not cost.",
)
@click.option(
    "--report-eval",
    metavar="EVALUATOR",
    help="What judges the winner, in place of the other half of the items.",
)
@click.option(
    "--storage",
    metavar="URL",
    help="Of Optuna, for several machines at once; study.db in the output by default.",
)
@click.option(
    "--study", default="search", show_default=True, metavar="NAME", help="In the storage."
)
@share_trial_options
@share_options(selects=False, works=False)
def search(screen: Screen, target: str, vectors: tuple[str, ...], eval_options: tuple[str, ...],
           **options: Any) -> Any:  # fmt: skip
    """Search for the lambdas, layers and parameters that help TARGET most.

    \b
    skillvec search target skill.safetensors --eval my_module:score \\
        --space "lam=0:2 by=layers:4" --budget 60 -o found/

    One half of the evaluator's items is searched by; the other, asked once at the end, says
    whether the winner is better than lambda = 1 by more than noise. The folder has the answer as
    index.html, report.json and trials.csv, and the winner as winner.yaml, a recipe that combine and
    apply take. The same command goes on with a search that was cut off.
    """
    from skillvec.trials.evaluators import read_options
    from skillvec.trials.search import search as run

    report = run(
        target, *vectors, eval_options=read_options(eval_options), watcher=screen, **options
    )
    return report, report.facts["output"]
