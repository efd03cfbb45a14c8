"""A vector and a target: in which layout they meet, which tensor takes which delta, the verdict.

Reads headers, samples and manifests; refuses by name what does not fit.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from skillvec.adapters import Adapter
from skillvec.adapting import effect_on
from skillvec.bridging import bridged, hints_of, left_over, tied_names
from skillvec.checkpoint import Checkpoint, empty_weights, lone_factors, placeholders
from skillvec.configs import untied_config
from skillvec.conversions import tied_weights
from skillvec.deltas import ComputedDelta, DeltaSource, MixDelta, PairDelta, ViewDelta
from skillvec.errors import IncompatibleError, UsageError, up_to_five_each
from skillvec.kernels import FLOATS
from skillvec.layouts import numbered, renamed, viewed_specs
from skillvec.lineage import (
    BUFFER,
    MAX_TIED,
    are_tied,
    find_tied,
    is_idle_buffer,
    may_be_one,
    probe_digest,
    recomputed,
    relatedness,
    same_bytes,
    sketch,
)
from skillvec.quantised import unexplained
from skillvec.rules import is_selected, refuse_idle_globs
from skillvec.sources import Source, View, whole
from skillvec.vector import SkillVector, viewed_delta
from skillvec.vectorfile import StoredDelta


def ledger_line(spec: Source, status: str, note: str = "") -> dict[str, Any]:
    """Return a line of the ledger for a tensor that needs no job."""
    line = {"name": spec.name, "status": status, "dtype": spec.dtype, "shape": list(spec.shape)}
    return line | ({"note": note} if note else {})


class Fitted(NamedTuple):
    """A vector in the layout of a target: its deltas under the target's names.

    `seen` is the target in the layout of the vector, as far as it can be seen so; `skipped` are
    tensors of the target that take nothing, and why; `hints` are for the error if it does not fit.
    `own` is the vector under its own names, and `places` where whole deltas of it have gone.
    """

    vector: SkillVector
    seen: Checkpoint
    skipped: dict[str, str]
    hints: list[str]
    own: SkillVector
    places: dict[str, str]


def laid_out(
    vector: SkillVector, target: Checkpoint, rename: Sequence[str] = (), rows: str = "strict"
) -> Fitted:
    """Return a vector in the layout of a target. Tensors that no rule brings over stay as they are.

    `rename` rules are applied to the vector's names; of `rows` that only the target has, the delta
    is 0.
    """
    if vector.own is not None and list(rename) == vector.manifest.get("rename"):
        rename = ()  # its names have changed by them
    if vector.adapter is not None:
        return _adapted(vector, vector.adapter, target, rename)
    if rename and vector.own is not None and not vector.own.needs_base:
        known = {name: delta.spec.shape for name, delta in vector.deltas.items()}
        try:
            renamed(known, rename)
        except UsageError:  # rules for the adapter's own names, of a model in memory
            return _adapted(vector, vector.own, target, rename)
    mine = {name: delta.spec for name, delta in vector.deltas.items()}
    wanted = {
        name: spec for name, spec in target.items()
        if name in mine or (spec.dtype in FLOATS and name not in vector.manifest["excluded"])
    }  # fmt: skip
    configs = [target.config, {"model_type": vector.manifest["base"]["model_type"]}]
    found = bridged(mine, wanted, configs, rename, rows)
    if found is None:
        return Fitted(vector, target, {}, [], vector, {})
    made: dict[str, DeltaSource] = {}
    back: dict[str, View] = {}
    places: dict[str, str] = {}  # where a whole delta goes
    for name, view in found.views.items():
        (source, *others) = view.sources or (None,)
        shape = vector.deltas[source].spec.shape if source else ()
        if source and not others and view == whole(source, shape):
            made[name] = vector.deltas[source]
            back[source] = whole(name, shape)
            places[source] = name
        else:
            made[name] = viewed_delta(name, view, vector)
    left = left_over(found, vector.ref, mine, wanted)
    unused = {name: vector.deltas[name] for name in left}
    reverse = bridged(wanted, mine, configs, (), "strict")
    if reverse is not None:
        back = reverse.views | back
    seen = target
    if back:  # under the vector's names: a sketch goes by those of the tensors
        seen = target.with_tensors(viewed_specs(found._replace(views=back), target))
    moved = {head: places.get(of, of) for head, of in vector.untied.items()}
    manifest = vector.manifest | ({"untied": moved} if moved else {})
    laid = replace(vector, deltas=made | unused, notes=found.notes, manifest=manifest)
    return Fitted(laid, seen, found.skipped, hints_of(found), vector, places)


RELATED = 0.5  # cosine of sketches: unrelated ones spread by .06, fine-tuned ones stay above .9


def _adapted(
    vector: SkillVector, adapter: Adapter, target: Checkpoint, rename: Sequence[str]
) -> Fitted:
    """Return an adapter fitted to the target itself: what it does not name stays."""
    effect = effect_on(adapter, target, rename)
    deltas = {name: ComputedDelta(d, vector.ref) for name, d in effect.deltas.items()}
    stay = {name: "not in the adapter" for name in target if name not in deltas}
    vector = replace(vector, deltas=deltas, warnings=tuple(effect.warnings), adapter=adapter)
    return Fitted(vector, target, stay, [], vector, {})


class Fit(NamedTuple):
    """Which tensor takes which delta: `routes` from names of the target to names of deltas.

    `passed` are tensors passed through, with status and note; `lines` of the ledger are of deltas
    that need no tensor; `untied` are heads that the target does not store and that get tensors of
    their own, with the name of the embedding whose values they have.
    """

    routes: dict[str, str]
    passed: dict[str, tuple[str, str]]
    lines: list[dict[str, Any]]
    untied: dict[str, str]


KEPT = "untied: keeps the head of the target"


def fitting(
    target: Checkpoint, fitted: Fitted, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Fit:
    """Decide for every tensor of the target which delta it takes, or why it takes none.

    Raises IncompatibleError for what is left.
    """
    vector = fitted.vector
    refuse_idle_globs([*target, *vector.deltas], include, exclude)
    fit = Fit({}, {}, [], {})
    routes, passed, lines, untied = fit
    problems = defaultdict(list)
    manifest = vector.manifest
    alone = sum(name not in vector.deltas and not BUFFER.search(name) for name in target)
    unread = unexplained(target)
    for name, spec in target.items():
        if not is_selected(name, include, exclude):
            passed[name] = ("excluded", "")
        elif name in unread and name not in manifest["excluded"]:
            problems["unread"].append(f"{unread[name].text}: nothing says how to read it")
        elif name in fitted.skipped:
            passed[name] = ("passed through", fitted.skipped[name])
        elif name in vector.deltas:
            shape = vector.deltas[name].spec.shape
            if shape != spec.shape:
                said = f"{name}: target {list(spec.shape)}, vector {list(shape)}"
                problems["of different shapes"].append(said)
            elif spec.dtype not in FLOATS:
                said = f"{name}: target is {spec.dtype}, the vector's delta is a float"
                problems["of different dtypes"].append(said)
            else:
                routes[name] = name
        elif name in manifest["excluded"]:
            passed[name] = ("passed through", "left out when the vector was made")
        elif spec.dtype not in FLOATS:
            passed[name] = ("passed through", f"{spec.dtype} takes no delta")
        elif kind := recomputed(spec):
            passed[name] = ("passed through", f"{kind}, which the model computes")
        else:
            twin = _moving(target, name, fitted, alone <= MAX_TIED)
            if twin is not None:
                routes[name] = twin
            elif vector.own is not None:
                passed[name] = ("passed through", "not in the adapter")
            else:
                said = f"{name} {list(spec.shape)}: only in the target"
                problems["only in the target"].append(said)
    partners = {of: head for head, of in vector.untied.items()} | vector.untied
    lacking = [n for n in vector.deltas if n not in target and not BUFFER.search(n)]
    few = sum(is_selected(name, include, exclude) for name in lacking) <= MAX_TIED
    for name, delta in vector.deltas.items():
        if name in target:
            continue
        source = partners.get(name, "")
        taken = is_selected(name, include, exclude)
        if source in target and target.ties_embeddings is not False:
            if source not in routes and not (taken and _changes(delta)):
                lines.append(ledger_line(delta.spec, "tied", f"{source} does not change either"))
                continue
            why = _untying_problem(target, name, source, delta.spec.shape, partners)
            if why:
                problems["of heads"].append(f"{name} {list(delta.spec.shape)}: {why}")
            untied[name] = source
            if taken:
                routes[name] = name
            else:
                passed[name] = ("excluded", KEPT)
            continue
        if not taken:
            lines.append(ledger_line(delta.spec, "excluded"))
            continue
        if is_idle_buffer(name, delta):
            lines.append(ledger_line(delta.spec, "left out", "the model computes it"))
            continue
        may_tie = few and target.ties_embeddings is not False
        twins = same_delta(fitted.own, name) if may_tie else set()
        twin = _stored_as(target, name, fitted, twins)
        if twin is not None:
            lines.append(ledger_line(delta.spec, "tied", f"same delta as {twin}"))
        else:
            hint = ""
            tied = may_tie and target.ties_embeddings and not twins
            if tied and name.endswith("lm_head.weight"):
                hint = (
                    " (the target ties it, and the vector holds two different deltas for the pair)"
                )
            said = f"{name} {list(delta.spec.shape)}: only in the vector{hint}"
            problems["only in the vector"].append(said)
    if not problems and not routes:
        raise IncompatibleError(f"{vector.ref}: no tensor of {target.ref} is left to add to")
    if problems:
        left = [name for name in target if name not in routes and name not in passed]
        told = lone_factors(target, left)
        if empty := [name for name in placeholders(target) if name in left]:
            told = empty_weights(target, empty)
        if told:
            raise IncompatibleError(f"target {told}")
        raise IncompatibleError(
            f"verdict: incompatible: {vector.ref} does not fit {target.ref}"
            " (--exclude GLOB leaves tensors out):\n"
            + "\n".join([up_to_five_each(problems), *fitted.hints])
        )
    return fit


def _moving(target: Checkpoint, name: str, fitted: Fitted, may_copy: bool) -> str | None:
    """Return the name of the delta that a tensor takes as a tied copy, None where there is none.

    The vector says so, or, if it `may_copy`, the target holds its bytes under that name.
    """
    deltas = fitted.vector.deltas
    said = fitted.vector.manifest["tied"].get(name)
    twins = [] if said is None else [fitted.places.get(said, said)]
    if not twins and may_copy:
        twins = find_tied(target, name, deltas)
    shape = target[name].shape
    return next((t for t in twins if t in deltas and deltas[t].spec.shape == shape), None)


def _stored_as(target: Checkpoint, name: str, fitted: Fitted, twins: Container[str]) -> str | None:
    """Return under which name a target stores what is one weight with `name`, None if it does not.

    `twins` are names of the vector with the same delta.
    """
    for twin, delta in fitted.own.deltas.items():
        place = fitted.places.get(twin, twin)
        taken = twin in twins and fitted.vector.deltas.get(place) is delta
        if taken and place in target and may_be_one(target, name, place):
            return place
    return None


def head_note(delta: DeltaSource | None) -> str:
    """Return what the ledger says of a head that gets a tensor of its own, and what it takes."""
    return "untied: a head of its own" if delta is not None and _changes(delta) else KEPT


def _changes(delta: DeltaSource) -> bool:
    """Return whether a delta may change anything, as far as is known without reading it."""
    return not (isinstance(delta, StoredDelta) and delta.codec == "zero")


def _untying_problem(
    target: Checkpoint, head: str, source: str, shape: tuple[int, ...], untied: Iterable[str]
) -> str:
    """Return why a head cannot get a tensor and a config of its own, "" where it can.

    One switch of the config unties all that it ties, so all have to be among the `untied`.
    """
    if target[source].shape != shape or target[source].dtype not in FLOATS:
        return f"{source} is {target[source].dtype} {list(target[source].shape)} in the target"
    said = tied_names(target)
    if said is None:  # no model of transformers: its config is all there is to go by
        return "" if target.ties_embeddings else "nothing says that the target ties it"
    if source != said.get(head) and head != said.get(source):
        return f"the target's model does not tie it to {source}"
    left = tied_weights(untied_config(target.config), len(target))
    if left != {} or not {*said} <= {*untied}:
        return f"the target's config cannot part it alone from {source}"
    return ""


def parted(target: Checkpoint, vector: SkillVector, moves: Mapping[str, DeltaSource]) -> bool:
    """Return whether the target ties tensors that it stores, and a vector moves them apart.

    `moves` are the deltas that its tensors take. What the config ties and the file holds with other
    bytes, transformers leaves apart.
    """
    if target.ties_embeddings is False or not target.config:
        return False
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, spec in target.items():
        if len(spec.shape) == 2 and spec.dtype in FLOATS and not numbered(name):
            alike[spec.dtype, spec.shape].append(name)
    pairs = (pair for names in alike.values() for pair in combinations(names, 2))
    moved = [
        pair for pair in pairs
        if _moves_apart(vector, [moves[name] for name in pair if name in moves])
        and same_bytes(target[pair[0]], target[pair[1]])
    ]  # fmt: skip
    if not moved or target.ties_embeddings:
        return bool(moved)
    said = tied_names(target) or {}  # what its class does if told nothing
    return any(are_tied(said, one, other) for one, other in moved)


def _moves_apart(vector: SkillVector, taken: Sequence[DeltaSource]) -> bool:
    """Return whether two tensors of the same bytes may differ once they took these deltas."""
    if len(taken) < 2:
        return any(map(_changes, taken))
    one, other = (delta.spec.name for delta in taken)
    return one != other and not (one in vector.deltas and other in same_delta(vector, one))


def same_delta(vector: SkillVector, name: str) -> set[str]:
    """Return the other tensors of the vector with the very same delta, by names of its manifest.

    Where only the deltas tell, they are none of the numbered layers if the tensor is not: those may
    have the shape of a head and not change either.
    """
    delta = vector.deltas[name]
    source = delta.spec.name
    if source != name and vector.deltas.get(source) is delta:  # lent to a head
        return {source, *same_delta(vector, source)} - {name}
    lent = {other for other, of in vector.deltas.items() if of is delta and other != name}
    return lent | _others_like(vector, name, delta)


def _others_like(vector: SkillVector, name: str, delta: DeltaSource) -> set[str]:
    def alike(other: str) -> bool:
        return numbered(other) == numbered(name)

    others = ((n, other) for n, other in vector.deltas.items() if n != name)
    if vector.origin is not None:  # an adapter, not stored
        return {n for n, other in others if alike(n) and _is_same(delta, other)}
    if isinstance(delta, ViewDelta):
        return set()
    if isinstance(delta, PairDelta):
        return {
            n for n, other in others
            if isinstance(other, PairDelta) and same_bytes(delta.base, other.base)
            and same_bytes(delta.tuned, other.tuned)
        }  # fmt: skip
    if isinstance(delta, MixDelta):
        held = {n: other for n, other in others if isinstance(other, MixDelta)}
        return _mixed_alike(vector, delta, name, held) if delta.by_value else set()
    entries = vector.manifest["tensors"]
    known = entries[name]["base"] is not None
    keys = ("base", "tuned") if known else ("dtype", "shape", "codec", "digest")
    mine = [entries[name][key] for key in keys]
    same = (n for n, e in entries.items() if n != name and [e[key] for key in keys] == mine)
    return {n for n in same if n in vector.deltas and (known or alike(n))}


def _mixed_alike(
    vector: SkillVector, delta: MixDelta, name: str, others: Mapping[str, MixDelta]
) -> set[str]:
    """Return the tensors to which every part of a combination does the same, or nothing."""
    way = (delta.weights, delta.parameters, delta.spec.shape)
    found = {n for n, o in others.items() if (o.weights, o.parameters, o.spec.shape) == way}
    for part in vector.parts:
        if name in part.deltas:
            found &= same_delta(part, name)
        else:
            found -= set(part.deltas)
    return found


def _is_same(one: DeltaSource, other: DeltaSource) -> bool:
    """Return whether an adapter does the same to two tensors: nothing, or the very same thing."""
    if one.spec.shape != other.spec.shape:
        return False
    if isinstance(one, ComputedDelta) and isinstance(other, ComputedDelta):
        unnamed = [vars(delta.source) | {"name": ""} for delta in (one, other)]
        return unnamed[0] == unnamed[1]
    if isinstance(one, PairDelta) and isinstance(other, PairDelta):
        return one.tuned == other.tuned and same_bytes(one.base, other.base)
    return not (_changes(one) or _changes(other))


def warnings_of(vector: SkillVector) -> list[str]:
    """Return the warnings of a vector and its parts, and where their bases are not related."""
    own = [warning for part in (vector, *vector.parts) for warning in part.warnings]
    return [*dict.fromkeys(own), *_kinship_warnings(vector)]


def _kinship_warnings(vector: SkillVector) -> list[str]:
    sketches = [part.manifest["base"]["sketch"] for part in vector.parts]
    cosines = [relatedness(sketches[0], other) for other in sketches[1:]]
    if not any(cosine is not None and cosine < RELATED for cosine in cosines):
        return []
    refs = ", ".join(dict.fromkeys(part.manifest["base"]["ref"] for part in vector.parts))
    return [f"the vectors were taken from bases that are not related: {refs}"]


def verdict_on(target: Checkpoint, vector: SkillVector) -> tuple[str, list[str]]:
    """Return the verdict on a target whose tensors fit, and warnings.

    "exact base"; "same family": its weights or its config are related to the base's; "same shapes,
    unknown lineage": nothing says so.
    """
    base = vector.manifest["base"]
    warnings = warnings_of(vector)
    if base["tokenizer"] and target.tokenizer_digest not in (None, base["tokenizer"]):
        warnings.append(
            "the target's tokenizer differs from the base's: a token may mean something else"
        )
    if base["model_type"] and target.model_type not in (None, base["model_type"]):
        warnings.append(
            f"the target is a {target.model_type}, the vector was made on a {base['model_type']}"
        )
    if target.family_digest == base["family"] and probe_digest(target) == base["probe"]:
        return "exact base", warnings
    cosine = relatedness(base["sketch"], sketch(target))
    if cosine is None:  # no matrix in common: only the config can tell
        related = base["config"] is not None and base["config"] == target.config_digest
    else:
        related = cosine >= RELATED
    if related:
        return "same family", warnings
    shown = "no weights to compare" if cosine is None else f"cosine of a sample {cosine:+.2f}"
    warnings.append(
        f"same shapes, but nothing says that the target was made from the vector's base ({shown};"
        " fine-tuned models have above .9): the skill may not transfer"
    )
    return "same shapes, unknown lineage", warnings
