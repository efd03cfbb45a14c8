"""Where a model or a vector came from, in words that open it again.

Hides the recipe in a merged model's header and in a combination's manifest: written by apply and
save, checked and followed by verify.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from skillvec.checkpoints.checkpoint import METADATA_KEY, Checkpoint
from skillvec.checkpoints.locate import relocate
from skillvec.checkpoints.unread import LeftOut, nothing_left_out
from skillvec.errors import FormatError, UsageError, VerificationError
from skillvec.files.header import refuse_duplicates
from skillvec.files.typed_json import check_json
from skillvec.ops.merge_methods import OPERATORS
from skillvec.remote.references import may_be
from skillvec.vectors.kinds import TAKEN
from skillvec.vectors.manifest import Manifest, Selection
from skillvec.vectors.recipe import Recipe, parse_recipe, unplaced
from skillvec.vectors.vector import SkillVector


def reopened(
    said: dict[str, Any], places: Mapping[str, Any] | None = None,
    left_out: LeftOut = nothing_left_out, rename: Sequence[str] = (),
) -> SkillVector:  # fmt: skip
    """Return the vector that a recipe describes.

    `places` says where its sides are now, `left_out` is as of SkillVector.between, `rename` of
    SkillVector.open.
    """
    if "ref" in said:
        return _found(said["ref"], "--vector", said.get("rename", ()), rename)
    if "recipe" not in said:
        given = dict(places or {})
        sides: dict[str, Any] = {
            side: relocate(said[side], side, f"--{side}" if given else "--vector")
            for side in ("tuned", "base") if given.get(side) is None
        }  # fmt: skip
        return SkillVector.between(**said | given | sides, left_out=left_out)
    recipe = parse_recipe(said["recipe"])
    if recipe.op not in OPERATORS:
        raise UsageError(f"made by the operator {recipe.op}, which is not skillvec's: pass vector")
    return SkillVector.combined([reopened(part) for part in said["parts"]], recipe)


def _found(
    ref: str, option: str = "", rename: Sequence[str] = (), spare: Sequence[str] = ()
) -> SkillVector:
    """Return the vector, or the adapter and its base, that a record names.

    `rename` was applied when it was opened, `spare` is what may be.
    """
    tuned, _, base = ref.partition("::")
    if not base:
        return SkillVector.open(relocate(ref, "vector", option), rename=spare)
    sides = relocate(tuned, "tuned", option), relocate(base, "base", option)
    return SkillVector.between(*sides, rename=rename)


def digests_of(said: dict[str, Any]) -> Any:
    """Return what makes two descriptions of a vector the same, wherever its files lie."""
    if "recipe" in said:
        vectors = [unplaced(share) for share in said["recipe"]["vectors"]]
        return said["recipe"] | {"vectors": vectors}, [digests_of(part) for part in said["parts"]]
    return said.get("digest")


class Target(TypedDict):
    ref: str


class Named(TypedDict):
    vector: str


class Shares(TypedDict):
    vectors: list[Named]  # a recipe, of which `recipe` checks the rest


class ApplyRequest(Selection):
    """What was asked of apply."""

    lam: int | float
    dtype: str | None
    rounding: str
    seed: int
    allow_nonfinite: NotRequired[bool]


class Merged(TypedDict):
    """The recipe in a merged model's header."""

    kind: str
    schema: int
    target: Target
    vector: dict[str, Any]  # one of SOURCES
    lam: int | float
    request: ApplyRequest


class Taken(TypedDict, total=False):
    """What who subtracts has chosen."""

    dtype: str
    include: list[str]
    exclude: list[str]
    rename: list[str]
    rows: str


class ByDigest(Taken):
    """A vector in a file, or an adapter."""

    ref: str
    digest: str


class ByPair(Taken):
    """Two checkpoints."""

    tuned: str
    base: str


class ByParts(Taken):
    """A combination."""

    recipe: Shares
    parts: list[dict[str, Any]]


SOURCES: tuple[Any, ...] = (ByDigest, ByPair, ByParts)


