"""Several vectors brought to one layout and merged: deltas, names and what the manifest says.

Tensors that no rule brings over stay under their names, and what only some of the vectors have is
refused, unless it was left out there on purpose.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from skillvec.checkpoints.align import bridged, left_over
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.layouts import viewed_specs
from skillvec.errors import IncompatibleError, up_to_five_each
from skillvec.files.file import digest_bytes
from skillvec.files.header import TensorSpec
from skillvec.files.tensors import Source
from skillvec.files.views import View, whole
from skillvec.ops.merge_methods import OPERATORS, Operator, check_parameters, check_weights
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.deltas.low_rank import low_rank_in
from skillvec.vectors.deltas.mix import MixDelta
from skillvec.vectors.deltas.stored import zero_delta
from skillvec.vectors.deltas.view import ViewDelta
from skillvec.vectors.displacement import Displacement
from skillvec.vectors.idle import is_idle_buffer
from skillvec.vectors.manifest import CHOSEN, SCHEMA, Manifest, Parent, TensorEntry
from skillvec.vectors.matrix_parts import MatrixParts, without_places
from skillvec.vectors.recipe import Recipe, resolve, unplaced

AnyVector = TypeVar("AnyVector", bound=Displacement)


def mix(parts: Sequence[Displacement], recipe: Recipe, operator: Operator) -> dict[str, MixDelta]:
    """Return the deltas of vectors of one layout, merged by an operator, by name."""
    names = _common_names(parts)
    shares = resolve(recipe, names)
    deltas: dict[str, MixDelta] = {}
    known = recipe.op in OPERATORS and operator is OPERATORS[recipe.op]
    origins = tuple(part.digest or part.ref for part in parts)
    taken = MatrixParts() if getattr(operator, "of_matrices", False) else None
    for name in names:
        held = [part.deltas.get(name) for part in parts]
        shape = next(delta.spec.shape for delta in held if delta is not None)
        absent = zero_delta(name, shape)
        sources = tuple(delta or absent for delta in held)
        weights, parameters = zip(*shares[name], strict=True)
        if known:
            check_weights(recipe.op, weights)
            parameters = tuple(check_parameters(recipe.op, given) for given in parameters)
        wide = any(source.dtype == "F64" for source in sources)
        if taken is not None:
            # what counts for nothing is not looked at
            used = (s if w else absent for s, w in zip(sources, weights, strict=True))
            each = zip(used, parameters, origins, strict=True)
            sources, parameters = zip(*(taken.take(name, *one) for one in each), strict=True)
        deltas[name] = MixDelta(
            TensorSpec(name, "F64" if wide else "F32", shape, "", 0, 0),
            sources,
            weights,
            parameters,
            operator,
            tuple(part.manifest["identity"] for part in parts),
            origins,
            recipe.seed,
        )
    if taken is not None:
        taken.check()
    return deltas


def lend_heads(parts: Sequence[AnyVector]) -> list[AnyVector]:
    """Return vectors with deltas of the heads that any of them unties.

    On a base that ties a head, one that says nothing of it changes it with the embedding.
    """
    untied = {head: of for part in parts for head, of in part.untied.items()}
    tying = {part.manifest["base"]["config"] for part in parts if part.untied} - {None}
    made = []
    for part in parts:
        if part.manifest["base"]["config"] in tying:
            lent = {h: part.deltas[of] for h, of in untied.items() if of in part.deltas}
            part = replace(part, deltas=lent | dict(part.deltas))
        made.append(part)
    return made


def align_vectors(vectors: Sequence[AnyVector]) -> list[AnyVector]:
    """Return vectors in the layout of the first: seen through views where theirs is another.

    Tensors that no rule brings over stay under their names, for the caller to refuse.
    """
    first, *others = vectors
    return [first, *(_aligned(other, first) for other in others)]


def seen_like(model: Checkpoint, vector: Displacement) -> Checkpoint:
    """Return a model under the names and in the shapes of a vector; what is left keeps its own."""
    found = bridged(model, _specs(vector), [model.config, _config_of(vector)], (), "strict")
    if found is None:
        return model
    left = {name: model[name] for name in found.unused}
    return model.with_tensors(left | viewed_specs(found, model))


def _specs(vector: Displacement) -> dict[str, Source]:
    return {name: delta.spec for name, delta in vector.deltas.items()}


def _config_of(vector: Displacement) -> Mapping[str, Any]:
    """Return what is known of the config of a vector's base."""
    base = vector.open_base()
    if base is not None and base.config:
        return base.config
    return {"model_type": vector.manifest["base"]["model_type"]}


def _aligned(vector: AnyVector, first: Displacement) -> AnyVector:
    mine, wanted = _specs(vector), _specs(first)
    found = bridged(mine, wanted, [_config_of(first), _config_of(vector)], (), "strict")
    if found is None:
        return vector
    deltas, places = move_deltas(vector, found.views)
    deltas |= {name: vector.deltas[name] for name in left_over(found, vector.ref, mine, wanted)}
    entries: dict[str, TensorEntry] = {}
    stated = vector.manifest.get("tensors", {})
    for name, delta in deltas.items():
        own = found.views[name].sources if name in found.views else [name]
        if not own or delta is not vector.deltas[own[0]]:
            lost = sum(stated[part].get("nonfinite", 0) for part in own if part in stated)
            entries[name] = _viewed_entry(name, delta.spec, lost)
        elif own[0] in stated:
            entries[name] = stated[own[0]]
    manifest = vector.manifest.copy()
    if stated:
        manifest["tensors"] = entries
    if moved := {head: places.get(of, of) for head, of in vector.untied.items()}:
        manifest["untied"] = moved
    return replace(vector, deltas=deltas, manifest=manifest, notes={**vector.notes, **found.notes})


