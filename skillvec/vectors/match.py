"""A vector and a target: in which layout they meet, which tensor takes which delta, the verdict.

Reads headers, samples and manifests; refuses by name what does not fit.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from skillvec.checkpoints.align import bridged, hints_of, left_over, tied_names
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.configs import untied_config
from skillvec.checkpoints.fingerprint import RELATED, probe_digest, relatedness, sketch
from skillvec.checkpoints.layouts import viewed_specs
from skillvec.checkpoints.model_classes import tied_weights
from skillvec.checkpoints.opening import explain_factors, explain_placeholders, find_placeholders
from skillvec.checkpoints.renaming import numbered
from skillvec.checkpoints.ties import MAX_TIED, are_tied, find_tied, may_be_one, same_bytes
from skillvec.checkpoints.unread import unexplained
from skillvec.errors import IncompatibleError, up_to_five_each
from skillvec.files.tensors import Source
from skillvec.files.views import whole
from skillvec.ops.kernels import FLOATS
from skillvec.vectors.combining import move_deltas
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.displacement import ledger_line
from skillvec.vectors.idle import BUFFER, is_idle_buffer, recomputed
from skillvec.vectors.recipe import is_selected, refuse_idle_globs
from skillvec.vectors.vector import SkillVector


class InLayout(NamedTuple):
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


def to_layout(
    vector: SkillVector, target: Checkpoint, rename: Sequence[str] = (), rows: str = "strict"
) -> InLayout:
    """Return a vector in the layout of a target. Tensors that no rule brings over stay as they are.

    `rename` rules are applied to the vector's names; of `rows` that only the target has, the delta
    is 0.
    """
    rename = vector.drop_applied(rename)
    made = vector.make_for(target, rename)
    if made is not None:
        stay = {name: "not in the adapter" for name in target if name not in made.deltas}
        return InLayout(made, target, stay, [], made, {})
    mine = {name: delta.spec for name, delta in vector.deltas.items()}
    wanted = {
        name: spec for name, spec in target.items()
        if name in mine or (spec.dtype in FLOATS and name not in vector.manifest["excluded"])
    }  # fmt: skip
    configs = [target.config, {"model_type": vector.manifest["base"]["model_type"]}]
    found = bridged(mine, wanted, configs, rename, rows)
    if found is None:
        return InLayout(vector, target, {}, [], vector, {})
    deltas, places = move_deltas(vector, found.views)
    left = left_over(found, vector.ref, mine, wanted)
    unused = {name: vector.deltas[name] for name in left}
    reverse = None if places.keys() >= mine.keys() else bridged(wanted, mine, configs, (), "strict")
    back = {} if reverse is None else reverse.views
    back = back | {
        name: whole(to, vector.deltas[name].spec.shape) for name, to in places.items()
    }  # fmt: skip
    seen = target
    if back:  # under the vector's names: a sketch goes by those of the tensors
        seen = target.with_tensors(viewed_specs(found._replace(views=back), target))
    manifest = vector.manifest
    if moved := {head: places.get(of, of) for head, of in vector.untied.items()}:
        manifest = {**manifest, "untied": moved}
    laid = replace(vector, deltas=deltas | unused, notes=found.notes, manifest=manifest)
    return InLayout(laid, seen, found.skipped, hints_of(found), vector, places)


class Match(NamedTuple):
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


def match(
    target: Checkpoint, moved: InLayout, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Match:
    """Decide for every tensor of the target which delta it takes, or why it takes none.

    Raises IncompatibleError for what is left.
    """
    refuse_idle_globs([*target, *moved.vector.deltas], include, exclude)
    matching = _Matching(target, moved, include, exclude)
    for name, spec in target.items():
        matching.take(name, spec)
    for name, delta in moved.vector.deltas.items():
        if name not in target:
            matching.place(name, delta)
    if matching.problems:
        raise matching.refusal()
    if not matching.found.routes:
        raise IncompatibleError(f"{moved.vector.ref}: no tensor of {target.ref} is left to add to")
    return matching.found


class _Matching:
    """A match in the making: tensors of the target first, then deltas that it has no tensor for."""

    def __init__(
        self, target: Checkpoint, moved: InLayout, include: Sequence[str], exclude: Sequence[str]
    ) -> None:
        self._target, self._moved, self._vector = target, moved, moved.vector
        self._include, self._exclude = include, exclude
        self.found = Match({}, {}, [], {})
        self.problems: dict[str, list[str]] = defaultdict(list)
        deltas = moved.vector.deltas
        alone = sum(name not in deltas and not BUFFER.search(name) for name in target)
        self._may_copy = alone <= MAX_TIED
        lacking = [n for n in deltas if n not in target and not BUFFER.search(n)]
        few = sum(map(self._is_taken, lacking)) <= MAX_TIED
        self._may_tie = few and target.ties_embeddings is not False
        self._unread = unexplained(target)
        untied = moved.vector.untied
        self._partners = {of: head for head, of in untied.items()} | untied

    def _is_taken(self, name: str) -> bool:
        return is_selected(name, self._include, self._exclude)

    def take(self, name: str, spec: Source) -> None:
        """Decide what a tensor of the target takes."""
        vector, routes, passed = self._vector, self.found.routes, self.found.passed
        excluded = vector.manifest["excluded"]
        if not self._is_taken(name):
            passed[name] = ("excluded", "")
        elif name in self._unread and name not in excluded:
            said = f"{self._unread[name].text}: nothing says how to read it"
            self.problems["unread"].append(said)
        elif name in self._moved.skipped:
            passed[name] = ("passed through", self._moved.skipped[name])
        elif name in vector.deltas:
            self._take_own(name, spec, vector.deltas[name].spec.shape)
        elif name in excluded:
            passed[name] = ("passed through", "left out when the vector was made")
        elif spec.dtype not in FLOATS:
            passed[name] = ("passed through", f"{spec.dtype} takes no delta")
        elif kind := recomputed(spec):
            passed[name] = ("passed through", f"{kind}, which the model computes")
        elif (twin := _moving(self._target, name, self._moved, self._may_copy)) is not None:
            routes[name] = twin
        elif vector.is_partial:
            passed[name] = ("passed through", "not in the adapter")
        else:
            said = f"{name} {list(spec.shape)}: only in the target"
            self.problems["only in the target"].append(said)

    def _take_own(self, name: str, spec: Source, shape: tuple[int, ...]) -> None:
        """Take the delta of the same name, which is of this shape."""
        if shape != spec.shape:
            said = f"{name}: target {list(spec.shape)}, vector {list(shape)}"
            self.problems["of different shapes"].append(said)
        elif spec.dtype not in FLOATS:
            said = f"{name}: target is {spec.dtype}, the vector's delta is a float"
            self.problems["of different dtypes"].append(said)
        else:
            self.found.routes[name] = name

    def place(self, name: str, delta: DeltaSource) -> None:
        """Decide what becomes of a delta under whose name the target has no tensor."""
        target, lines = self._target, self.found.lines
        source = self._partners.get(name, "")
        if source in target and target.ties_embeddings is not False:
            self._untie(name, source, delta)
        elif not self._is_taken(name):
            lines.append(ledger_line(delta.spec, "excluded"))
        elif is_idle_buffer(name, delta):
            lines.append(ledger_line(delta.spec, "left out", "the model computes it"))
        else:
            twins = self._moved.own.find_same(name) if self._may_tie else set()
            twin = _stored_as(target, name, self._moved, twins)
            if twin is not None:
                lines.append(ledger_line(delta.spec, "tied", f"same delta as {twin}"))
                return
            hint = ""
            tied = self._may_tie and target.ties_embeddings and not twins
            if tied and name.endswith("lm_head.weight"):
                hint = (
                    " (the target ties it, and the vector holds two different deltas for the pair)"
                )
            said = f"{name} {list(delta.spec.shape)}: only in the vector{hint}"
            self.problems["only in the vector"].append(said)

    def _untie(self, name: str, source: str, delta: DeltaSource) -> None:
        """Give a head a tensor of its own, if it or the embedding `source` may change."""
        routes, passed, lines, untied = self.found
        taken = self._is_taken(name)
        if source not in routes and (delta.is_zero or not taken):
            lines.append(ledger_line(delta.spec, "tied", f"{source} does not change either"))
            return
        why = _untying_problem(self._target, name, source, delta.spec.shape, self._partners)
        if why:
            self.problems["of heads"].append(f"{name} {list(delta.spec.shape)}: {why}")
        untied[name] = source
        if taken:
            routes[name] = name
        else:
            passed[name] = ("excluded", KEPT)

    def refusal(self) -> IncompatibleError:
        """Return the error that names what is left."""
        target, found = self._target, self.found
        left = [name for name in target if name not in found.routes and name not in found.passed]
        told = explain_factors(target, left)
        if empty := [name for name in find_placeholders(target) if name in left]:
            told = explain_placeholders(target, empty)
        if told:
            return IncompatibleError(f"target {told}")
        return IncompatibleError(
            f"verdict: incompatible: {self._vector.ref} does not fit {target.ref}"
            " (--exclude GLOB leaves tensors out):\n"
            + "\n".join([up_to_five_each(self.problems), *self._moved.hints])
        )


def _moving(target: Checkpoint, name: str, moved: InLayout, may_copy: bool) -> str | None:
    """Return the name of the delta that a tensor takes as a tied copy, None where there is none.

    The vector says so, or, if it `may_copy`, the target holds its bytes under that name.
    """
    deltas = moved.vector.deltas
    said = moved.vector.manifest["tied"].get(name)
    twins = [] if said is None else [moved.places.get(said, said)]
    if not twins and may_copy:
        twins = find_tied(target, name, deltas)
    shape = target[name].shape
    return next((t for t in twins if t in deltas and deltas[t].spec.shape == shape), None)


def _stored_as(target: Checkpoint, name: str, moved: InLayout, twins: Container[str]) -> str | None:
    """Return under which name a target stores what is one weight with `name`, None if it does not.

    `twins` are names of the vector with the same delta.
    """
    for twin, delta in moved.own.deltas.items():
        place = moved.places.get(twin, twin)
        taken = twin in twins and moved.vector.deltas.get(place) is delta
        if taken and place in target and may_be_one(target, name, place):
            return place
    return None


def head_note(delta: DeltaSource | None) -> str:
    """Return what the ledger says of a head that gets a tensor of its own, and what it takes."""
    return "untied: a head of its own" if delta is not None and not delta.is_zero else KEPT


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
        return not all(delta.is_zero for delta in taken)
    one, other = (delta.spec.name for delta in taken)
    return one != other and not (one in vector.deltas and other in vector.find_same(one))


def verdict_on(target: Checkpoint, vector: SkillVector) -> tuple[str, list[str]]:
    """Return the verdict on a target whose tensors fit, and warnings.

    "exact base"; "same family": its weights or its config are related to the base's; "same shapes,
    unknown lineage": nothing says so.
    """
    base = vector.manifest["base"]
    warnings = vector.list_warnings()
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