def _check_source(said: dict[str, Any], depth: int = 0) -> None:
    kind = next((kind for kind in SOURCES if kind.__required_keys__ <= set(said)), None)
    if kind is None or depth > 1 or set(said) - kind.__required_keys__ - kind.__optional_keys__:
        raise ValueError("no vector")
    check_json(said, kind, "vector")
    parts = said.get("parts", ())
    if "parts" in said and len(parts) != len(said["recipe"]["vectors"]):
        raise ValueError("another number of vectors")
    for part in parts:
        _check_source(part, depth + 1)


def read_merged(opened: Checkpoint) -> dict[str, Any]:
    try:
        recipe = json.loads(opened.metadata[METADATA_KEY], object_pairs_hook=refuse_duplicates)
        check_json(recipe, Merged, "recipe")
        if recipe["kind"] != "merged" or recipe["schema"] != 1:
            raise ValueError("another kind or schema")
        _check_source(recipe["vector"])
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UsageError(
            f"{opened.ref}: neither a skill vector nor written by skillvec apply (no recipe in its"
            " header), so there is nothing to verify it against"
        ) from None
    return dict(recipe)


def opened_parents(manifest: Manifest, recipe: Recipe) -> list[SkillVector]:
    """Return the vectors that a stored combination was made of, from where its manifest says.

    The recipe has them as they were written, the parents as they were found: on the Hub, at which
    commit, or on the disk. Raises FormatError where these are not the same.
    """
    parts, parents = [], manifest["parents"]
    if len(recipe.shares) != len(parents):
        raise FormatError(f"{manifest['formula']:.200}: recipe and parents are not of one number")
    for share, parent in zip(recipe.shares, parents, strict=True):
        if parent["manifest"] is None and parent["tuned"]:  # a difference that was not stored
            chosen: dict[str, Any] = {key: parent.get(key) for key in TAKEN if key in parent}
            tuned, base = relocate(parent["tuned"], "tuned"), relocate(parent["base"], "base")
            parts.append(SkillVector.between(tuned, base, **chosen))
            continue
        sides = share.vector.split("::"), parent["ref"].split("::")
        if len(sides[0]) != len(sides[1]) or not all(
            ref in (said, f"./{said}") or may_be(ref, said)
            for said, ref in zip(*sides, strict=True)
        ):
            raise FormatError(
                f"the recipe names {share.vector:.200}, its parent {parent['ref']:.200}: which?"
            )
        parts.append(_found(parent["ref"], rename=parent.get("rename", ())))
    return parts


def parents_of(vector: SkillVector, tuned: Any = None, base: Any = None) -> SkillVector:
    """Return a stored combination made again from its parents, where they are what they were.

    `tuned` and `base` are where those of an adapter's vector are, if not where they were.
    """
    manifest = vector.manifest
    if manifest["recipe"] is None and len(manifest["parents"]) == 1:  # an adapter
        (parent,) = manifest["parents"]
        again = SkillVector.between(
            relocate(parent["ref"], "tuned", "--tuned") if tuned is None else tuned,
            relocate(parent["base"], "base", "--base") if base is None else base,
            rename=parent.get("rename", ()),
        )
        if again.manifest["identity"] != parent["identity"]:
            raise VerificationError(
                f"{again.ref} is not the adapter that {vector.ref} was made from"
            )
        return again
    if manifest["recipe"] is None:
        raise UsageError(f"{vector.ref}: no recipe in its manifest to make it again from")
    recipe = parse_recipe(manifest["recipe"])
    if recipe.op not in OPERATORS:
        raise UsageError(f"{vector.ref}: made by the operator {recipe.op}, which is not skillvec's")
    parts = opened_parents(manifest, recipe)
    for part, parent in zip(parts, manifest["parents"], strict=True):
        if part.manifest["identity"] != parent["identity"]:
            raise VerificationError(f"{part.ref} is not the vector that {vector.ref} was made from")
    return SkillVector.combined(parts, recipe)