def move_deltas(
    vector: Displacement, views: Mapping[str, View]
) -> tuple[dict[str, DeltaSource], dict[str, str]]:
    """Return deltas seen through views, by the views' names, and where whole ones have gone."""
    deltas: dict[str, DeltaSource] = {}
    places: dict[str, str] = {}
    for name, view in views.items():
        (source, *others) = view.sources or (None,)
        if source and not others and view == whole(source, vector.deltas[source].spec.shape):
            deltas[name], places[source] = vector.deltas[source], name
        else:
            deltas[name] = viewed_delta(name, view, vector)
    return deltas, places


def _viewed_entry(name: str, spec: Source, nonfinite: int) -> TensorEntry:
    """Return what there is to say of a delta that is seen through a view: no digest, no sides."""
    said = {"dtype": spec.dtype, "shape": list(spec.shape), "codec": "view", "digest": name,
            "base": None, "tuned": None, "nonfinite": nonfinite}  # fmt: skip
    return said  # type: ignore[return-value]  # what is counted of a file is not known of views


def viewed_delta(name: str, view: View, vector: Displacement) -> ViewDelta:
    """Return a delta of another layout: `view` is of names of the vector's own.

    Raises IncompatibleError where that vector has to be measured first.
    """
    boxes = tuple(box._replace(source=vector.deltas[box.source]) for box in view.boxes)
    if any(b.source.passes or any(low_rank_in([b.source])) for b in boxes):
        raise IncompatibleError(
            f"{name}: the target has another layout, and {vector.ref} must be measured in its own:"
            " store the combination first (skillvec combine -o)"
        )
    wide = any(box.source.dtype == "F64" for box in boxes)
    spec = TensorSpec(name, "F64" if wide else "F32", view.shape, "", 0, 0)
    return ViewDelta(spec, View(view.shape, boxes))


def _common_names(parts: Sequence[Displacement]) -> list[str]:
    """Return the names of all vectors, or refuse what does not match."""
    for part in parts:
        if problem := part.part_problem():
            raise problem
    names = list(dict.fromkeys(name for part in parts for name in part.deltas))
    held = {name: [part.deltas[name] for part in parts if name in part.deltas] for name in names}
    names = [
        name for name in names
        if len(held[name]) == len(parts) or not all(is_idle_buffer(name, d) for d in held[name])
    ]  # fmt: skip
    problems = defaultdict(list)
    for name in names:
        shapes = [part.deltas[name].spec.shape for part in parts if name in part.deltas]
        if len(set(shapes)) > 1:
            said = f"{name}: " + ", ".join(str(list(shape)) for shape in shapes)
            problems["of different shapes"].append(said)
        for part in parts:
            if name not in part.deltas and name not in part.manifest["excluded"]:
                problems[kind := f"not in {part.ref}"].append(f"{name} {list(shapes[0])}: {kind}")
                break
    if problems:
        raise IncompatibleError(f"the vectors do not match:\n{up_to_five_each(problems)}")
    return names


def announce_combination(parts: Sequence[Displacement], recipe: Recipe) -> Manifest:
    """Return what the manifest of a combination says before its data is read."""
    manifests = [part.manifest for part in parts]
    base = manifests[0]["base"].copy()
    names = {name for part in parts for name in part.deltas}
    bases = ({p.base_digest(name) for p in parts if name in p.deltas} - {None} for name in names)
    differ = len({m["base"]["probe"] for m in manifests}) > 1 or any(len(b) > 1 for b in bases)
    if differ:
        base["probe"] = None  # no model is the base of them all
    words = recipe.to_dict()
    shares = zip(words["vectors"], manifests, strict=True)
    said = words | {"vectors": [unplaced(share, m["identity"]) for share, m in shares]}
    licenses = {m["license"] for m in manifests}
    weights = " ".join(
        f"{share.vector}={share.weight:g}" if isinstance(share.weight, float) else share.vector
        for share in recipe.shares
    )
    manifest: Manifest = {
        "kind": "vector",
        "schema": SCHEMA,
        "formula": f"{recipe.op}({weights})",
        "identity": digest_bytes(json.dumps(without_places(said)).encode()),
        "base": base,
        "tuned": None,
        "parents": list(map(_parent, parts)),
        "recipe": words,
        "training": {"method": None, "notes": None},
        "license": licenses.pop() if len(licenses) == 1 else None,
        "equal": {},
        "include": [],
        "exclude": [],
        "tied": {name: twin for name, twin in manifests[0]["tied"].items()
                 if all(m["tied"].get(name) == twin for m in manifests)},
        "excluded": [name for name in manifests[0]["excluded"]
                     if all(name in m["excluded"] for m in manifests)],
    }  # fmt: skip
    if untied := {head: of for part in parts for head, of in part.untied.items()}:
        manifest["untied"] = untied
    if warnings := list(dict.fromkeys(said for part in parts for said in part.warnings)):
        manifest["warnings"] = warnings
    return manifest


def _parent(part: Displacement) -> Parent:
    said, tuned = part.manifest, part.manifest["tuned"]
    parent: Any = {
        "ref": part.ref,
        "identity": said["identity"],
        "manifest": part.digest,
        "base": said["base"]["ref"],
        "tuned": tuned["ref"] if tuned else None,
        "dtype": said["dtype"],
        **{key: said[key] for key in CHOSEN if key in said},  # type: ignore[literal-required]
    }
    return parent  # type: ignore[no-any-return]
