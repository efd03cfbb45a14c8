"""The command line: every command parses, calls one verb and prints its report.

Only this room imports click. Verbs are imported inside the commands, so that --help is quick.
"""

import errno
import os
import sys
from typing import Any

import click

from skillvec import __version__
from skillvec.cli.options import (
    add_option,
    read_parameters,
    read_weights,
    share_options,
    write_options,
)
from skillvec.cli.screen import Screen, find_width, fold
from skillvec.errors import SkillvecError, printable


class _Group(click.Group):
    """Turns skillvec's errors into a message and the right exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SkillvecError as error:
            click.echo(fold(printable(f"error: {error}"), find_width(sys.stderr)), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as stop:
            said = str(stop) or "nothing was published"
            click.echo(fold(printable(f"interrupted; {said}"), find_width(sys.stderr)), err=True)
            ctx.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader went away; click ends quietly
                raise
            click.echo(f"error: {error.filename or ''}: {error.strerror or error}", err=True)
            ctx.exit(1)


_stores = add_option(  # of a command that writes a vector
    click.option(
        "--codec",
        type=click.Choice(["auto", "dense", "sparse", "packed"]),
        default="auto",
        show_default=True,
        help="auto takes the smallest; sparse is faster, dense plain tensors.",
    ),
    click.option(
        "--max-shard-size", default="5GB", show_default=True,
        help="Above it the output is a folder of shards.",
    ),
    click.option("--method", help="Label: how TUNED was trained, such as grpo."),
    click.option("--notes", help="Label: free text."),
    click.option("--license", help="Label: licence of the vector."),
)  # fmt: skip
_streams = click.option(
    "--stream", is_flag=True,
    help="Read checkpoints on the Hub shard by shard, two on the disk.",
)  # fmt: skip
_bridges = add_option(  # of a command that meets two models
    click.option("--rename", multiple=True, metavar="REGEX=TEXT",
                 help="Bring names of TUNED, or of the vector, to the other's."),
    click.option("--rows", type=click.Choice(["strict", "common", "skip"]), default="strict",
                 show_default=True, help="Of embeddings and heads of another length."),
)  # fmt: skip
_nonfinite = click.option(
    "--allow-nonfinite", is_flag=True,
    help="Let NaN and infinities through, where they decide a value.",
)  # fmt: skip
_combines = add_option(  # of a command that merges several vectors
    click.option("--op", default="linear", show_default=True,
                 help="linear, ties, dare_linear, dare_ties, della, breadcrumbs, ram, sparsify,"
                 " orthogonal, slerp, nuslerp, fisher, spectral, coarsen, project:"
                 " docs/operators.md."),
    click.option("--param", "params", multiple=True, metavar="NAME=VALUE",
                 help="Parameter of the operator, such as density=0.3; fisher=FILE once a vector."),
)  # fmt: skip
_reports = add_option(  # of a command that measures vectors
    click.option("--against", metavar="W", help="Weights: for rounding, and their subspaces."),
    click.option("--subspace", type=int, default=0, metavar="K",
                 help="Compare the K leading singular directions."),
    click.option("--activations", type=click.Path(), metavar="FILE",
                 help="Second moments of inputs, for the outputs of updates."),
    click.option("--device", default="auto", show_default=True,
                 help="Of --subspace and --activations: cpu, cuda or cuda:N."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of anything random."),
    click.option("-o", "--output", type=click.Path(),
                 help="Folder for report.json, report.csv and report.html."),
    click.option("--figures", is_flag=True, help="Also draw the figures as SVG and PNG."),
    click.option("--force", is_flag=True, help="Overwrite an existing report."),
)  # fmt: skip


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, callback=_show_version,
              help="Show the version and exit; with -v also kernels and packages.")  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, is_eager=True, help="Of --version.")
def main(verbose: bool) -> None:
    """Cut a skill out of one model and add it to another.

    \b
    skillvec diff RL SFT -o skill.safetensors        v = RL - SFT
    skillvec apply TARGET skill.safetensors -o OUT   OUT = TARGET + lam * v
    skillvec combine A=0.7 B=-0.3 -o c.safetensors   c = 0.7 A - 0.3 B
    skillvec orthogonality A B                       how related two deltas are
    skillvec verify OUT                              prove it from the disk
    skillvec push skill.safetensors org/name         publish it on the Hub

    Exit codes: 0 done, 1 run error, 2 usage, 3 incompatible inputs.
    """
    if verbose:
        raise click.UsageError("-v stands behind the command, or beside --version")
    # numpy's BLAS starts its threads, which wait by turning, where numpy is imported: a third of a
    # small run. Nothing here is faster by them; matrices have a core each (engine.matrix_workers).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@main.command()
@click.argument("tuned")
@click.argument("base")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="auto is exact; bf16, fp16 and fp32 store rounded values.",
)
@_stores
@_bridges
@_nonfinite
@_streams
@share_options(writes=True)
def diff(screen: Screen, tuned: str, base: str, output: str, **options: Any) -> Any:
    """Write the skill vector v = TUNED - BASE.

    TUNED and BASE are folders, single files, org/name[@revision] on the Hub, or URLs such as
    s3://bucket/model; TUNED may be a PEFT adapter of BASE. docs/checkpoints.md lists what is
    taken. A run that was cut off goes on when the same command is given again.
    """
    from skillvec import verbs

    return write_options(verbs.diff(tuned, base, output, watcher=screen, **options))


@main.command()
@click.argument("vectors", nargs=-1, metavar="VECTOR[=WEIGHT]...")
@_combines
@click.option(
    "--recipe", type=click.Path(), help="YAML, JSON or a combination, in place of the vectors."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of random masks.")
@click.option("--dtype", default="auto", show_default=True, help="Stored dtype; auto is fp32.")
@_stores
@_nonfinite
@_streams
@share_options(writes=True, globs=False)
def combine(
    screen: Screen, vectors: tuple[str, ...], params: tuple[str, ...], **options: Any
) -> Any:
    """Merge vectors into one: c = 0.7 a - 0.3 b, or by another operator.

    \b
    skillvec combine a.safetensors=0.7 b.safetensors=-0.3 -o c.safetensors
    skillvec combine a b --op ties --param density=0.3 -o c.safetensors

    One vector alone is written again, with another codec.
    """
    from skillvec import verbs

    refs, weights = read_weights(vectors)
    vector = verbs.combine(
        *refs,
        weights=weights or None,
        parameters=read_parameters(params),
        watcher=screen,
        **options,
    )
    return write_options(vector)


@main.command()
@click.argument("target")
@click.argument("vectors", nargs=-1, metavar="VECTOR[=WEIGHT]...")
@click.option("--lam", type=float, default=1.0, show_default=True, help="The factor lambda.")
@_combines
@click.option(
    "--recipe", type=click.Path(), help="YAML, JSON or a combination, in place of the vectors."
)
@click.option("--tuned", help="With --base: take the difference in the same pass.")
@click.option("--base", help="With --tuned, in place of VECTOR.")
@click.option("--dtype", help="Dtype of the output; the target's own by default.")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="The last rounding; stochastic is right on average.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of anything random.")
@_bridges
@_nonfinite
@_streams
@share_options(writes=True)
def apply(screen: Screen, target: str, vectors: tuple[str, ...], output: str, op: str,
          params: tuple[str, ...], recipe: str | None, **options: Any) -> Any:  # fmt: skip
    """Write OUT = TARGET + LAM * VECTOR, in the target's own layout.

    Several VECTOR=WEIGHT are merged by --op in the same pass. In place of VECTOR, --tuned RL
    --base SFT adds their difference without storing it.
    """
    from skillvec import verbs

    vector = None
    if not vectors and not recipe and (op != "linear" or params):
        raise click.UsageError("--op and --param merge VECTORs; there are none")
    if vectors or recipe:
        refs, weights = read_weights(vectors)
        vector = verbs.combine(
            *refs, weights=weights or None, op=op, parameters=read_parameters(params),
            seed=0 if recipe else options["seed"], recipe=recipe,
        )  # fmt: skip
    report = verbs.apply(target, vector, output, watcher=screen, **options)
    return report, report.facts["output"]


@main.command("import-patch")
@click.argument("patch")
@click.argument("base")
@_stores
@_nonfinite
@_streams
@share_options(writes=True, globs=False)
def import_patch(screen: Screen, patch: str, base: str, output: str, **options: Any) -> Any:
    """Make a vector of PATCH, changed values of the exact BASE.

    PATCH is a safetensors file of NAME.indices and NAME.values, with what vLLM is told beside
    them or without, or a flush of verl (__delta_spec__, __positions__, __values__), or a folder of
    several. Names are those of the checkpoint, or of the model in memory.
    """
    from skillvec import verbs

    return write_options(verbs.import_patch(patch, base, output, watcher=screen, **options))


@main.command("export-patch")
@click.argument("vector")
@click.option("--base", help="Where the vector's exact base is now.")
@click.option(
    "--form", type=click.Choice(["lists", "verl", "vllm"]), default="lists", show_default=True,
    help="lists: NAME.indices and NAME.values. vllm: the same, and what vLLM is told. verl: a"
    " flush.",
)  # fmt: skip
@click.option(
    "--names", type=click.Choice(["files", "memory"]), default="files", show_default=True,
    help="Of the base's tensors: in its files, or in memory.",
)  # fmt: skip
@_nonfinite
@share_options(writes=True, globs=False)
def export_patch(screen: Screen, vector: str, output: str, **options: Any) -> Any:
    """Write what VECTOR changes in its exact base: a patch, under the base's names."""
    from skillvec import verbs

    report = verbs.export_patch(vector, output, watcher=screen, **options)
    return report, report.facts["output"]


