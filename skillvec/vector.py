"""Displacements: the skill vector as a file, as a pair of checkpoints, or as a combination.

Hides where a delta comes from: stored values with exceptions, tuned and base subtracted as they
are read, or several deltas merged by an operator as they are read. Vectors can be scaled, added and
subtracted; what has no meaning (a vector plus a model) is a TypeError that says so.
"""

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Real
from typing import Any

from skillvec import hub
from skillvec.adapters import Adapter, Effect, open_adapter
from skillvec.adapting import effect_on
from skillvec.bridging import bridged, left_over, seen_as
from skillvec.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    empty_weights,
    is_adapter,
    locate,
    lone_factors,
    open_checkpoint,
    open_tensors,
    placeholders,
    read_json,
)
from skillvec.deltas import (
    ComputedDelta,
    DeltaSource,
    MixDelta,
    PairDelta,
    ViewDelta,
    delta_dtype,
    dtype_of,
    value_dtype,
)
from skillvec.errors import (
    IncompatibleError,
    SkillvecError,
    UsageError,
    printable,
    up_to_five_each,
)
from skillvec.kernels import FLOATS, STORAGE_DTYPE
from skillvec.layouts import viewed_specs
from skillvec.lineage import (
    MAX_TIED,
    find_tied,
    identity,
    is_idle_buffer,
    recomputed,
    under_name,
)
from skillvec.merging import OPERATORS, Operator, check_parameters
from skillvec.patch import find_patch, open_patch
from skillvec.patching import touched_by
from skillvec.quantised import (
    INTEGERS,
    LeftOut,
    may_be_weight,
    nothing_left_out,
    unexplained,
)
from skillvec.rules import (
    Recipe,
    Share,
    is_selected,
    leaving_out,
    refuse_idle_globs,
    resolve,
    selection,
)
from skillvec.sources import Source, View, digest_values, whole
from skillvec.storage import Place, TensorSpec, digest_bytes, refuse_stale
from skillvec.vectorfile import CHOSEN, SCHEMA, SIDE, StoredDelta, VectorFile, find_vector

FP32_MAX = 3.4028234e38


