"""The skill vector: how it is opened and made, scaled, added and subtracted.

What has no meaning (a vector plus a model) is a TypeError that says so. Of what kind a vector is,
and what that means, skillvec.vectors.kinds says.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

from skillvec.checkpoints.adapter_folder import is_adapter
from skillvec.checkpoints.align import seen_as
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.fingerprint import identity
from skillvec.checkpoints.folder import read_json
from skillvec.checkpoints.locate import locate, written
from skillvec.checkpoints.opening import (
    explain_factors,
    explain_placeholders,
    find_placeholders,
    open_checkpoint,
    open_tensors,
)
from skillvec.checkpoints.side_files import ADAPTER_CONFIG
from skillvec.checkpoints.unread import LeftOut, nothing_left_out, unexplained
from skillvec.errors import IncompatibleError, UsageError, printable
from skillvec.files.file import Place
from skillvec.files.fingerprints import refuse_stale
from skillvec.files.tensors import digest_values
from skillvec.ops.kernels import FLOATS
from skillvec.ops.merge_methods import OPERATORS, Operator
from skillvec.vectors import kinds
from skillvec.vectors.combining import align_vectors, announce_combination, lend_heads, mix
from skillvec.vectors.deltas.base import DeltaSource, dtype_of
from skillvec.vectors.deltas.pair import PairDelta, value_dtype
from skillvec.vectors.displacement import Displacement
from skillvec.vectors.fishers import open_fishers, weigh_by
from skillvec.vectors.matrix_parts import list_unprojected, with_digests
from skillvec.vectors.pairs import Sorted, announce_pair, sort_names
from skillvec.vectors.reader import VectorFile, find_vector
from skillvec.vectors.recipe import Recipe, Share, leaving_out, selection
from skillvec.vectors.values import Readable


class SkillVector(Readable):
    """A skill vector: tuned - base, or several of them merged, times `scale`.

    skillvec.diff and skillvec.combine return one, and SkillVector.open opens a file. Sums such as
    `0.7 * v - w / 2` and `sum(vectors)` are vectors as well: nothing is read before it is used, and
    `save` writes them to a file. `v["name"]` is one tensor as a numpy array (fp32, or fp64 where a
    side is), `v["name", 10:20]` ten rows of it, and `v.items()` gives all, one in memory at a time.

    `deltas` maps tensor names to where the delta comes from. `manifest` is what the file says or
    will say, `notes` how tensors were found. `parts` are those of a combination, `report` that of
    the verb that wrote it. A vector plus a model is a TypeError: skillvec.apply does that.
    """

    if not TYPE_CHECKING:  # what only some kinds have was None in the others, and users may ask
        stored = tuned = base = adapter = origin = recipe = None

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
            tuned, pair, base = written(ref, role).partition("::")
            if pair:
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
        if told := explain_factors(opened, opened):
            raise IncompatibleError(told)
        raise IncompatibleError(
            f"{role} {opened.ref}: this is not a skill vector (no manifest in its header);"
            " skillvec diff makes one from two models, and apply takes the model first"
        )

    @staticmethod
    def of_file(stored: VectorFile) -> "StoredVector":
        """Return the vector of a file that is open."""
        said = tuple(map(printable, stored.manifest.get("warnings", ())))
        return StoredVector(
            stored.ref, stored.deltas, stored.manifest, warnings=said, stored=stored
        )

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
        is_excluded = leaving_out(include, exclude)

        def unused(name: str) -> bool:
            return is_excluded(name) or left_out(name)

        if not isinstance(tuned, Checkpoint):
            place = tuned if isinstance(tuned, Place) else locate(tuned, "tuned")
            as_it_is = dtype == "auto" and not (include or exclude) and rows == "strict"
            if is_adapter(place):
                if not as_it_is:
                    raise UsageError(f"tuned {place.ref}: an adapter is taken whole, in fp32")
                return SkillVector.adapted(place, open_checkpoint(base, "base"), rename)
            if place.ref.endswith(".safetensors") and _is_patch(place):
                if not as_it_is or rename:
                    raise UsageError(f"tuned {place.ref}: a patch is taken whole, as it is")
                return SkillVector.patched(place, base)
            tuned = open_checkpoint(place, "tuned", unused)
        base = open_checkpoint(base, "base", unused)
        seen, notes, skipped, hints = seen_as(tuned, base, rename, rows)
        unread = unexplained(seen) | unexplained(base)
        skipped = skipped | {name: "left out" for name in unread if left_out(name)}
        chosen = selection(include, exclude, rename, rows)
        found = sort_names(seen, base, chosen, skipped, hints)
        deltas = {
            name: PairDelta(
                seen[name], base[name], *value_dtype(seen[name].dtype, base[name].dtype, kept)
            )
            for name in found.deltas
        }
        manifest = announce_pair(identity(tuned), identity(base), dtype, found, chosen)
        ref, notes = f"{tuned.ref}::{base.ref}", notes | found.computed
        return PairVector(ref, deltas, manifest, notes=notes, tuned=seen, base=base)

    @staticmethod
    def adapted(
        place: Place, base: Checkpoint | None = None, rename: Sequence[str] = (),
        spare: Sequence[str] = (),
    ) -> "AdapterVector":  # fmt: skip
        """Return what a PEFT adapter adds to its base, s B A in fp32, without computing it.

        Modules that it holds whole (modules_to_save) need the base: `base`, or where the adapter
        says it is. Without a base it is fitted to the target: tensors that it does not name stay.
        `rename` rules are applied to the adapter's names of weights, those in `spare` only where
        they do not fit the base without: if not with them either, the target alone counts.
        """
        from skillvec.checkpoints.lora import open_adapter  # adapters are rare, and many files
        from skillvec.vectors import adapted

        opened = open_tensors(place, "adapter")
        if empty := find_placeholders(opened):
            raise IncompatibleError(f"adapter {explain_placeholders(opened, empty)}")
        config = read_json(place.files[ADAPTER_CONFIG])
        adapter = open_adapter(place.ref, config, opened, f"adapter {place.ref}")
        base, effect, rename = adapted.meet_base(adapter, place, base, rename, spare)
        deltas: dict[str, DeltaSource] = {}
        notes: dict[str, str] = {}
        if base is not None and effect is not None:
            deltas, notes = adapted.make_deltas(effect, base, place)
        said = [config, [[name, digest_values(spec)] for name, spec in sorted(opened.items())]]
        ours = adapted.describe_unknown(adapter, opened) if base is None else identity(base)
        integers = {n: [s.dtype, None] for n, s in (base or {}).items() if n not in deltas}
        manifest = adapted.announce_adapter(place, said, ours, integers, effect, rename)
        return AdapterVector(
            place.ref if base is None else f"{place.ref}::{base.ref}", deltas, manifest,
            notes=notes, warnings=tuple(manifest.get("warnings", ())), adapter=adapter,
            origin=opened, base=base,
        )  # fmt: skip

    @staticmethod
    def patched(
        patch: str | os.PathLike[str] | Place, base: str | os.PathLike[str] | Place | Checkpoint
    ) -> "PatchVector":
        """Return what a patch (changed values of the exact base) adds, without computing it.

        Its names may be those of the base in memory. Raises IncompatibleError for one that does not
        fit the base, FormatError for a broken one.
        """
        from skillvec.checkpoints.patch import open_patch  # patches are rare
        from skillvec.checkpoints.patch_effect import touched_by

        base = open_checkpoint(base, "base")
        lists = open_patch(patch)
        touched, notes = touched_by(lists, base)
        tuned = lists.tuned({name: touched.get(name, spec) for name, spec in base.items()})
        deltas = {
            name: PairDelta(tuned[name], spec, *value_dtype(spec.dtype, spec.dtype))
            for name, spec in base.items() if spec.dtype in FLOATS
        }  # fmt: skip
        ours = identity(base)
        theirs = ours.copy()
        theirs.update({"ref": lists.ref, "revision": None, "probe": lists.digest})
        integers = {n: [spec.dtype, None] for n, spec in base.items() if n not in deltas}
        found = Sorted(list(deltas), integers, {}, [], {})
        manifest = announce_pair(theirs, ours, "auto", found, selection((), (), (), "strict"))
        ref = f"{lists.ref}::{base.ref}"
        return PatchVector(ref, deltas, manifest, notes=notes, tuned=tuned, base=base)

    @staticmethod
    def combined(
        parts: Sequence[Displacement], recipe: Recipe, operator: Operator | None = None
    ) -> "CombinedVector":
        """Return vectors merged by the recipe's operator, without computing it.

        `operator` is one that is not in the table. Raises IncompatibleError for tensors that only
        some of the vectors have, unless they were left out there on purpose.
        """
        recipe = replace(recipe, shares=tuple(map(_scaled, recipe.shares, parts)))
        recipe = with_digests(recipe)
        parts = lend_heads(align_vectors([replace(part, scale=1.0) for part in parts]))
        files, recipe = open_fishers(recipe) if recipe.op == "fisher" else ((), recipe)
        deltas = mix(parts, recipe, operator or OPERATORS[recipe.op])
        deltas = weigh_by(files, parts, deltas) if files else deltas
        manifest = announce_combination(parts, recipe)
        ref, warnings = manifest["formula"], tuple(list_unprojected(deltas, recipe))
        return CombinedVector(
            ref, deltas, manifest, warnings=warnings, parts=tuple(parts), recipe=recipe,
            beside=files,
        )  # fmt: skip

    def __mul__(self, factor: object) -> Self:
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

    def __truediv__(self, divisor: object) -> Self:
        if not isinstance(divisor, Real) or not divisor:
            raise TypeError(f"vector / {divisor!r:.40}: expected a number that is not 0")
        return self * (1.0 / float(divisor))

    def __neg__(self) -> Self:
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

    def save(self, output: str | os.PathLike[str], **options: Any) -> "SkillVector":
        """Write the vector to a file and open it; options as of skillvec.combine."""
        package: Any = sys.modules["skillvec"]  # sugar: its face knows the rooms above
        made: SkillVector = package.save(self, output, **options)
        return made


class StoredVector(kinds.Stored, SkillVector):
    """A vector in a file, which its manifest describes."""


class PairVector(kinds.Pair, SkillVector):
    """Two checkpoints that are subtracted as they are read."""


class PatchVector(kinds.Patched, SkillVector):
    """A patch (changed values of the exact base) and that base."""


class AdapterVector(kinds.Adapted, SkillVector):
    """What an adapter adds to its base, or to the target that it meets."""


class CombinedVector(kinds.Combined, SkillVector):
    """Several vectors merged by an operator as they are read."""


def _is_patch(place: Place) -> bool:
    from skillvec.checkpoints.patch import find_patch

    return find_patch(place, "tuned") is not None


def _sum(terms: Sequence[tuple[Displacement, float]]) -> SkillVector:
    shares = tuple(Share(vector.ref, weight) for vector, weight in terms)
    return SkillVector.combined([vector for vector, _ in terms], Recipe("linear", shares))


def _scaled(share: Share, part: Displacement) -> Share:
    """Return a share whose weights carry the vector's own factor."""

    def times(weight: Any) -> Any:
        if isinstance(weight, tuple):
            return tuple(part.scale * point for point in weight)
        return None if weight is None else part.scale * weight

    rules = tuple(replace(rule, weight=times(rule.weight)) for rule in share.rules)
    return replace(share, weight=times(share.weight), rules=rules)
