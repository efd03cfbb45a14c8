"""The command line: every command parses, calls one verb and prints its report.

Only this room imports click. Verbs are imported inside the commands, so that --help is quick.
"""

import os
import sys
from typing import Any

import click

from skillvec.cli.group import Verbs, show_version
from skillvec.cli.options import (
    COMBINES,
    MODEL,
    NONFINITE,
    ROWS,
    STORES,
    STREAMS,
    VECTOR,
    add_device,
    add_moved,
    add_rename,
    add_reports,
    add_seed,
    offer,
    read_parameters,
    read_weights,
    share_options,
    write_options,
)
from skillvec.cli.screen import Screen


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, callback=show_version,
              help="Show the version and exit.")  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, is_eager=True,
              help="With --version: also show kernels, Python and packages in use.")  # fmt: skip
def main(verbose: bool) -> None:
    """Cut a skill out of one model and add it to another.

    \b
    skillvec diff RL SFT -o skill.safetensors        v = RL - SFT
    skillvec apply TARGET skill.safetensors -o OUT   OUT = TARGET + lam * v
    skillvec verify OUT                              proves it from the disk

    RL is a model after training, SFT the model that this training began at, TARGET the model that
    gets the skill; lam is lambda, 1 if --lam does not say otherwise. A model or vector is a path,
    org/name[@revision] on the Hub, or a URL such as s3://bucket/model. TUNED::BASE, where a vector
    is asked for, is the difference of two models. skillvec help COMMAND shows what a command takes,
    with examples.

    Exit codes: 0 done, 1 the run failed, 2 the command is wrong, 3 the inputs do not fit.
    """
    if verbose:
        raise click.UsageError("-v comes after the command, or beside --version")
    # numpy's BLAS starts its threads, which wait by turning, where numpy is imported: a third of a
    # small run. Nothing here is faster by them; matrices have a core each (engine.matrix_workers).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@main.command()
@click.argument("tuned", type=MODEL)
@click.argument("base", type=MODEL)
@click.option(
    "--dtype", default="auto", show_default=True, metavar="NAME",
    shell_complete=offer("auto", "bf16", "fp16", "fp32"),
    help="Dtype of the stored differences. auto keeps them exact, so that base + vector is TUNED"
    " bit for bit; bf16, fp16 and fp32 round them.",
)  # fmt: skip
@STORES
@add_rename("TUNED")
@ROWS
@NONFINITE
@STREAMS
@share_options(writes=True)
def diff(screen: Screen, tuned: str, base: str, output: str, **options: Any) -> Any:
    """Make a skill vector: the difference TUNED - BASE, as a file.

    TUNED and BASE are two checkpoints of one model: folders, single files, org/name[@revision] on
    the Hub, or URLs such as s3://bucket/model. TUNED may be a PEFT adapter of BASE.
    docs/checkpoints.md lists all formats that are read. A run that was cut off goes on when the
    same command is given again.
    """
    from skillvec import verbs

    return write_options(verbs.diff(tuned, base, output, watcher=screen, **options))


@main.command()
@click.argument("vectors", nargs=-1, metavar="VECTOR[=WEIGHT]...", type=VECTOR)
@COMBINES
@add_seed("the random masks of operators such as dare_linear")
@click.option("--dtype", default="auto", show_default=True, metavar="NAME",
              shell_complete=offer("auto", "bf16", "fp16", "fp32"),
              help="Dtype of the stored values: bf16, fp16, fp32 or fp64. auto is fp32, or fp64"
              " where a vector is.")  # fmt: skip