@dataclass(frozen=True)
class SkillVector:
    """A displacement tuned - base, or several of them merged, times `scale`.

    `deltas` maps tensor names to where the delta comes from. `manifest` is what the file says or
    will say. `parts` and `recipe` are those of a combination.
    """

    ref: str
    deltas: Mapping[str, DeltaSource]
    manifest: dict[str, Any]
    scale: float = 1.0
    stored: VectorFile | None = None
    tuned: Checkpoint | None = None
    base: Checkpoint | None = None
    parts: "tuple[SkillVector, ...]" = ()
    recipe: Recipe | None = None
    notes: Mapping[str, str] = field(default_factory=dict)  # how tensors were found
    origin: Checkpoint | None = None  # the files of an adapter
    adapter: Adapter | None = None  # one without its base: fitted to the target that it meets
    own: Adapter | None = None  # the adapter itself, with its base or without
    warnings: tuple[str, ...] = ()
    report: Any = field(default=None, compare=False)  # of the verb that wrote it

    @staticmethod
    def open(
        ref: "str | os.PathLike[str] | Place | SkillVector", role: str = "vector",
        rename: Sequence[str] = (),
    ) -> "SkillVector":  # fmt: skip
        """Open a vector file or folder, a PEFT adapter, or "TUNED::BASE"; headers only.

        `rename` rules are for an adapter that does not fit its base without. Raises
        IncompatibleError for a model.
        """
        if isinstance(ref, SkillVector):
            for side in ref.inputs():
                if isinstance(side, Checkpoint):
                    refuse_stale(side.opened.seen)
            return ref
        if not isinstance(ref, Place):
            if "::" in os.fspath(ref):
                tuned, _, base = os.fspath(ref).partition("::")
                try:
                    if rename and is_adapter(place := locate(tuned, "tuned")):
                        return SkillVector.adapted(place, open_checkpoint(base, "base"), (), rename)
                    return SkillVector.between(tuned, base)
                except IncompatibleError as error:
                    hint = (
                        "\n(TUNED::BASE is taken whole: for --exclude store a diff, and name that)"
                    )
                    raise IncompatibleError(
                        f"{error}{hint if '--exclude' in str(error) else ''}"
                    ) from None
            ref = locate(ref, role)
        place = ref
        stored = find_vector(place)
        if stored is not None:
            return SkillVector.of_file(stored)
        if is_adapter(place):
            return SkillVector.adapted(place, None, (), rename)
        opened = open_tensors(place, role)
        if told := lone_factors(opened, opened):
            raise IncompatibleError(told)
        raise IncompatibleError(
            f"{role} {opened.ref}: this is not a skill vector (no manifest in its header);"
            " skillvec diff makes one from two models, and apply takes the model first"
        )

    @staticmethod
    def of_file(stored: VectorFile) -> "SkillVector":
        """Return the vector of a file that is open."""
        said = tuple(map(printable, stored.manifest.get("warnings", ())))
        return SkillVector(stored.ref, stored.deltas, stored.manifest, stored=stored, warnings=said)

    @staticmethod
    def between(
        tuned: str | os.PathLike[str] | Place | Checkpoint,
        base: str | os.PathLike[str] | Place | Checkpoint,
        dtype: str = "auto",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rename: Sequence[str] = (),
        rows: str = "strict",
        left_out: LeftOut = nothing_left_out,
    ) -> "SkillVector":
        """Return tuned - base without computing it: every name and shape is checked here.

        `dtype`, `rename` and `rows` as of skillvec.diff. `tuned` may be a PEFT adapter or a patch
        of `base`. What cannot be read is left out where `left_out` says of all of it that it is not
        used. Raises UsageError for what is unknown, IncompatibleError naming tensors that stand on
        one side only or differ in shape.
        """
        kept = "auto" if dtype == "auto" else dtype_of(dtype)
        if kept == "F64":
            raise UsageError("dtype fp64: auto keeps fp64 inputs in fp64")
        chosen = leaving_out(include, exclude)

        def unused(name: str) -> bool:
            return chosen(name) or left_out(name)

        if not isinstance(tuned, Checkpoint):
            place = tuned if isinstance(tuned, Place) else locate(tuned, "tuned")
            as_it_is = dtype == "auto" and not (include or exclude) and rows == "strict"
            if is_adapter(place):
                if not as_it_is:
                    raise UsageError(f"tuned {place.ref}: an adapter is taken whole, in fp32")
                return SkillVector.adapted(place, open_checkpoint(base, "base"), rename)
            if place.ref.endswith(".safetensors") and find_patch(place, "tuned"):
                if not as_it_is or rename:
                    raise UsageError(f"tuned {place.ref}: a patch is taken whole, as it is")
                return SkillVector.patched(place, base)
            tuned = open_checkpoint(place, "tuned", unused)
        base = open_checkpoint(base, "base", unused)
        seen, notes, skipped, hints = seen_as(tuned, base, rename, rows)
        unread = unexplained(seen) | unexplained(base)
        skipped = skipped | {name: "left out" for name in unread if left_out(name)}
        matched = _match(seen, base, include, exclude, skipped, hints)
        deltas = {
            name: PairDelta(
                seen[name], base[name], *value_dtype(seen[name].dtype, base[name].dtype, kept)
            )
            for name in matched["deltas"]
        }
        notes = notes | matched.pop("computed")
        said = selection(include, exclude, rename, rows)
        manifest = _pair_manifest(identity(tuned), identity(base), dtype, matched | said)
        ref = f"{tuned.ref}::{base.ref}"
        return SkillVector(ref, deltas, manifest, tuned=seen, base=base, notes=notes)

    @staticmethod
    def adapted(
        place: Place, base: Checkpoint | None = None, rename: Sequence[str] = (),
        spare: Sequence[str] = (),
    ) -> "SkillVector":  # fmt: skip
        """Return what a PEFT adapter adds to its base, s B A in fp32, without computing it.

        Modules that it holds whole (modules_to_save) need the base: `base`, or where the adapter
        says it is. Without a base it is fitted to the target: tensors that it does not name stay.
        `rename` rules are applied to the adapter's names of weights, those in `spare` only where
        they do not fit the base without: if not with them either, the target alone counts.
        """
        opened = open_tensors(place, "adapter")
        if empty := placeholders(opened):
            raise IncompatibleError(f"adapter {empty_weights(opened, empty)}")
        config = read_json(place.files[ADAPTER_CONFIG])
        adapter = open_adapter(place.ref, config, opened, f"adapter {place.ref}")
        given, effect = base is not None, None
        base = base if base is not None else _base_at_hand(adapter, place)
        if base is not None:
            try:
                effect = effect_on(adapter, base, rename)
            except IncompatibleError:
                if not spare:
                    raise
                try:
                    effect, rename = effect_on(adapter, base, spare), spare
                except SkillvecError:
                    if adapter.needs_base or given:
                        raise
        base = base if effect is not None else None
        deltas: dict[str, DeltaSource] = {}
        notes: dict[str, str] = {}
        if base is not None and effect is not None:
            deltas, notes = _deltas_of(effect, base, place)
        digests = [[name, digest_values(spec)] for name, spec in sorted(opened.items())]
        told = [config, digests, *([list(rename)] if rename else [])]
        who = digest_bytes(json.dumps(told, sort_keys=True).encode())
        ours = identity(base) if base is not None else _unknown(adapter.base_ref or "", opened)
        integers = {n: [s.dtype, None] for n, s in (base or {}).items() if n not in deltas}
        manifest = _adapter_manifest(place, who, ours, integers, effect, rename)
        return SkillVector(
            place.ref if base is None else f"{place.ref}::{base.ref}", deltas, manifest, base=base,
            notes=notes, origin=opened, adapter=None if base is not None else adapter, own=adapter,
            warnings=tuple(manifest.get("warnings", ())),
        )  # fmt: skip

    @staticmethod
    def patched(
        patch: str | os.PathLike[str] | Place, base: str | os.PathLike[str] | Place | Checkpoint
    ) -> "SkillVector":
        """Return what a patch (changed values of the exact base) adds, without computing it.

        Its names may be those of the base in memory. Raises IncompatibleError for one that does not
        fit the base, FormatError for a broken one.
        """
        base = open_checkpoint(base, "base")
        lists = open_patch(patch)
        touched, notes = touched_by(lists, base)
        tuned = lists.tuned({name: touched.get(name, spec) for name, spec in base.items()})
        deltas = {
            name: PairDelta(tuned[name], spec, *value_dtype(spec.dtype, spec.dtype))
            for name, spec in base.items() if spec.dtype in FLOATS
        }  # fmt: skip
        ours = identity(base)
        theirs = ours | {"ref": lists.ref, "revision": None, "probe": lists.digest}
        integers = {n: [spec.dtype, None] for n, spec in base.items() if n not in deltas}
        matched = {"integers": integers, "tied": {}, "excluded": [], "include": [], "exclude": []}
        manifest = _pair_manifest(theirs, ours, "auto", matched)
        ref = f"{lists.ref}::{base.ref}"
        return SkillVector(ref, deltas, manifest, tuned=tuned, base=base, notes=notes)

    @staticmethod
    def combined(
        parts: "Sequence[SkillVector]", recipe: Recipe, operator: Operator | None = None
    ) -> "SkillVector":
        """Return vectors merged by the recipe's operator, without computing it.

        `operator` is one that is not in the table. Raises IncompatibleError for tensors that only
        some of the vectors have, unless they were left out there on purpose.
        """
        operator = operator or OPERATORS[recipe.op]
        recipe = replace(recipe, shares=tuple(map(_scaled, recipe.shares, parts)))
        parts = [replace(part, scale=1.0) for part in parts]
        parts = _all_untied(aligned(parts))
        names = _common_names(parts)
        shares = resolve(recipe, names)
        deltas: dict[str, DeltaSource] = {}
        known = recipe.op in OPERATORS and operator is OPERATORS[recipe.op]
        for name in names:
            held = [part.deltas.get(name) for part in parts]
            shape = next(delta.spec.shape for delta in held if delta is not None)
            absent = _zero(name, shape)
            sources = tuple(delta or absent for delta in held)
            weights, parameters = zip(*shares[name], strict=True)
            if known:
                parameters = tuple(check_parameters(recipe.op, given) for given in parameters)
            wide = any(delta_dtype(source) == "F64" for source in sources)
            deltas[name] = MixDelta(
                TensorSpec(name, "F64" if wide else "F32", shape, "", 0, 0),
                sources,  # type: ignore[arg-type]
                weights,
                parameters,
                operator,
                tuple(part.manifest["identity"] for part in parts),
                tuple(part.stored.digest if part.stored else part.ref for part in parts),
                recipe.seed,
            )
        manifest = _combined_manifest(parts, recipe)
        return SkillVector(manifest["formula"], deltas, manifest, parts=tuple(parts), recipe=recipe)

    def __mul__(self, factor: object) -> "SkillVector":
        if not isinstance(factor, Real) or not isfinite(factor):
            raise TypeError(
                f"vector * {type(factor).__name__}: a skill vector can be multiplied by a finite"
                " number only"
            )
        scale = self.scale * float(factor)
        if not isfinite(scale):
            raise UsageError(f"{self.scale:g} * {factor:g} * vector: the factor overflows")
        return replace(self, scale=scale)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> "SkillVector":
        if not isinstance(divisor, Real) or not divisor:
            raise TypeError(f"vector / {divisor!r:.40}: expected a number that is not 0")
        return self * (1.0 / float(divisor))

    def __neg__(self) -> "SkillVector":
        return self * -1.0

    def __add__(self, other: object) -> "SkillVector":
        if isinstance(other, int) and other == 0:  # sum() begins with it
            return self
        if not isinstance(other, SkillVector):
            raise TypeError(
                f"vector + {type(other).__name__}: to add a vector to a model use"
                " skillvec.apply(model, vector, output)"
            )
        return _sum([*self.terms(), *other.terms()])

    __radd__ = __add__

    def __sub__(self, other: object) -> "SkillVector":
        if not isinstance(other, SkillVector):
            raise TypeError(f"vector - {type(other).__name__}: only a vector can be subtracted")
        return self + -other

    def unscaled(self) -> "SkillVector":
        """Return the same displacement with its factor, if any, taken into a plain sum."""
        return self if self.scale == 1 else _sum(self.terms())

    def terms(self) -> "list[tuple[SkillVector, float]]":
        """Return what a sum of vectors is made of: vectors with weights."""
        if not self.parts:
            return [(replace(self, scale=1.0), self.scale)]
        assert self.recipe is not None
        shares = self.recipe.shares
        plain = all(isinstance(share.weight, float) and not share.rules for share in shares)
        if self.recipe.op != "linear" or not plain:
            raise TypeError(
                f"{self.ref}: a combination that is not a plain sum can be neither part of another"
                " nor stored with a factor: save it as it is first"
            )
        return [
            (part, self.scale * float(share.weight))  # type: ignore[arg-type]
            for part, share in zip(self.parts, self.recipe.shares, strict=True)
        ]

    def save(self, output: str | os.PathLike[str], **options: Any) -> "SkillVector":
        """Write the vector to a file and open it; options as of skillvec.combine."""
        from skillvec import verbs

        return verbs.save(self, output, **options)

    @property
    def dtypes(self) -> str:
        """Dtype lineage in a word or two: of tuned and base, as BF16 - F32."""
        if self.parts:
            return ", ".join(dict.fromkeys(part.dtypes for part in self.parts))
        if self.manifest["tuned"] is None:
            return "+".join(self.manifest["base"]["dtypes"])
        sides = ("+".join(self.manifest[side]["dtypes"]) for side in ("tuned", "base"))
        return " - ".join(sides)

    def files(self) -> list[VectorFile]:
        """Return the vector files it is read from."""
        own = [self.stored] if self.stored else []
        return own + [file for part in self.parts for file in part.files()]

    @property
    def untied(self) -> dict[str, str]:
        """Heads that its base ties, and it does not -> the embedding whose values they had."""
        return dict(self.manifest.get("untied", {}))

    def mixes(self) -> list[MixDelta]:
        """Return the deltas of a combination."""
        return [delta for delta in self.deltas.values() if isinstance(delta, MixDelta)]

    def inputs(self) -> list[Checkpoint | VectorFile]:
        """Return everything it is read from."""
        sides = (self.stored, self.tuned, self.base, self.origin)
        own = [side for side in sides if side is not None]
        return own + [side for part in self.parts for side in part.inputs()]

    def nonfinite(self) -> dict[str, int]:
        """Return how many values of tensors have no finite delta, at most: as manifests say."""
        if not self.parts:
            entries = self.manifest.get("tensors", {}).items()
            return {name: e["nonfinite"] for name, e in entries if e.get("nonfinite")}
        found: dict[str, int] = {}
        for part in self.parts:
            for name, count in part.nonfinite().items():
                found[name] = min(found.get(name, 0) + count, part.deltas[name].spec.numel)
        return found

    def untransferred(self) -> list[str]:
        """Return the integer tensors in which tuned differs from base, which no delta carries.

        Of a pair they are read: they are few, and small.
        """
        found = [name for part in self.parts for name in part.untransferred()]
        if self.stored is not None:
            found = list(self.manifest["differing"])
        elif self.tuned is not None and self.base is not None:
            for name in (n for n in self.manifest["equal"] if n in self.tuned):
                if digest_values(self.tuned[name]) != digest_values(self.base[name]):
                    found.append(name)
        return list(dict.fromkeys(found))

    def base_digest(self, name: str) -> str | None:
        """Return the digest of the base's tensor that the delta was taken from, if recorded."""
        if self.parts:
            found = {part.base_digest(name) for part in self.parts if name in part.deltas}
            return found.pop() if len(found) == 1 else None
        entry = self.manifest.get("tensors", {}).get(name)
        return entry["base"][1] if entry and entry["base"] else None

    def tuned_dtype(self, name: str, own: str | None = None) -> str:
        """Return the dtype of the tuned model's tensor, "" where there is none.

        `own` is its name in the manifest, where its delta goes by another one.
        """
        delta = self.deltas[name]
        if isinstance(delta, PairDelta):
            return delta.tuned.dtype
        entry = self.manifest.get("tensors", {}).get(own or name)
        return str(entry["tuned"][0]) if entry and entry["tuned"] else ""