@main.command("extract-lora")
@click.argument("vector")
@click.option("--rank", type=int, help="Rank of every matrix.")
@click.option(
    "--energy",
    type=float,
    metavar="SHARE",
    help="Of the squared norm to keep: the smallest rank that does.",
)
@click.option("--embed-lora", is_flag=True, help="Factors of embeddings too.")
@click.option(
    "--save-module",
    multiple=True,
    metavar="NAME",
    help="Save a module whole: lm_head, embed_tokens, norm ...",
)
@click.option("--base", help="Where the vector's base is now.")
@click.option("--dtype", default="fp32", show_default=True, help="Of the factors.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the randomised SVD.")
@_nonfinite
@share_options(writes=True, works=False)
def extract_lora(screen: Screen, vector: str, output: str, **options: Any) -> Any:
    """Write the best LoRA adapter of VECTOR: s B A of a rank, for PEFT.

    The report says how much of each tensor is kept, and what is left out.
    """
    from skillvec import verbs

    report = verbs.extract_lora(vector, output, watcher=screen, **options)
    return report, report.facts["output"]


@main.command()
@click.argument("vector")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Of a repository that is made.")
@click.option("--revision", help="Branch to commit to; made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--commit-message", help="One line.")
@click.option("--license", help="Licence on the card, if the vector has none.")
@click.option("--token", help="Of the Hub; the stored one by default.")
@share_options(globs=False, works=False)
def push(screen: Screen, vector: str, repo: str, **options: Any) -> Any:
    """Publish VECTOR, or a folder that apply wrote, with a card, as REPO on the Hub."""
    from skillvec import verbs

    report = verbs.push(vector, repo, watcher=screen, **options)
    return report, report.facts["url"]


