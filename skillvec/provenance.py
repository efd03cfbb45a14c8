"""Where a model or a vector came from, in words that open it again.

Hides the recipe in a merged model's header and in a combination's manifest: written by apply and
save, checked and followed by verify.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from skillvec import hub
from skillvec.checkpoint import METADATA_KEY, Checkpoint, relocate
from skillvec.errors import FormatError, UsageError, VerificationError
from skillvec.merging import OPERATORS
from skillvec.quantised import LeftOut, nothing_left_out
from skillvec.rules import Recipe, parse_recipe
from skillvec.storage import refuse_duplicates
from skillvec.vector import SkillVector
from skillvec.vectorfile import CHOSEN as SELECTION
from skillvec.vectorfile import check_shape


def described(vector: SkillVector) -> dict[str, Any]:
    """Return what a recipe says of a vector: refs and digests, and how it is combined."""
    if vector.stored is not None:
        return {"ref": vector.ref, "digest": vector.stored.digest}
    if vector.recipe is not None:
        parts = [described(part) for part in vector.parts]
        return {"recipe": vector.recipe.to_dict(), "parts": parts}
    if vector.tuned is None:
        said = {"ref": vector.ref, "digest": vector.manifest["identity"]}
        return said | {key: vector.manifest[key] for key in ("rename",) if key in vector.manifest}
    assert vector.base is not None
    sides = {"tuned": vector.tuned.ref, "base": vector.base.ref}
    chosen = {key: vector.manifest[key] for key in CHOSEN if key in vector.manifest}
    return sides | {key: value for key, value in chosen.items() if value not in ("auto", [])}


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
        vectors = [share | {"vector": ""} for share in said["recipe"]["vectors"]]
        return said["recipe"] | {"vectors": vectors}, [digests_of(part) for part in said["parts"]]
    return said.get("digest")


NUMBER = int | float
RECIPE = {
    "kind": str, "schema": int, "target": {"ref": str}, "vector": {...: ...}, "lam": NUMBER,
    "request": {"lam": NUMBER, "dtype": str | None, "rounding": str, "seed": int,
                "include": [str], "exclude": [str]},
}  # fmt: skip
SOURCES: list[dict[Any, Any]] = [
    {"ref": str, "digest": str}, {"tuned": str, "base": str},
    {"recipe": {"vectors": [{"vector": str}]}, "parts": [{...: ...}]},
]  # fmt: skip
CHOSEN: dict[Any, Any] = {"dtype": str} | SELECTION  # by who subtracts


def _check_source(said: dict[str, Any], depth: int = 0) -> None:
    shape = next((shape for shape in SOURCES if set(shape) <= set(said)), None)
    if shape is None or depth > 1 or set(said) - set(shape) - set(CHOSEN):
        raise ValueError("no vector")
    check_shape(said, shape | {key: CHOSEN[key] for key in CHOSEN if key in said}, "vector")
    parts = said.get("parts", ())
    if "parts" in said and len(parts) != len(said["recipe"]["vectors"]):
        raise ValueError("another number of vectors")
    for part in parts:
        _check_source(part, depth + 1)


def read_merged(opened: Checkpoint) -> dict[str, Any]:
    try:
        recipe = json.loads(opened.metadata[METADATA_KEY], object_pairs_hook=refuse_duplicates)
        check_shape(recipe, RECIPE, "recipe")
        known = SELECTION | {"allow_nonfinite": bool}
        said = {key: known[key] for key in known if key in recipe["request"]}
        check_shape(recipe["request"], said, "request")
        if recipe["kind"] != "merged" or recipe["schema"] != 1:
            raise ValueError("another kind or schema")
        _check_source(recipe["vector"])
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UsageError(
            f"{opened.ref}: neither a skill vector nor written by skillvec apply (no recipe in its"
            " header), so there is nothing to verify it against"
        ) from None
    return dict(recipe)


def command_words(vector: SkillVector) -> tuple[str, list[str]]:
    """Return the command that gives this vector, short of how it is stored."""
    manifest, recipe = vector.manifest, vector.recipe
    if recipe is not None:
        if any(share.rules or share.parameters or not isinstance(share.weight, float)
               for share in recipe.shares):  # fmt: skip
            return "combine", ["--recipe", "RECIPE"]  # the manifest holds it
        words = [f"{share.vector}={share.weight!r}" for share in recipe.shares]
        params = [f"{name}={value}" for name, value in recipe.parameters.items()]
        return "combine", [*words, *flags(op=recipe.op, param=params, seed=recipe.seed)]
    if vector.stored is not None:
        return "combine", [vector.ref]
    if vector.tuned is None:
        return "diff", [manifest["parents"][0]["ref"], manifest["base"]["ref"]]
    sides = [manifest["tuned"]["ref"], manifest["base"]["ref"]]
    if vector.tuned.kind == "patch":
        return "import-patch", sides
    return "diff", [*sides, *flags(**{key: manifest[key] for key in CHOSEN if key in manifest})]


def flags(**options: Any) -> list[str]:
    """Return options as words of a command line."""
    return [
        word
        for key, value in options.items()
        for item in (value if isinstance(value, list | tuple) else [value])
        for word in (f"--{key.replace('_', '-')}", *([] if item is True else [str(item)]))
    ]


def opened_parents(manifest: dict[str, Any], recipe: Recipe) -> list[SkillVector]:
    """Return the vectors that a stored combination was made of, from where its manifest says.

    The recipe has them as they were written, the parents as they were found: on the Hub, at which
    commit, or on the disk. Raises FormatError where these are not the same.
    """
    parts, parents = [], manifest["parents"]
    if len(recipe.shares) != len(parents):
        raise FormatError(f"{manifest['formula']:.200}: recipe and parents are not of one number")
    for share, parent in zip(recipe.shares, parents, strict=True):
        if parent["manifest"] is None and parent["tuned"]:  # a difference that was not stored
            chosen = {key: parent[key] for key in CHOSEN if key in parent}
            tuned, base = (relocate(parent[side], side) for side in ("tuned", "base"))
            parts.append(SkillVector.between(tuned, base, **chosen))
            continue
        sides = share.vector.split("::"), parent["ref"].split("::")
        if len(sides[0]) != len(sides[1]) or not all(
            ref in (said, f"./{said}") or hub.may_be(ref, said)
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
