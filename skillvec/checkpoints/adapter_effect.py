"""An adapter meets its base: in the layout of its files, in memory, as saved, or renamed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from skillvec.checkpoints.align import Layout, layouts_of, tied_names
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.lora import Adapter
from skillvec.checkpoints.lora_deltas import LoraDelta
from skillvec.checkpoints.lora_fit import fit_adapter
from skillvec.checkpoints.lora_settings import MERGE
from skillvec.checkpoints.lora_ties import AdapterEffect
from skillvec.checkpoints.renaming import moves, numbered, renamed
from skillvec.checkpoints.ties import tied_heads
from skillvec.checkpoints.transformers_layouts import all_of
from skillvec.errors import IncompatibleError, up_to_five
from skillvec.files.tensors import Derived, Source, Viewed
from skillvec.files.views import Index, View, row_major, whole


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