@STORES
@NONFINITE
@STREAMS
@share_options(writes=True, globs=False)
def combine(
    screen: Screen, vectors: tuple[str, ...], params: tuple[str, ...], **options: Any
) -> Any:
    """Merge several vectors into one, weighted or by an operator.

    Each VECTOR is a vector file, or TUNED::BASE, the difference of two models. It is multiplied by
    WEIGHT, by 1 if none is given. The default operator adds them: c = 0.7 a - 0.3 b. With one
    VECTOR alone the command writes a copy of it, with another --codec for instance.
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
@click.argument("target", type=MODEL)
@click.argument("vectors", nargs=-1, metavar="VECTOR[=WEIGHT]...", type=VECTOR)
@click.option("--lam", type=float, default=1.0, show_default=True, metavar="NUMBER",
              help="Lambda, by which the vector is multiplied. 0 leaves TARGET as it is, a negative"
              " number takes the skill away.")  # fmt: skip
@COMBINES
@click.option("--tuned", type=MODEL,
              help="With --base, in place of VECTOR: add the difference of these two models without"
              " storing it.")  # fmt: skip
@click.option("--base", type=MODEL, help="The model that is subtracted from that of --tuned.")
@click.option("--dtype", metavar="NAME", shell_complete=offer("bf16", "fp16", "fp32", "fp64"),
              help="Dtype of the written weights: bf16, fp16, fp32 or fp64. By default every tensor"
              " keeps that of TARGET.")  # fmt: skip
@click.option(
    "--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest",
    show_default=True,
    help="How the sum is rounded to the dtype. stochastic rounds up or down by chance, so that"
    " small steps arrive on average where nearest would lose them.",
)  # fmt: skip
@add_seed("the random draws: of --rounding stochastic and of operators such as dare_linear")
@add_rename("the vector")
@ROWS
@NONFINITE
@STREAMS
@share_options(writes=True)
def apply(screen: Screen, target: str, vectors: tuple[str, ...], output: str, op: str,
          params: tuple[str, ...], recipe: str | None, **options: Any) -> Any:  # fmt: skip
    """Add a skill to a model: write TARGET + lambda * VECTOR.

    The output has the files, names and dtypes of TARGET, and a copy of its tokenizer and
    configuration. VECTOR is a vector file, a LoRA adapter of PEFT, or TUNED::BASE, the difference
    of two models. Several vectors are multiplied by their WEIGHT and merged by --op in the same
    pass. The report says how much of the change has arrived in the rounded weights.
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
@click.argument("patch", type=VECTOR)
@click.argument("base", type=MODEL)
@STORES
@NONFINITE
@STREAMS
@share_options(writes=True, globs=False)
def import_patch(screen: Screen, patch: str, base: str, output: str, **options: Any) -> Any:
    """Make a vector of a list of changed values (vLLM, verl).

    PATCH lists the values that changed in exactly the model BASE, as RL stacks send them to
    inference servers: a safetensors file of NAME.indices and NAME.values, with or without the
    description of an update that vLLM's weight transfer takes; a flush of verl (__delta_spec__,
    __positions__, __values__); or a folder of several such files. Tensors may be named as in the
    checkpoint or as in memory.
    """
    from skillvec import verbs

    return write_options(verbs.import_patch(patch, base, output, watcher=screen, **options))


@main.command("export-patch")
@click.argument("vector", type=VECTOR)
@add_moved("--base", MODEL, "the base model of VECTOR")
@click.option(
    "--form", type=click.Choice(["lists", "verl", "vllm"]), default="lists", show_default=True,
    help="What the file looks like. lists: NAME.indices and NAME.values of every tensor. vllm: the"
    " same, with the description of an update that vLLM's weight transfer takes, in the header."
    " verl: one flush of verl.",
)  # fmt: skip
@click.option(
    "--names", type=click.Choice(["files", "memory"]), default="files", show_default=True,
    help="How tensors are named: as in the files of the base, or as in the model that transformers"
    " makes of them in memory.",
)  # fmt: skip
@NONFINITE
@share_options(writes=True, globs=False)
def export_patch(screen: Screen, vector: str, output: str, **options: Any) -> Any:
    """Write what a vector changes as a list (vLLM, verl).

    The list holds positions and new values, not differences. So it fits one model alone: the very
    base that VECTOR was taken from.
    """
    from skillvec import verbs

    report = verbs.export_patch(vector, output, watcher=screen, **options)
    return report, report.facts["output"]


@main.command("extract-lora")
@click.argument("vector", type=VECTOR)
@click.option("--rank", type=int, metavar="R",
              help="Rank of the two factors of every matrix. Give either this or --energy.",
              )  # fmt: skip
