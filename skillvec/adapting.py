"""What an adapter does to a checkpoint, in the checkpoint's own layout.

An adapter names modules of a model in memory, of the class and the version of transformers that it
was trained with; files have other names and may hold experts one by one, or joined. Hides in which
layout the two meet: that of the files, those of transformers' classes (`bridging.layouts_of`), or
one of them under another prefix. An adapter is fitted there, as PEFT fits it, and what it does is
seen through the views back. Refused: names that fit nowhere, or in two ways under other prefixes.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from skillvec import hub
from skillvec.adapters import Adapter
from skillvec.bridging import Layout, layouts_of, tied_names
from skillvec.checkpoint import Checkpoint, open_checkpoint
from skillvec.conversions import all_of
from skillvec.deltas import ComputedDelta, DeltaSource, PairDelta, value_dtype
from skillvec.errors import IncompatibleError, SkillvecError, UsageError, up_to_five
from skillvec.kernels import FLOATS
from skillvec.layouts import moves, numbered, renamed
from skillvec.lineage import tied_heads, under_name
from skillvec.lora_fit import fit_adapter
from skillvec.lora_settings import MERGE
from skillvec.lora_ties import AdapterEffect
from skillvec.lowrank import LoraDelta
from skillvec.manifest import Manifest, ModelFacts, Parent, TensorSide
from skillvec.pairs import Sorted, announce_pair
from skillvec.rules import selection
from skillvec.sources import Derived, Index, Source, View, Viewed, row_major, whole
from skillvec.storage import Place, digest_bytes
from skillvec.vectorfile import zero_delta


def effect_on(adapter: Adapter, base: Checkpoint, rename: Sequence[str] = ()) -> AdapterEffect:
    """Return what an adapter does to a model, as PEFT does it, under the names of the model.

    `rename` rules (REGEX=REPLACEMENT) go first, over the adapter's names of weights. Raises
    IncompatibleError where it does not fit, or nothing tells what the model ties.
    """
    if rename:
        new = renamed(adapter.shapes, rename)
        adapter = adapter.renamed({old: name for name, old in new.items()})
    effect = _met(adapter, base)
    effect.warnings.extend(adapter.notes)
    matrices = {n: s.shape for n, s in base.items() if len(s.shape) == 2 and not numbered(n)}
    for name in adapter.copies if not base.config else ():
        if name in matrices and list(matrices.values()).count(matrices[name]) == 1:
            effect.warnings.append(
                f"{name}: saved whole, and no config.json says whether the base ties its head to"
                " it: such a head changes with it here, and stays as it was with PEFT"
            )
    return effect


def _met(adapter: Adapter, base: Checkpoint) -> AdapterEffect:
    """Return the effect by the layout in which they meet: that of the files, if they do there."""
    refusal, kind = None, base.config.get("model_type")
    try:
        tied = tied_heads(base, adapter.shapes, adapter.copies, partial(tied_names, base))
        if not adapter.misfits({**base, **{head: base[of] for head, of in tied.items()}}):
            return fit_adapter(adapter, base, tied, kind, guess=not base.config)
    except IncompatibleError as error:  # what nothing tells of files, a model in memory may
        refusal = error
    layouts = []
    for layout in layouts_of(base, adapter.classes):
        if not adapter.misfits(layout.shapes):
            return _through(layout, adapter, base)
        layouts.append(layout)
    if refusal is not None and layouts:
        raise refusal
    for layout in layouts:
        old = layout.kind.loaded_names(adapter.shapes)
        if not layout.is_saved and not adapter.misfits(layout.shapes, old):
            return _through(layout, adapter.renamed(old), base)
    for layout in layouts:
        moved = _moved(adapter, layout.shapes, layout.label)
        if moved is not None:
            return _through(layout, moved, base)
    adapter = _moved(adapter, {name: s.shape for name, s in base.items()}, base.ref) or adapter
    tied = tied_heads(base, adapter.shapes, adapter.copies, partial(tied_names, base))
    return fit_adapter(adapter, base, tied, kind)


def _moved(adapter: Adapter, there: Mapping[str, Index], where: str) -> Adapter | None:
    """Return an adapter under the one other prefix under which it fits, None where there is none.

    Raises IncompatibleError where there are more.
    """
    modules = dict.fromkeys(f"{name.rpartition('.')[0]}.weight" for name in there)
    ways = [way for way in moves(adapter.shapes, {**modules, **there})
            if not adapter.misfits(there, way)]  # fmt: skip
    if len(ways) > 1:
        (old, _), *_ = ways[0].items()
        raise IncompatibleError(
            f"{adapter.what}: fits {where} in {len(ways)} ways: say which with --rename"
            f" REGEX=REPLACEMENT; {old} may be\n" + up_to_five([way[old] for way in ways])
        )
    return adapter.renamed(ways[0]) if ways else None


def _through(layout: Layout, adapter: Adapter, base: Checkpoint) -> AdapterEffect:
    """Fit an adapter in a layout of the base; return what it does, seen in that of the base."""
    model = layout.model
    tied = tied_heads(model, adapter.shapes, adapter.copies, lambda: layout.tied)
    held = {**model, **{head: model[of] for head, of in tied.items()}}
    if missing := adapter.misfits(held):
        raise IncompatibleError(
            f"{adapter.what}: {layout.label} has what it changes, but transformers' mapping does"
            f" not tell how that is made of the files of {base.ref}: {MERGE}:\n"
            + "\n".join([up_to_five(missing), *layout.hints[:5]])
        )
    turned = layout.kind.turned if not layout.is_saved else None
    effect = fit_adapter(adapter, model, tied, model.config.get("model_type"), turned)
    deltas: dict[str, Any] = {}  # also what views put together
    made = AdapterEffect(deltas, {}, effect.notes, {}, effect.warnings, layout.label)
    used: Counter[str] = Counter()
    problems = []
    for name, view in layout.back.items():
        parts = [box for box in view.boxes if box.source in effect.deltas]
        wholes = [box for box in view.boxes if box.source in effect.whole]
        for box in (*parts, *wholes):
            used[box.source] += prod(box.sizes)
        if wholes and len(wholes) < len(view.boxes):
            problems.append(f"{name}: {wholes[0].source} is saved whole, and is a part of it")
        elif wholes:
            made.whole[name] = _whole(name, view, layout.shapes, effect.whole)
        elif parts:
            deltas[name] = _delta(name, View(view.shape, tuple(parts)), effect.deltas)
    places = layout.places
    for head, of in effect.untied.items():
        place = places.get(head)
        if place is None:
            place = layout.file_name(head) if layout.file_name(of) == places.get(of) else None
            if place is None:
                problems.append(f"{head}: nothing tells what it is called beside {of}")
                continue
            if head in effect.deltas:
                deltas[place] = effect.deltas[head]
            if head in effect.whole:
                made.whole[place] = effect.whole[head]
        made.untied[place] = places[of]
    for name in (*effect.deltas, *effect.whole):
        if name not in effect.untied and used[name] < prod(layout.shapes[name]):
            problems.append(f"{name}: {used[name]} of {prod(layout.shapes[name])} values are there")
    if problems:
        raise IncompatibleError(
            f"{adapter.what}: what it changes of {layout.label} is no whole tensor of the base, or"
            f" not there: {MERGE}:\n{up_to_five(problems)}"
        )
    return made


def _delta(name: str, view: View, deltas: Mapping[str, LoraDelta]) -> Derived:
    """Return a delta seen through a view: parts of it that are deltas of their own, if they are."""
    boxes = []
    for box in view.boxes:
        delta = deltas[box.source]
        if box == all_of(box.source, delta.shape).boxes[0]:
            part: LoraDelta | None = replace(delta, name=name)
        else:
            part = delta.part(name, box.sizes, box)
        if part is not None:
            box = box._replace(start=0, strides=row_major(box.sizes))
        boxes.append(box._replace(source=part or delta))
    made = View(view.shape, tuple(boxes))
    first: Derived = boxes[0].source
    return first if made == whole(first, view.shape) else Viewed(name, "F32", made)


def _whole(
    name: str, view: View, shapes: Mapping[str, Index], wholes: Mapping[str, Source]
) -> Source:
    """Return weights that are saved whole, seen through a view of tensors of these `shapes`."""
    first = view.boxes[0].source
    if view == all_of(first, shapes[first]):
        return wholes[first]  # perhaps of other rows, which whoever subtracts refuses
    kept = {box.source: wholes[box.source] for box in view.boxes}
    for source, weight in kept.items():
        if weight.shape != shapes[source]:
            raise IncompatibleError(
                f"{source}: saved whole as {list(weight.shape)}, base {list(shapes[source])}, of"
                f" which {name} is a part: {MERGE}"
            )
    dtypes = {weight.dtype for weight in kept.values()}
    if len(dtypes) > 1:
        raise IncompatibleError(
            f"{name}: made of weights that are saved whole, of {', '.join(sorted(dtypes))}:"
            " expected one dtype"
        )
    boxes = tuple(box._replace(source=kept[box.source]) for box in view.boxes)
    return Viewed(name, dtypes.pop(), View(view.shape, boxes))


# ------------------------------------------------------------------------- an adapter and its base


def meet_base(
    adapter: Adapter, place: Place, base: Checkpoint | None, rename: Sequence[str],
    spare: Sequence[str],
) -> tuple[Checkpoint | None, AdapterEffect | None, Sequence[str]]:  # fmt: skip
    """Return the base of an adapter, what it does to it, and the rules under which it fits.

    The base is the one given, or the one that the adapter names; none if only the target that it
    meets can tell. The rules in `spare` are for an adapter that does not fit without any.
    """
    given = base is not None
    base = base if base is not None else _base_at_hand(adapter, place)
    if base is None:
        return None, None, rename
    try:
        return base, effect_on(adapter, base, rename), rename
    except IncompatibleError:
        if not spare:
            raise
    try:
        return base, effect_on(adapter, base, spare), spare
    except SkillvecError:
        if adapter.needs_base or given:
            raise
    return None, None, rename


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


def make_deltas(
    effect: AdapterEffect, base: Checkpoint, place: Place
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
            deltas[name] = found.get(name) or zero_delta(name, spec.shape)
    layout = f", named as in {effect.layout}" if effect.layout else ""
    notes = {head: f"untied from {of}" for head, of in effect.untied.items()}
    return deltas, notes | dict.fromkeys(found, f"s B A of {place.ref}{layout}")


def announce_adapter(
    place: Place, said: list[Any], base: ModelFacts, integers: dict[str, TensorSide],
    effect: AdapterEffect | None, rename: Sequence[str],
) -> Manifest:  # fmt: skip
    """Return what the manifest of an adapter's vector says before its data is read.

    `said` is what tells it from other adapters.
    """
    chosen = selection((), (), rename, "strict")
    told = [*said, *([list(rename)] if rename else [])]
    who = digest_bytes(json.dumps(told, sort_keys=True).encode())
    manifest = announce_pair(None, base, "auto", Sorted([], integers, {}, [], {}), chosen)
    if effect is not None and effect.untied:
        manifest["untied"] = effect.untied
    if effect is not None and effect.warnings:
        manifest["warnings"] = effect.warnings
    manifest["formula"], manifest["identity"] = "s B A of an adapter", who
    parent: Parent = {"ref": place.ref, "identity": who, "manifest": None, "base": base["ref"],
                      "tuned": None, "dtype": "auto", **chosen}  # fmt: skip
    manifest["parents"] = [parent]
    return manifest


def describe_unknown(adapter: Adapter, tensors: Mapping[str, Source]) -> ModelFacts:
    """Return what a manifest records of a base of which only the name is known."""
    shapes = sorted((name, list(spec.shape)) for name, spec in tensors.items())
    return {
        "ref": adapter.base_ref or "", "revision": None, "model_type": None, "config": None,
        "tokenizer": None, "family": digest_bytes(json.dumps(shapes).encode()), "probe": None,
        "sketch": {}, "dtypes": {},
    }  # fmt: skip