def _base_at_hand(adapter: Adapter, place: Place) -> Checkpoint | None:
    """Return the base that an adapter names, where it is needed or on this disk.

    Raises IncompatibleError where it is needed and none is named; else only the verdict would gain.
    """
    said = adapter.base_ref
    if said and adapter.needs_base:
        return open_checkpoint(_base_of(adapter, place), "base of the adapter")
    if adapter.needs_base:
        what = "holds whole modules" if adapter.whole else "replaces or scales weights"
        raise IncompatibleError(
            f"adapter {place.ref}: {what} and names no base to subtract: skillvec diff ADAPTER BASE"
        )
    if said and os.path.exists(os.path.expanduser(said)):
        with contextlib.suppress(SkillvecError):
            return open_checkpoint(said, "base of the adapter")
    return None


def _deltas_of(
    effect: Effect, base: Checkpoint, place: Place
) -> tuple[dict[str, DeltaSource], dict[str, str]]:
    """Return what an adapter does to every floating-point tensor of its base, and notes on it."""
    found = {name: ComputedDelta(d, place.ref) for name, d in effect.deltas.items()}
    heads = {h: under_name(base[of], h) for h, of in effect.untied.items() if h not in base}
    deltas: dict[str, DeltaSource] = {}
    for name, spec in (*base.items(), *heads.items()):
        if name in effect.whole:
            kept = effect.whole[name]
            if kept.shape != spec.shape:
                raise IncompatibleError(
                    f"adapter {place.ref}: {name}: {list(kept.shape)}, base {list(spec.shape)}:"
                    " merge it into its base first"
                )
            deltas[name] = PairDelta(kept, spec, *value_dtype(kept.dtype, spec.dtype))
        elif spec.dtype in FLOATS:
            deltas[name] = found.get(name) or _zero(name, spec.shape)
    layout = f", named as in {effect.layout}" if effect.layout else ""
    notes = {head: f"untied from {of}" for head, of in effect.untied.items()}
    return deltas, notes | dict.fromkeys(found, f"s B A of {place.ref}{layout}")


