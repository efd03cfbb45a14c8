"""The base of an adapter, and the deltas that it makes of it."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from skillvec.checkpoints.adapter_effect import effect_on
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.fingerprint import ModelFacts
from skillvec.checkpoints.lora import Adapter
from skillvec.checkpoints.lora_ties import AdapterEffect
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.checkpoints.ties import under_name
from skillvec.errors import IncompatibleError, SkillvecError, UsageError
from skillvec.files.file import Place, digest_bytes
from skillvec.files.tensors import Source
from skillvec.ops.kernels import FLOATS
from skillvec.remote.hub import is_cached
from skillvec.remote.references import is_of_hub, is_recorded
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.deltas.computed import ComputedDelta
from skillvec.vectors.deltas.pair import PairDelta, value_dtype
from skillvec.vectors.deltas.stored import zero_delta
from skillvec.vectors.manifest import Manifest, Parent, TensorSide
from skillvec.vectors.pairs import Sorted, announce_pair
from skillvec.vectors.recipe import selection


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
    if place.revision or not is_of_hub(ref) or is_recorded(ref) or is_cached(ref):
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
