"""Vectors weighed by Fisher information: where a recipe names the files, and how they are read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.fisher_files import match_fishers, open_fisher
from skillvec.errors import FormatError, UsageError
from skillvec.ops.delta import Delta
from skillvec.vectors.block_reader import NO_RECORDS, Block
from skillvec.vectors.combining import seen_like
from skillvec.vectors.deltas.base import Decoded
from skillvec.vectors.deltas.computed import ComputedDelta
from skillvec.vectors.deltas.mix import MixDelta
from skillvec.vectors.displacement import Displacement
from skillvec.vectors.recipe import FISHER, FISHER_DIGEST, Recipe


@dataclass(frozen=True, slots=True, repr=False)
class FisherInformation(ComputedDelta):
    """What weighs the values of a delta, read behind it: a tensor of mean squares of `ref`."""

    def read(self, block: Block, role: str) -> Decoded:
        found = Delta(block.read(role, self.source), self.source.dtype)
        values = found.wide(0, block.size)
        if wrong := int(np.count_nonzero(~((values >= 0) & (values < np.inf)))):
            raise FormatError(
                f"fisher {self.ref}: {self.source.name}: {wrong} values from position {block.begin}"
                " on are negative or not finite, which no Fisher information is"
            )
        return found, NO_RECORDS


def open_fishers(recipe: Recipe) -> tuple[tuple[Checkpoint, ...], Recipe]:
    """Return the file of each vector, opened, and the recipe with their places and digests.

    A list of files in the recipe's own parameters is one for each vector. Raises UsageError where
    there is none for a vector, VerificationError for another file than the one of the digest.
    """
    given, files, shares = dict(recipe.parameters), [], []
    listed = given.pop(FISHER, "")
    listed = listed if isinstance(listed, list | tuple) else [listed] * len(recipe.shares)
    if len(listed) != len(recipe.shares):
        raise UsageError(f"fisher: {len(recipe.shares)} vectors, but {len(listed)} files")
    for share, file in zip(recipe.shares, listed, strict=True):
        said = {FISHER: file, FISHER_DIGEST: "", **given, **share.parameters}
        if not isinstance(said[FISHER] or None, str | os.PathLike):
            raise UsageError(
                f"fisher: no file of Fisher information for {share.vector}: name one for each"
                " vector, in their order (--param fisher=FILE for each, or the key in a recipe)"
            )
        if any({FISHER, FISHER_DIGEST} & set(rule.parameters) for rule in share.rules):
            raise UsageError(f"fisher: {share.vector} has one file, which no rule can change")
        opened, digest = open_fisher(said[FISHER], said[FISHER_DIGEST])
        files.append(opened)
        said = {**share.parameters, FISHER: opened.ref, FISHER_DIGEST: digest}
        shares.append(replace(share, parameters=said))
    return tuple(files), replace(recipe, shares=tuple(shares), parameters=given)


def weigh_by(
    files: Sequence[Checkpoint], parts: Sequence[Displacement], deltas: dict[str, MixDelta]
) -> dict[str, MixDelta]:
    """Return combinations with the Fisher information of each of their vectors behind these.

    What no vector changes needs none. Raises IncompatibleError where a file does not fit.
    """
    still = {name for name, delta in deltas.items() if all(part.is_zero for part in delta.parts)}
    shapes = {name: delta.spec.shape for name, delta in deltas.items()}
    untied = {head: of for part in parts for head, of in part.untied.items()}
    found = match_fishers([seen_like(file, parts[0]) for file in files], shapes, untied, still)
    refs = [file.ref for file in files]
    weighed = {}
    for name, delta in deltas.items():  # zeros are weighed by zeros
        beside = map(FisherInformation, found[name], refs) if name in found else delta.sources
        weighed[name] = replace(delta, sources=(*delta.sources, *beside))
    return weighed
