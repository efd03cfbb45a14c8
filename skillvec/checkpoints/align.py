"""One model in the layout of another: views for names, shapes and rows that differ.

Hides the search for a bridge; what no rule brings over is left to the caller to refuse. The other
layouts that a checkpoint itself has are those in which transformers holds it in memory, and saves
it (`layouts_of`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.layouts import SKIPPED, Bridge, bridge, loaded_as, viewed_specs
from skillvec.checkpoints.model_classes import ModelClass, classes_of, need_model_classes
from skillvec.checkpoints.transformers_layouts import all_of
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.files.tensors import Source, Viewed, Widened
from skillvec.files.views import Index, View, concatenate, whole


@dataclass(frozen=True)
class Layout:
    """A checkpoint as a class of transformers holds it in memory, or, if `is_saved`, saves it."""

    checkpoint: Checkpoint
    kind: ModelClass
    is_saved: bool

    @property
    def label(self) -> str:
        return f"{self.kind.name} {'as saved' if self.is_saved else 'in memory'}"

    @property
    def shapes(self) -> Mapping[str, Index]:
        """All its names, those too that the checkpoint does not have (tied heads)."""
        return self.kind.saved() if self.is_saved else self.kind.shapes

    @property
    def tied(self) -> Mapping[str, str]:
        """Heads that are one with an embedding."""
        if not self.is_saved:
            return self.kind.tied
        names = [[self.kind.file_name(name) for name in pair] for pair in self.kind.tied.items()]
        return {head: of for head, of in names if head is not None and of is not None}

    @property
    def model(self) -> Checkpoint:
        """The checkpoint under the names of the layout, as far as it has them."""
        return self.checkpoint.with_tensors(viewed_specs(self._found[0], self.checkpoint))

    @property
    def back(self) -> Mapping[str, View]:
        """Tensors of the checkpoint as views over names of the layout: those that it holds."""
        return self._found[1].views

    @property
    def places(self) -> dict[str, str]:
        """Names of the layout -> those of the checkpoint, for tensors that are whole in both."""
        return {
            view.boxes[0].source: name for name, view in self.back.items()
            if view == all_of(view.boxes[0].source, self.shapes[view.boxes[0].source])
        }  # fmt: skip

    @property
    def hints(self) -> list[str]:
        """Why tensors of the layout are not made of the checkpoint's, where that is known."""
        return self._found[0].hints

    def file_name(self, name: str) -> str | None:
        """Return what transformers calls a tensor in a file, None where it is not whole there."""
        return name if self.is_saved else self.kind.file_name(name)

    @cached_property
    def _found(self) -> tuple[Bridge, Bridge]:
        files = {name: tuple(spec.shape) for name, spec in self.checkpoint.items()}
        if not self.is_saved:
            return loaded_as(files, self.shapes, self.kind.name, self.kind.fresh)
        sides, configs = (files, self.shapes), [self.checkpoint.config]
        return bridge(*sides, configs=configs), bridge(*sides[::-1], configs=configs)


def layouts_of(checkpoint: Checkpoint, named: Sequence[str] = ()) -> Iterator[Layout]:
    """Yield a checkpoint as transformers' classes hold it in memory, and as they save it.

    The classes `named` come first, then those that its config leads to. Without a config.json, or
    where transformers makes no model of it, there is none. Imports transformers; UsageError where
    it is missing.
    """
    if not checkpoint.config:
        return
    need_model_classes(f"{checkpoint.ref}: seeing it as the classes of models hold it in memory")
    for kind in classes_of(checkpoint.config, len(checkpoint), named):
        yield Layout(checkpoint, kind, False)
        if kind.saved().keys() not in (kind.shapes.keys(), checkpoint.keys()):
            yield Layout(checkpoint, kind, True)


