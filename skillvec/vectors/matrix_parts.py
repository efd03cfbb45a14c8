"""Operators on whole matrices: each vector's deltas as what such an operator takes of them.

`spectral` and `project` differ in the product that is taken out of a matrix, and add up what is
left of each vector. A file of moments is named by path, as vectors are, and known by its digest,
which goes into the recipe: a combination is not made again with another one.
"""

import os
from collections.abc import Mapping
from typing import Any

from skillvec.checkpoints.input_moments import Moments, open_moments
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.files.header import TensorSpec
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.deltas.factored import CoarseDelta, stack_numel
from skillvec.vectors.deltas.low_rank import LowRankDelta, Subspace
from skillvec.vectors.deltas.mix import mixes_in
from skillvec.vectors.deltas.stored import zero_delta
from skillvec.vectors.recipe import Recipe, parse_recipe

PATH, DIGEST = "moments", "moments_digest"


class MatrixParts:
    """What an operator on matrices takes of each delta; files of moments are opened once."""

    def __init__(self) -> None:
        self._moments: dict[str, tuple[Moments, str]] = {}  # with their digests
        self._wrong: list[str] = []

    def take(
        self, name: str, source: DeltaSource, given: Mapping[str, Any], origin: str
    ) -> tuple[DeltaSource, dict[str, Any]]:
        """Return what is taken of a vector's delta, and what tells this from other tensors."""
        shape, said = source.spec.shape, dict(given)
        inside, subspace = given.get("part") == "head" or "bits" in given, None
        if PATH in given:
            moments = self._opened(given)
            if name not in moments.weights:
                return source, said
            said["input"], side = moments.weights[name]
            if wrong := moments.misfit(name, shape):
                self._wrong.append(f"{wrong}, by {moments.path}")
                return source, said
            subspace = Subspace(moments.path, moments.inputs[said["input"]].second, side)
        elif len(shape) < 2:
            drops = given["others"] == "drop" or (given["others"] == "split" and not inside)
            return zero_delta(name, shape) if drops else source, said
        rank, energy, rescale = given["rank"], given.get("energy", 0.0), given.get("rescale", False)
        if source.is_zero or given.get("part") == "whole" or not (rank or energy):
            return source, said
        spec = TensorSpec(name, "F64", shape, "", 0, 0)
        if "bits" in given:
            if stack_numel(shape, rank) >= spec.numel:
                return source, said
            sides = origin, rank, energy, inside, rescale, subspace
            coarse = CoarseDelta(source, spec._replace(dtype="F32"), *sides, None, given["bits"])
            return coarse, said | {"bits": 23}  # the factors have them, not the product
        return LowRankDelta(source, spec, origin, rank, energy, inside, rescale, subspace), said

    def check(self) -> None:
        """Raise IncompatibleError where a file of moments is that of another model."""
        if self._wrong:
            raise IncompatibleError(
                f"moments of other shapes than the vectors:\n{up_to_five(self._wrong)}"
            )

    def _opened(self, given: Mapping[str, Any]) -> Moments:
        path = given[PATH]
        if path not in self._moments:
            opened = _open(path)
            self._moments[path] = opened, opened.digest
        found, digest = self._moments[path]
        if given[DIGEST] not in ("", digest):
            raise IncompatibleError(
                f"moments {path}: digest {digest}, expected {given[DIGEST]}: it is another file"
                " than the one that this combination was made with"
            )
        return found


def _open(path: str) -> Moments:
    place = os.path.expanduser(path)
    if not os.path.isfile(place):
        raise UsageError(
            f"moments {path}: no such file. It is named as vectors are: from the folder in which"
            " skillvec runs, wherever a recipe lies"
        )
    return open_moments(place)


def with_digests(recipe: Recipe) -> Recipe:
    """Return a recipe that says of each file of moments which one is meant."""

    def told(said: Any) -> Any:
        if isinstance(said, list):
            return [told(item) for item in said]
        if not isinstance(said, dict):
            return said
        path = said.get(PATH)
        known = not (path and isinstance(path, str)) or said.get(DIGEST)
        more = {} if known else {DIGEST: _open(said[PATH]).digest}
        return {key: told(value) for key, value in said.items()} | more

    return parse_recipe(told(recipe.to_dict())) if recipe.op == "project" else recipe


def without_places(said: Any) -> Any:
    """Return what a recipe says short of where files of moments lie, which their digests name."""
    if isinstance(said, Mapping):
        return {k: without_places(v) for k, v in said.items() if k != PATH or DIGEST not in said}
    return [without_places(item) for item in said] if isinstance(said, list) else said


def list_unprojected(deltas: Mapping[str, DeltaSource], recipe: Recipe) -> list[str]:
    """Return a warning that names the matrices of a projection that no moments are known of.

    Raises IncompatibleError where they are all.
    """
    mixes = [mix for mix in mixes_in(deltas.values()) if len(mix.spec.shape) > 1 and mix.spec.numel]
    unknown = [
        mix.spec.name for mix in mixes if not any("input" in given for given in mix.parameters)
    ]
    if recipe.op != "project" or not unknown:
        return []
    said = f"nothing is known of the inputs of {len(unknown)} of {len(mixes)} matrices"
    if len(unknown) == len(mixes):
        raise IncompatibleError(f"{said}: are the moments of this model?\n{up_to_five(unknown)}")
    return [f"{said}, which are kept whole:\n{up_to_five(unknown)}"]