def _adapter_manifest(
    place: Place, who: str, base: dict[str, Any], integers: dict[str, Any], effect: Effect | None,
    rename: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return what the manifest of an adapter's vector says before its data is read."""
    chosen: dict[str, Any] = {"include": [], "exclude": []}
    chosen |= {"rename": list(rename)} if rename else {}
    matched = {"integers": integers, "tied": {}, "excluded": [], **chosen}
    said = {"untied": effect.untied, "warnings": effect.warnings} if effect is not None else {}
    parent = {"ref": place.ref, "identity": who, "manifest": None, "base": base["ref"],
              "tuned": None, "dtype": "auto", **chosen}  # fmt: skip
    return (
        _pair_manifest(None, base, "auto", matched)
        | {key: value for key, value in said.items() if value}
        | {"formula": "s B A of an adapter", "identity": who, "parents": [parent]}
    )


def _base_of(adapter: Adapter, place: Place) -> str:
    """Return the reference of the base that an adapter names; UsageError where nobody can tell.

    PEFT records what its user wrote, so org/name may be a folder of the disk on which it was
    trained. It is of the Hub where a revision stands beside it, where the adapter came from there,
    or where the client's cache knows it; else the Hub would be asked for the model of a stranger.
    """
    ref = adapter.base_ref or ""
    if os.path.exists(os.path.expanduser(ref)):
        return ref
    if adapter.revision:
        return f"{ref}@{adapter.revision}"
    if place.revision or not hub.is_reference(ref) or hub.is_recorded(ref) or hub.is_cached(ref):
        return ref
    raise UsageError(
        f"adapter {place.ref}: holds whole modules, to be subtracted from its base, {ref}: no such"
        f" folder here, and its config does not say whether it was one: write {place.ref}::BASE (in"
        f" diff: {place.ref} BASE), where BASE is a folder or, for one on the Hub, hf://{ref}"
    )


def _zero(name: str, shape: tuple[int, ...]) -> StoredDelta:
    return StoredDelta(TensorSpec(name, "F32", shape, "", 0, 0), "zero")


def _unknown(ref: str, tensors: Mapping[str, Source]) -> dict[str, Any]:
    """Return what a manifest records of a base of which only the name is known."""
    shapes = sorted((name, list(spec.shape)) for name, spec in tensors.items())
    return {
        "ref": ref, "revision": None, "model_type": None, "config": None, "tokenizer": None,
        "family": digest_bytes(json.dumps(shapes).encode()), "probe": None, "sketch": {},
        "dtypes": {},
    }  # fmt: skip


def _pair_manifest(
    tuned: dict[str, Any] | None, base: dict[str, Any], dtype: str, matched: dict[str, Any]
) -> dict[str, Any]:
    """Return what the manifest of tuned - base says before its data is read."""
    probes = [tuned and tuned["probe"], base["probe"], dtype, *matched["excluded"]]
    probes += [matched[key] for key in ("rename", "rows") if key in matched]
    return {
        "kind": "vector",
        "schema": SCHEMA,
        "formula": "tuned - base",
        "identity": digest_bytes(json.dumps(probes).encode()),
        "base": base,
        "tuned": tuned,
        "parents": [],
        "recipe": None,
        "training": {"method": None, "notes": None},
        "license": None,
        "equal": matched["integers"],
        "tied": matched["tied"],
        "excluded": matched["excluded"],
        **{key: matched[key] for key in CHOSEN if key in matched},
        "dtype": dtype,
    }


def _sum(terms: Sequence[tuple[SkillVector, float]]) -> SkillVector:
    shares = tuple(Share(vector.ref, weight) for vector, weight in terms)
    return SkillVector.combined([vector for vector, _ in terms], Recipe("linear", shares))


def _scaled(share: Share, part: SkillVector) -> Share:
    """Return a share whose weights carry the vector's own factor."""

    def times(weight: Any) -> Any:
        if isinstance(weight, tuple):
            return tuple(part.scale * point for point in weight)
        return None if weight is None else part.scale * weight

    rules = tuple(replace(rule, weight=times(rule.weight)) for rule in share.rules)
    return replace(share, weight=times(share.weight), rules=rules)


def _all_untied(parts: Sequence[SkillVector]) -> list[SkillVector]:
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


def aligned(vectors: Sequence[SkillVector]) -> list[SkillVector]:
    """Return vectors in the layout of the first: seen through views where theirs is another.

    Tensors that no rule brings over stay under their names, for the caller to refuse.
    """
    first, *others = vectors
    return [first, *(_aligned(other, first) for other in others)]


def seen_like(model: Checkpoint, vector: SkillVector) -> Checkpoint:
    """Return a model under the names and in the shapes of a vector; what is left keeps its own."""
    found = bridged(model, _specs(vector), [model.config, _config_of(vector)], (), "strict")
    if found is None:
        return model
    left = {name: model[name] for name in found.unused}
    return model.with_tensors(left | viewed_specs(found, model))


def _specs(vector: SkillVector) -> dict[str, Source]:
    return {name: delta.spec for name, delta in vector.deltas.items()}


def _config_of(vector: SkillVector) -> dict[str, Any]:
    """Return what is known of the config of a vector's base."""
    if vector.base is not None and vector.base.config:
        return vector.base.config
    return {"model_type": vector.manifest["base"]["model_type"]}


def _aligned(vector: SkillVector, first: SkillVector) -> SkillVector:
    mine, wanted = _specs(vector), _specs(first)
    found = bridged(mine, wanted, [_config_of(first), _config_of(vector)], (), "strict")
    if found is None:
        return vector
    deltas: dict[str, DeltaSource] = {}
    entries: dict[str, Any] = {}
    places: dict[str, str] = {}
    stated = vector.manifest.get("tensors", {})
    for name, view in found.views.items():
        (source, *more) = view.sources
        if not more and view == whole(source, mine[source].shape):
            deltas[name], places[source] = vector.deltas[source], name
            entries |= {name: stated[source]} if source in stated else {}
            continue
        deltas[name] = viewed_delta(name, view, vector)
        lost = sum(stated[part].get("nonfinite", 0) for part in view.sources if part in stated)
        said = {"dtype": deltas[name].spec.dtype, "shape": list(view.shape), "codec": "view"}
        entries[name] = said | {"digest": name, "base": None, "tuned": None, "nonfinite": lost}
    left = left_over(found, vector.ref, mine, wanted)
    deltas |= {name: vector.deltas[name] for name in left}
    entries |= {name: stated[name] for name in left if name in stated}
    manifest = vector.manifest | ({"tensors": entries} if stated else {})
    moved = {head: places.get(of, of) for head, of in vector.untied.items()}
    manifest |= {"untied": moved} if moved else {}
    return replace(vector, deltas=deltas, manifest=manifest, notes={**vector.notes, **found.notes})


def viewed_delta(name: str, view: View, vector: SkillVector) -> ViewDelta:
    """Return a delta of another layout: `view` is of names of the vector's own.

    Raises IncompatibleError where that vector has to be measured first.
    """
    boxes = tuple(box._replace(source=vector.deltas[box.source]) for box in view.boxes)
    if any(isinstance(b.source, MixDelta) and b.source.operator.passes(b.source.parameters)
           for b in boxes):  # fmt: skip
        raise IncompatibleError(
            f"{name}: the target has another layout, and {vector.ref} must be measured in its own:"
            " store the combination first (skillvec combine -o)"
        )
    wide = any(delta_dtype(box.source) == "F64" for box in boxes)
    spec = TensorSpec(name, "F64" if wide else "F32", view.shape, "", 0, 0)
    return ViewDelta(spec, View(view.shape, boxes))


def _common_names(parts: Sequence[SkillVector]) -> list[str]:
    """Return the names of all vectors, or refuse what does not match."""
    for part in parts:
        if part.adapter is not None:
            raise UsageError(
                f"{part.ref}: an adapter without its base cannot be combined: skillvec diff ADAPTER"
                " BASE -o makes a vector of it"
            )
    if any(part.parts for part in parts):
        raise TypeError("a combination cannot be combined again as it is: save it first")
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


def _combined_manifest(parts: Sequence[SkillVector], recipe: Recipe) -> dict[str, Any]:
    """Return what the manifest of a combination says before its data is read."""
    manifests = [part.manifest for part in parts]
    base = dict(manifests[0]["base"])
    names = {name for part in parts for name in part.deltas}
    bases = ({p.base_digest(name) for p in parts if name in p.deltas} - {None} for name in names)
    differ = len({m["base"]["probe"] for m in manifests}) > 1 or any(len(b) > 1 for b in bases)
    if differ:
        base["probe"] = None  # no model is the base of them all
    words = recipe.to_dict()
    identities = [m["identity"] for m in manifests]
    shares = zip(words["vectors"], identities, strict=True)
    said = words | {"vectors": [share | {"vector": who} for share, who in shares]}
    licenses = {m["license"] for m in manifests}
    tied = dict(manifests[0]["tied"])
    told = {
        "untied": {head: of for part in parts for head, of in part.untied.items()},
        "warnings": list(dict.fromkeys(said for part in parts for said in part.warnings)),
    }
    weights = " ".join(
        f"{share.vector}={share.weight:g}" if isinstance(share.weight, float) else share.vector
        for share in recipe.shares
    )
    return {
        "kind": "vector",
        "schema": SCHEMA,
        "formula": f"{recipe.op}({weights})",
        "identity": digest_bytes(json.dumps(said).encode()),
        "base": base,
        "tuned": None,
        "parents": [
            {
                "ref": part.ref,
                "identity": part.manifest["identity"],
                "manifest": part.stored.digest if part.stored else None,
                "base": part.manifest["base"]["ref"],
                "tuned": part.manifest["tuned"]["ref"] if part.manifest["tuned"] else None,
                "dtype": part.manifest["dtype"],
                **{key: part.manifest[key] for key in CHOSEN if key in part.manifest},
            }
            for part in parts
        ],
        "recipe": words,
        "training": {"method": None, "notes": None},
        "license": licenses.pop() if len(licenses) == 1 else None,
        "equal": {},
        "include": [],
        "exclude": [],
        "tied": {name: twin for name, twin in tied.items()
                 if all(m["tied"].get(name) == twin for m in manifests)},
        "excluded": [name for name in manifests[0]["excluded"]
                     if all(name in m["excluded"] for m in manifests)],
        **{key: said for key, said in told.items() if said},
    }  # fmt: skip


def _match(
    tuned: Checkpoint,
    base: Checkpoint,
    include: Sequence[str],
    exclude: Sequence[str],
    skipped: Mapping[str, str],
    hints: Sequence[str],
) -> dict[str, Any]:
    """Sort the names of two checkpoints into deltas, integers, tied and excluded, or refuse."""
    names = list(dict.fromkeys((*base, *tuned)))
    refuse_idle_globs(names, include, exclude)
    excluded = [n for n in names if n in skipped or not is_selected(n, include, exclude)]
    found: dict[str, Any] = {"deltas": [], "integers": {}, "tied": {}, "excluded": excluded}
    problems = defaultdict(list)
    unread = unexplained(tuned) | unexplained(base)
    alone = [name for name in names if name not in tuned or name not in base]
    kinds = {name: recomputed(tuned.get(name) or base[name]) for name in alone}
    found["computed"] = {
        name: f"{kind}, which the model computes: only in {(tuned if name in tuned else base).ref}"
        for name, kind in kinds.items() if kind and name not in excluded
    }  # fmt: skip
    found["excluded"] += found["computed"]
    alone = [name for name in alone if name not in found["computed"]]
    for name in names:
        if name in found["computed"]:
            continue
        if name in skipped or not is_selected(name, include, exclude):
            continue
        if name in SIDE:
            said = f"{name}: this name is reserved for the vector file"
            problems["of reserved names"].append(said)
        elif name in unread:
            problems["unread"].append(f"{unread[name].text}: nothing says how to read it")
        elif name not in tuned or name not in base:
            here, there = (tuned, base) if name in tuned else (base, tuned)
            may_tie = there.ties_embeddings is not False and len(alone) <= MAX_TIED
            twins = find_tied(here, name, there) if may_tie else []
            twin = next((t for t in twins if is_selected(t, include, exclude)), None)
            if twin is not None:
                found["tied"][name] = twin
            else:
                hint = ""
                if here.ties_embeddings and name.endswith("lm_head.weight"):
                    hint = " (tied by its config, but its bytes are those of no other tensor)"
                kind = f"only in {here.ref}"
                problems[kind].append(f"{name} {list(here[name].shape)}: {kind}{hint}")
        elif tuned[name].shape != base[name].shape:
            shapes = f"{list(tuned[name].shape)}, base {list(base[name].shape)}"
            problems["of different shapes"].append(f"{name}: tuned {shapes}")
        else:
            dtypes = tuned[name].dtype, base[name].dtype
            if dtypes[0] in FLOATS and dtypes[1] in FLOATS:
                found["deltas"].append(name)
            elif dtypes[0] == dtypes[1] and not _codes_differ(tuned[name], base[name]):
                found["integers"][name] = [dtypes[0], None]
            elif dtypes[0] == dtypes[1]:
                problems["of integers"].append(
                    f"{name} {dtypes[0]} {list(base[name].shape)}:"
                    f" {'integers' if dtypes[0] in INTEGERS else 'values'} that differ, and"
                    " nothing says that they are no weights"
                )
            else:
                said = f"{name}: tuned is {dtypes[0]}, base is {dtypes[1]}"
                problems["of different dtypes"].append(said)
    if problems:
        for side, other in ((tuned, base), (base, tuned)):
            wanted = set(side) - set(other) - set(excluded)
            if told := lone_factors(side, sorted(wanted)):
                raise IncompatibleError(told)
            sizes = {n: other[n].shape for n in placeholders(side) if n in other}
            if empty := [n for n in placeholders(side) if sizes.get(n) != (0,)]:
                raise IncompatibleError(empty_weights(side, empty))
        raise IncompatibleError(
            f"{tuned.ref} and {base.ref} do not match (--exclude GLOB leaves tensors out):\n"
            + "\n".join([up_to_five_each(problems), *hints])
        )
    if not found["deltas"]:
        raise IncompatibleError(f"{tuned.ref} and {base.ref}: no tensor is left to subtract")
    return found


def _codes_differ(tuned: Source, base: Source) -> bool:
    """Return whether what may be a weight, or the codes of one, differs: no side tensor may.

    Those are integers, and complex numbers, of which no delta is made.
    """
    codes = tuned.dtype not in STORAGE_DTYPE
    codes = codes or (tuned.dtype in INTEGERS and may_be_weight(base.name, base))
    return codes and digest_values(tuned) != digest_values(base)