def in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as the class of its config.json holds it in memory.

    Raises IncompatibleError where transformers makes no model of it.
    """
    layout = next(layouts_of(checkpoint), None)
    if layout is None:
        raise IncompatibleError(
            f"{checkpoint.ref}: transformers makes no model of its config.json, so nothing says how"
            " it names tensors in memory"
        )
    return layout.model


def tied_names(checkpoint: Checkpoint) -> dict[str, str] | None:
    """Return the tensors that a checkpoint's model ties, head -> embedding, by names of its files.

    A head that no file holds has the name that transformers would give it there. None where
    transformers makes no model of the config.
    """
    layout = next(layouts_of(checkpoint), None)
    if layout is None:
        return None
    tied = layout.tied
    if all(of in checkpoint or head in checkpoint for head, of in tied.items()):
        return dict(tied)
    places = layout.places
    names = [[places.get(name) or layout.file_name(name) or name for name in pair]
             for pair in tied.items()]  # fmt: skip
    return dict(names)


def seen_as(
    tuned: Checkpoint, base: Checkpoint, rename: Sequence[str] = (), rows: str = "strict"
) -> tuple[Checkpoint, dict[str, str], dict[str, str], list[str]]:
    """Return `tuned` in the layout of `base`, notes, tensors skipped and why, hints for errors.

    Tensors that no rule brings over keep their names, for the caller to refuse. Rows that `tuned`
    does not have are those of `base`, so that their difference is 0.
    """
    found = bridged(tuned, base, [tuned.config, base.config], rename, rows)
    if found is None:
        return tuned, {}, {}, []
    tensors: dict[str, Source] = dict(viewed_specs(found, tuned))
    for name, view in found.views.items():
        kept = max((box.offset[0] + box.sizes[0] for box in view.boxes if box.sizes), default=0)
        if not view.shape or kept >= view.shape[0]:
            continue
        sides: list[Source] = [tensors[name], base[name]]
        if sides[0].dtype != sides[1].dtype:
            wide = "F64" if "F64" in (sides[0].dtype, sides[1].dtype) else "F32"
            sides = [side if side.dtype == wide else Widened(name, wide, side) for side in sides]
        top = whole(sides[0], view.shape).slice(0, 0, kept)
        rest = whole(sides[1], view.shape).slice(0, kept, view.shape[0])
        tensors[name] = Viewed(name, sides[0].dtype, concatenate([top, rest], 0))
    unused = {name: tuned[name] for name in left_over(found, tuned.ref, tuned, base)}
    return tuned.with_tensors(tensors | unused), found.notes, found.skipped, hints_of(found)


def bridged(
    mine: Mapping[str, Any], wanted: Mapping[str, Any], configs: Sequence[Mapping[str, Any]],
    rename: Sequence[str], rows: str,
) -> Bridge | None:  # fmt: skip
    """Return how tensors `wanted` are made of `mine`; None where names and shapes fit as they are.

    Both map names to what has a shape.
    """
    if rows not in ("strict", "common", "skip"):
        raise UsageError(f"rows {rows!r}: expected strict, common or skip")
    shapes = [{name: tuple(item.shape) for name, item in side.items()} for side in (mine, wanted)]
    alone = [set(shapes[0]) - set(shapes[1]), set(shapes[1]) - set(shapes[0])]
    differ = any(shapes[0][name] != shapes[1][name] for name in set(shapes[0]) & set(shapes[1]))
    if not rename and not differ and not all(alone):
        return None
    return bridge(*shapes, configs=configs, rename=rename, rows=rows)


def left_over(
    found: Bridge, ref: str, mine: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[str]:
    """Return tensors that go nowhere, for the caller to refuse under their names.

    Raises IncompatibleError for those of which a part is used, whose name another one has taken, or
    that would fit under the name that a rule took from them.
    """
    unused = {name: why for name, why in found.unused.items() if why != SKIPPED}
    held = {name for view in found.views.values() for name in view.sources}
    problems = [
        f"{name}: {why or 'goes nowhere under its new name, and the old one is wanted too'}"
        for name, why in unused.items()
        if name in found.views
        or name in held
        or (name in wanted and tuple(mine[name].shape) == tuple(wanted[name].shape))
    ]
    if problems:
        raise IncompatibleError(
            f"{ref}: tensors that the other layout does not take whole:\n"
            + "\n".join([up_to_five(problems), *hints_of(found)])
        )
    return list(unused)


def hints_of(found: Bridge) -> list[str]:
    """Return what helps where tensors are left that no rule brings over."""
    if not found.rows_differ:
        return found.hints[:5]
    return [
        "vocabularies of different length: --rows common takes the rows that both have, --rows skip"
        " leaves the tensors out"
    ]