@click.option("--energy", type=float, metavar="SHARE",
              help="Share of every matrix's squared norm that its factors have to keep, between 0"
              " and 1: each gets the smallest rank that does.")  # fmt: skip
@click.option("--embed-lora", is_flag=True,
              help="Also make factors of embeddings, which are left out otherwise.")  # fmt: skip
@click.option("--save-module", multiple=True, metavar="NAME",
              help="Save a module whole in the adapter, such as lm_head, embed_tokens or norm. NAME"
              " is how its name ends. May be given several times.")  # fmt: skip
@add_moved("--base", MODEL, "the base model of VECTOR, whose config.json is read,")
@click.option("--dtype", default="fp32", show_default=True, metavar="NAME",
              shell_complete=offer("bf16", "fp16", "fp32"),
              help="Dtype of the stored factors: bf16, fp16 or fp32.")  # fmt: skip
@add_device("the factors are")
@add_seed("the random draws of the SVD")
@NONFINITE
@share_options(writes=True, works=False)
def extract_lora(screen: Screen, vector: str, output: str, **options: Any) -> Any:
    """Write a vector as a LoRA adapter for PEFT.

    Every matrix of VECTOR becomes a product of two factors, the closest that their rank allows.
    The report says how much of each tensor is kept, and what is left out: norms, biases,
    embeddings.
    """
    from skillvec import verbs

    report = verbs.extract_lora(vector, output, watcher=screen, **options)
    return report, report.facts["output"]


@main.command()
@click.argument("vector", type=VECTOR)
@click.argument("repo")
@click.option("--private", is_flag=True,
              help="Create the repository as a private one. One that exists already stays as it is,"
              " private or public.")  # fmt: skip
@click.option("--revision", metavar="BRANCH",
              help="Commit to BRANCH in place of main. It is created if it does not exist.",
              )  # fmt: skip
@click.option("--create-pr", is_flag=True,
              help="Open a pull request, and leave the branch as it is.")  # fmt: skip
@click.option("--commit-message", metavar="TEXT", help="Title of the commit, one line.")
@click.option("--license", metavar="NAME",
              help="Licence on the card, such as apache-2.0, where VECTOR itself names none.",
              )  # fmt: skip
@click.option("--token", metavar="TOKEN",
              help="Access token of the Hub. By default the one that `hf auth login` has stored.",
              )  # fmt: skip
@share_options(globs=False, works=False, more="a line for every file",
               until="anything is sent. Shows the card too; needs no token and no network",
               )  # fmt: skip
def push(screen: Screen, vector: str, repo: str, **options: Any) -> Any:
    """Publish a vector or a merged model on the Hub.

    VECTOR is a vector file, or a folder that apply wrote. REPO is org/name; it is created if it
    does not exist. A model card goes with it: base models, licence, exactness, norms, how to apply
    it. What a person wrote on the card stays.
    """
    from skillvec import verbs

    report = verbs.push(vector, repo, watcher=screen, **options)
    return report, report.facts["url"]


@main.command()
@click.argument("repo")
@click.option("-o", "--output", type=click.Path(), metavar="PATH",
              help="File or folder to write. By default the download stays in the Hub's cache.",
              )  # fmt: skip
@click.option("--revision", metavar="NAME",
              help="Branch, tag or commit to download, in place of main.")  # fmt: skip
@click.option("--token", metavar="TOKEN",
              help="Access token of the Hub. By default the one that `hf auth login` has stored.",
              )  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite PATH if it exists.")
@share_options(globs=False, works=False, more="a line for every file",
               until="anything is downloaded")  # fmt: skip
def pull(screen: Screen, repo: str, **options: Any) -> Any:
    """Download a vector or a merged model, and check it.

    REPO is org/name. Sizes and digests of the files that arrive are compared with the Hub's listing
    and with the vector's own header. The output appears only if they agree.
    """
    from skillvec import verbs

    report = verbs.pull(repo, watcher=screen, **options)
    return report, report.facts["output"]


