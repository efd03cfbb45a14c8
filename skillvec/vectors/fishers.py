"""Diagonal Fisher information beside vectors: files that say how much each value counts.

Hides where a recipe names the files, how they are known again, and that their tensors may be laid
out in another way than those of the vectors. The values are checked where they are read.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.fingerprint import probe_digest
from skillvec.checkpoints.locate import locate, relocate
from skillvec.checkpoints.opening import open_tensors
from skillvec.errors import IncompatibleError, UsageError, VerificationError, up_to_five_each
from skillvec.files.tensors import Source
from skillvec.ops.kernels import FLOATS
from skillvec.ops.merge_methods import OPERATORS
from skillvec.vectors.combining import seen_like
from skillvec.vectors.deltas.mix import MixDelta
from skillvec.vectors.displacement import Displacement
from skillvec.vectors.recipe import FISHER, FISHER_DIGEST, Recipe, Share


def open_fishers(recipe: Recipe) -> tuple[list[Checkpoint], Recipe]:
    """Return the file of each vector, opened, and the recipe with their places and digests.

    Raises UsageError where the recipe names none for a vector, VerificationError for another file
    than the one whose digest it has.
    """
    files, shares = [], []
    for share in recipe.shares:
        opened, digest = _open(share, recipe)
        files.append(opened)
        said = {**share.parameters, FISHER: opened.ref, FISHER_DIGEST: digest}
        shares.append(replace(share, parameters=said))
    rest = {k: v for k, v in recipe.parameters.items() if k not in (FISHER, FISHER_DIGEST)}
    return files, replace(recipe, shares=tuple(shares), parameters=rest)


def _open(share: Share, recipe: Recipe) -> tuple[Checkpoint, str]:
    given = {**recipe.parameters, **share.parameters}
    ref, known = given.get(FISHER), given.get(FISHER_DIGEST)
    if not isinstance(ref, str) or not ref:
        raise UsageError(
            f"fisher: no file of Fisher information for {share.vector}: name one for each vector,"
            " in their order (--param fisher=FILE for each, or the key in a recipe)"
        )
    if any({FISHER, FISHER_DIGEST} & set(rule.parameters) for rule in share.rules):
        raise UsageError(f"fisher: {share.vector} has one file, which no rule can change")
    opened = open_tensors(relocate(ref, FISHER) if known else locate(ref, FISHER), FISHER)
    digest = probe_digest(opened)
    if known and known != digest:
        raise VerificationError(
            f"fisher {ref}: this is not the file that the combination was made with: expected the"
            f" digest {known:.40}, found {digest}"
        )
    return opened, digest


def weigh_by(
    files: Sequence[Checkpoint], parts: Sequence[Displacement], deltas: dict[str, MixDelta]
) -> dict[str, MixDelta]:
    """Return combinations with the Fisher information of each of their vectors.

    What no vector changes needs none. Raises IncompatibleError for tensors that a file lacks, or
    has in another shape or as integers.
    """
    untied = {head: of for part in parts for head, of in part.untied.items()}
    held = [seen_like(file, parts[0]) for file in files]
    problems: dict[str, list[str]] = defaultdict(list)
    weighed: dict[str, MixDelta] = {}
    for name, delta in deltas.items():
        found = [tensors.get(name) or tensors.get(untied.get(name, "")) for tensors in held]
        if None in found and all(part.is_zero for part in delta.parts):
            plain = replace(delta, operator=OPERATORS["linear"], parameters=({},) * len(files))
            weighed[name] = plain
            continue
        for file, source in zip(files, found, strict=True):
            if problem := _problem(source, delta.spec):
                problems[kind := f"{problem} in {file.ref}"].append(f"{name}: {kind}")
        weighed[name] = replace(delta, fishers=tuple(source for source in found if source))
    if problems:
        raise IncompatibleError(
            f"Fisher information does not match the vectors:\n{up_to_five_each(problems)}"
        )
    return weighed


def _problem(source: Source | None, wanted: Source) -> str:
    if source is None:
        return "not"
    if source.dtype not in FLOATS:
        return f"{source.dtype}, expected floating point,"
    if tuple(source.shape) != tuple(wanted.shape):
        return f"{list(source.shape)}, expected {list(wanted.shape)},"
    return ""
