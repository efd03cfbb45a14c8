"""combine: several vectors merged into one."""

import os
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from skillvec.engine.outputs import PathLike
from skillvec.errors import UsageError
from skillvec.ops.merge_methods import OPERATORS, Operator, check_parameters
from skillvec.vectors.provenance import opened_parents
from skillvec.vectors.recipe import Recipe, Share, parse_recipe, read_recipe
from skillvec.vectors.vector import SkillVector
from skillvec.verbs._save import save


def combine(
    *vectors: PathLike | SkillVector,
    weights: Sequence[float] | None = None,
    op: str | Operator = "linear",
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    recipe: PathLike | Mapping[str, Any] | None = None,
    output: PathLike | None = None,
    **options: Any,
) -> SkillVector:
    """Merge `vectors` by an operator of docs/operators.md, or by an Operator of your own.

    `weights` are 1 if not given, `op` the operator's name, `parameters` its numbers (such as
    `{"density": 0.5}` of ties), `seed` of those that draw at random. `recipe`, a YAML or JSON file
    or its content, names vectors, weights per tensor and layer, and operator instead; a stored
    combination gives its own. The parameter `fisher` of that operator is a list of files, one for
    each vector. Values are merged in fp32 (fp64 where an input is). Without `output` the result is
    computed where it is used; with, it is stored, and `options` are those of SkillVector.save.

    Raises UsageError for parameters out of range, IncompatibleError where names or shapes differ.
    """
    if recipe is not None:
        if vectors or weights or parameters or seed or op != "linear":
            raise UsageError("a recipe names vectors, weights, operator and seed: give it alone")
        made, parts = _of_recipe(recipe)
    else:
        parts = [SkillVector.open(vector) for vector in vectors]
        name = op if isinstance(op, str) else op.name
        made = Recipe(name, _weighted(parts, weights), dict(parameters or {}), seed)
    operator = _operator_of(op, made)
    first = made.shares[0]
    plain = made.op == "linear" and isinstance(first.weight, float) and not first.rules
    if output is None and options:
        raise TypeError(f"combine: {', '.join(options)} is of no use without output")
    if len(parts) == 1 and plain:
        check_parameters(made.op, {**made.parameters, **first.parameters})  # it takes none
        vector = parts[0] * first.weight
    else:
        vector = SkillVector.combined(parts, made, operator)
    return vector if output is None else save(vector, output, **options)


def _of_recipe(recipe: PathLike | Mapping[str, Any]) -> tuple[Recipe, list[SkillVector]]:
    """Return what a recipe says, and the vectors that it names, opened."""
    if not isinstance(recipe, Mapping) and os.fspath(recipe).endswith(".safetensors"):
        manifest = SkillVector.open(recipe).manifest
        if manifest["recipe"] is None:
            raise UsageError("recipe: this vector is no combination")
        made = parse_recipe(manifest["recipe"])
        return made, opened_parents(manifest, made)
    made = parse_recipe(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)
    return made, [SkillVector.open(share.vector) for share in made.shares]


def _weighted(parts: Sequence[SkillVector], weights: Sequence[float] | None) -> tuple[Share, ...]:
    """Return the shares of vectors, 1 each where nothing else is given."""
    if not parts:
        raise UsageError("expected at least one vector, found none")
    weights = [1.0] * len(parts) if weights is None else weights
    if not all(map(isfinite, weights)):
        raise UsageError(f"weights {', '.join(map(str, weights))}: expected finite numbers")
    if len(weights) != len(parts):
        raise UsageError(f"{len(parts)} vectors, but {len(weights)} weights")
    return tuple(Share(p.ref, float(w)) for p, w in zip(parts, weights, strict=True))


def _operator_of(op: str | Operator, recipe: Recipe) -> Operator | None:
    """Return the operator that a user brings, None where the recipe names one of skillvec's."""
    if not isinstance(op, str):
        if op.name in OPERATORS and op is not OPERATORS[op.name]:
            raise UsageError(f"op: {op.name} is the name of an operator of skillvec: take another")
        return op
    if recipe.op not in OPERATORS:
        raise UsageError(f"op {recipe.op!r}: expected one of {', '.join(OPERATORS)}")
    return None