@main.command()
@click.argument("vectors", nargs=-1, required=True, metavar="A B [C ...]", type=VECTOR)
@click.option(
    "--control", metavar="random|VECTOR", type=VECTOR,
    help="Also measure each pair with something else in place of its first vector: the same vector"
    " with the signs of its channels drawn at random, or another VECTOR.",
)  # fmt: skip
@add_reports("the random draws: of --control random and of the SVD of --subspace")
@NONFINITE
@share_options(more="every level: parts, modules, layers and tensors",
               until="any value is read")  # fmt: skip
def orthogonality(screen: Screen, vectors: tuple[str, ...], **options: Any) -> Any:
    """Compare vectors: are they more alike than chance?

    A, B and so on are vector files, or TUNED::BASE, the difference of two models, which needs no
    file. For every pair the report gives the cosine beside what chance would give, the overlap of
    changed weights, and how much of both is explained by rounding to 16 bits. docs/orthogonality.md
    explains every number.
    """
    from skillvec import verbs

    report = verbs.orthogonality(*vectors, watcher=screen, **options)
    cosines = [str(pair["overall"]["cosine"]) for pair in report.facts.get("pairs", [])]
    return report, report.facts.get("output") or "\n".join(cosines) or None


@main.command()
@click.argument("vector", type=VECTOR)
@add_reports("the random draws of the SVD of --subspace")
@NONFINITE
@share_options(until="any value is read")
def norms(screen: Screen, vector: str, **options: Any) -> Any:
    """Measure a vector: where it is large, how much it changes.

    VECTOR is a vector file, or TUNED::BASE, the difference of two models, which needs no file. The
    report gives its norm, the share of values that it changes and, with --against, the effect of
    rounding: by part, module and layer. docs/orthogonality.md explains every number.
    """
    from skillvec import verbs

    report = verbs.norms(vector, watcher=screen, **options)
    measured = [str(entry["overall"]["norm"]) for entry in report.facts.get("norms", [])]
    return report, report.facts.get("output") or "\n".join(measured) or None


@main.command()
@click.argument("path", type=VECTOR)
@click.option("--target", type=MODEL,
              help="Also say whether the vector PATH fits this model: its exact base, the same"
              " family, the same shapes, or not at all.")  # fmt: skip
@click.option("--digest", is_flag=True,
              help="Also read every byte of the model PATH and print the digest of its content,"
              " which is the same however its tensors are ordered and sharded.")  # fmt: skip
@share_options(selects=False)
def inspect(screen: Screen, path: str, **options: Any) -> Any:
    """Say what a model, a vector or a folder is, and what it holds.

    PATH is a model, an adapter, a skill vector or a patch, on this disk, on the Hub or in an object
    store; or a folder of checkpoints, a report, an unfinished run, or a folder of the Hub's cache.
    It is quick whatever the size, because it reads headers alone, unless --digest is given.
    """
    from skillvec import verbs

    report = verbs.inspect(path, watcher=screen, **options)
    return report, report.facts.get("digest") or report.facts["path"]


@main.command()
@click.argument("path", type=VECTOR)
@add_moved("--tuned", MODEL, "the tuned model of a vector")
@add_moved("--base", MODEL, "the base model of a vector")
@add_moved("--target", MODEL, "the target of a merged model")
@add_moved("--vector", VECTOR, "the vector of a merged model")
@click.option("--dry-run", is_flag=True,
              help="Check all inputs by their headers, show the plan, and stop before any value is"
              " read.")  # fmt: skip
@share_options(selects=False)
def verify(screen: Screen, path: str, **options: Any) -> Any:
    """Prove from the disk that a vector or a merged model is right.

    Of a vector it proves that base + VECTOR is the tuned model, or, if it was combined, that it is
    what its vectors give. Of a merged model it proves that it is target + lambda * vector, rounded
    once. Every bit is computed again and compared. The inputs are looked for where they were when
    PATH was made; the options say where they are now.
    """
    from skillvec import verbs

    report = verbs.verify(path, watcher=screen, **options)
    return report, report.facts["path"]


if __name__ == "__main__":
    sys.exit(main())