@main.command()
@click.argument("repo")
@click.option("-o", "--output", type=click.Path(), help="Where to; the Hub's cache by default.")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--token", help="Of the Hub; the stored one by default.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@share_options(globs=False, works=False)
def pull(screen: Screen, repo: str, **options: Any) -> Any:
    """Download a vector or a merged model from the Hub, and check what arrived."""
    from skillvec import verbs

    report = verbs.pull(repo, watcher=screen, **options)
    return report, report.facts["output"]


@main.command()
@click.argument("vectors", nargs=-1, required=True, metavar="A B [C ...]")
@click.option(
    "--control",
    metavar="random|VECTOR",
    help="In place of the first of each pair: random signs of its channels, or a vector.",
)
@_reports
@_nonfinite
@share_options()
def orthogonality(screen: Screen, vectors: tuple[str, ...], **options: Any) -> Any:
    """Compare deltas: angles against chance, supports, rounding, subspaces.

    Each input is a vector file or TUNED::BASE. docs/orthogonality.md explains every number.
    """
    from skillvec import verbs

    report = verbs.orthogonality(*vectors, watcher=screen, **options)
    cosines = [str(pair["overall"]["cosine"]) for pair in report.facts.get("pairs", [])]
    return report, report.facts.get("output") or "\n".join(cosines) or None


@main.command()
@click.argument("vector")
@_reports
@_nonfinite
@share_options()
def norms(screen: Screen, vector: str, **options: Any) -> Any:
    """Measure VECTOR (a file or TUNED::BASE) by layer and module: norms, density, rounding."""
    from skillvec import verbs

    report = verbs.norms(vector, watcher=screen, **options)
    measured = [str(entry["overall"]["norm"]) for entry in report.facts.get("norms", [])]
    return report, report.facts.get("output") or "\n".join(measured) or None


@main.command()
@click.argument("path")
@click.option("--target", help="Of a vector: give the verdict on this model.")
@share_options(selects=False, works=False)
def inspect(screen: Screen, path: str, target: str | None) -> Any:
    """Describe a model or a vector from its headers alone."""
    from skillvec import verbs

    report = verbs.inspect(path, target)
    return report, report.facts["path"]


@main.command()
@click.argument("path")
@click.option("--tuned", help="Of a vector: where TUNED is now.")
@click.option("--base", help="Of a vector: where BASE is now.")
@click.option("--target", help="Of a merged model: where TARGET is now.")
@click.option("--vector", help="Of a merged model: where VECTOR is now.")
@click.option("--dry-run", is_flag=True, help="Check headers, show the plan, stop.")
@share_options(selects=False)
def verify(screen: Screen, path: str, **options: Any) -> Any:
    """Prove a vector or a merged model from the disk, bit for bit.

    A vector: VECTOR + BASE = TUNED, or that it is what its parents give. A merged model:
    OUT = round(TARGET + LAM * VECTOR), by the recipe in its header. Inputs are looked for where
    they were, unless given.
    """
    from skillvec import verbs

    report = verbs.verify(path, watcher=screen, **options)
    return report, report.facts["path"]


if __name__ == "__main__":
    sys.exit(main())
