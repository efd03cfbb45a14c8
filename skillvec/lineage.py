"""Whose relative a checkpoint is: what a manifest records of it, and how that is compared.

A sketch (a few normalised weights) stays close under fine-tuning; a probe (a digest of samples) is
that of the very bytes. Hides which values are looked at.
"""

import json
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod, sqrt
from typing import Any

import numpy as np

from skillvec import hub
from skillvec.checkpoint import Checkpoint
from skillvec.conversions import ModelClass, classes_of, need_model_classes
from skillvec.deltas import DeltaSource
from skillvec.errors import IncompatibleError
from skillvec.kernels import FLOATS, STORAGE_DTYPE, widen
from skillvec.layouts import numbered
from skillvec.manifest import ModelFacts
from skillvec.patch import Patch
from skillvec.sources import (
    Index,
    Source,
    Viewed,
    digest_values,
    read_raw,
    value_range,
    values_of,
    whole,
)
from skillvec.storage import ITEMSIZE, TensorSpec, allocate, digest_bytes, leaf_digests, prefetch
from skillvec.unread import INTEGERS

PROBE_TENSORS, PROBE_NBYTES = 256, 4096


VARIED = 16  # values of a tensor that differ, from which on its bytes are its own
LOOKED_AT = 1 << 20  # values that are looked at in one go to find as many
MOST_COMPUTED = 1 << 24  # values of a buffer that are looked at
MAX_TIED = 16  # tensors on one side only, beyond which nobody looks for copies: other models


SKETCH_TENSORS, SKETCH_NUMEL = 48, 288  # matrices, and values of all of them
RELATED = 0.5  # cosine of sketches: unrelated ones spread by .06, fine-tuned ones stay above .9


def identity(checkpoint: Checkpoint) -> ModelFacts:
    """Return what a manifest records of a checkpoint, short of its tensors."""
    prefetch(
        [(s.path, s.start + begin, n) for s, begin, n in _probed_bytes(checkpoint)
         if isinstance(s, TensorSpec)]
        + [value_range(s, begin, n) for s, begin, n in _sketched(checkpoint)
           if isinstance(s, TensorSpec)]
    )  # fmt: skip
    # as written: a file in the Hub's cache is a link that leads out of its snapshot
    place = os.path.abspath(os.path.expanduser(checkpoint.ref))
    snapshot = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", f"{place}/{checkpoint.path}/")
    linked = snapshot and not checkpoint.place.revision and hub.is_reference(checkpoint.ref)
    return {
        # of a link into the cache: beside a commit, its path would be read as a name on the Hub
        "ref": f"./{checkpoint.ref}" if linked else checkpoint.ref,
        "revision": checkpoint.place.revision or (snapshot.group(1) if snapshot else None),
        "model_type": checkpoint.model_type,
        "config": checkpoint.config_digest,
        "tokenizer": checkpoint.tokenizer_digest,
        "family": checkpoint.family_digest,
        "probe": probe_digest(checkpoint),
        "sketch": sketch(checkpoint),
        "dtypes": checkpoint.dtypes,
    }


def sketch(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Return a few weights of up to 48 matrices, in 32nds of the root mean square around them.

    Fine-tuning hardly moves weights, so two checkpoints of one origin have nearly the same sketch,
    whatever their dtypes; those of another training run have nothing in common.
    """
    chosen = _sketched(checkpoint)
    kept = min(64, SKETCH_NUMEL // max(1, len(chosen)))
    found = {}
    for spec, begin, numel in chosen:
        middle = values_of(spec, begin, numel)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            values = widen(middle, spec.dtype).astype(np.float64)
        values = np.nan_to_num(values, posinf=0, neginf=0)
        values /= np.abs(values).max() or 1.0
        if (values[:kept] != values[0]).any():  # constants say nothing
            size = np.sqrt(np.mean(values**2))
            steps = np.clip(np.rint(32 * values[:kept] / size), -127, 127)
            found[spec.name] = [int(step) for step in steps]
    return found


def _sketched(checkpoint: Checkpoint) -> list[tuple[Source, int, int]]:
    """Return the matrices of a sketch with the values around their middle."""
    floats = [spec for spec in checkpoint.values() if spec.dtype in FLOATS and spec.numel]
    matrices = [spec for spec in floats if len(spec.shape) > 1]
    matrices.sort(key=lambda spec: digest_bytes(spec.name.encode()))
    chosen = sorted(matrices[:SKETCH_TENSORS], key=lambda spec: spec.name)
    sizes = [min(64, spec.numel) for spec in chosen]
    return [(s, (s.numel - n) // 2, n) for s, n in zip(chosen, sizes, strict=True)]


def relatedness(one: Mapping[str, list[int]], other: Mapping[str, list[int]]) -> float | None:
    """Return the cosine of two sketches over the matrices they share, None where there is none."""
    shared = [
        steps for name in one if name in other
        for steps in zip(one[name], other[name], strict=False)
    ]  # fmt: skip
    norms = sum(a * a for a, _ in shared) * sum(b * b for _, b in shared)
    return sum(a * b for a, b in shared) / sqrt(norms) if norms else None


def _probed_bytes(checkpoint: Checkpoint) -> list[tuple[Source, int, int]]:
    """Return tensors with the byte range from their middle that the probe digests."""
    names = sorted(checkpoint)
    specs = [checkpoint[n] for n in names[:: max(1, len(names) // PROBE_TENSORS)][:PROBE_TENSORS]]
    sizes = [min(PROBE_NBYTES, spec.nbytes) for spec in specs]
    return [(s, (s.nbytes - n) // 2, n) for s, n in zip(specs, sizes, strict=True)]


def probe_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of 4 KiB from the middle of up to 256 tensors.

    Tells two checkpoints apart in milliseconds; full digests, taken while tensors are read anyway,
    have the last word.
    """
    buffer = memoryview(allocate(PROBE_NBYTES))
    leaves = bytearray()
    for spec, begin, nbytes in _probed_bytes(checkpoint):
        read_raw(spec, begin, buffer[:nbytes])
        leaves += leaf_digests(buffer[:nbytes])
    shapes = sorted((name, spec.dtype, list(spec.shape)) for name, spec in checkpoint.items())
    return digest_bytes(json.dumps(shapes).encode() + leaves)


def find_tied(checkpoint: Checkpoint, name: str, among: Container[str] | None = None) -> list[str]:
    """Return the other tensors that hold the same bytes: evidence that all are one tied weight.

    `among` are the names that would do, if not all would.
    """
    found = copies_of(checkpoint, name, among)
    return [twin for twin in found if may_be_one(checkpoint, name, twin)]


def may_be_one(checkpoint: Checkpoint, name: str, twin: str) -> bool:
    """Return whether `name` may be another name of a stored tensor that has the same values.

    Layers may start as copies of one another, and tensors of few values (zeros, ones) are alike by
    accident: of those transformers has to say that its model ties them.
    """
    plain = not numbered(name) and not numbered(twin) and _is_varied(checkpoint[twin])
    return plain or is_said_tied(checkpoint, name, twin)


def is_said_tied(checkpoint: Checkpoint, name: str, twin: str) -> bool:
    """Return whether transformers' model of the config ties two tensors, by names of its files.

    `twin` is stored, `name` need not be. Imports transformers; UsageError where it is missing.
    """
    if not checkpoint.config:
        return False
    need_model_classes(f"{checkpoint.ref}: telling whether {name} is one weight with {twin}")
    kind = _class_of(json.dumps(checkpoint.config), len(checkpoint))
    if kind is None:
        return False
    shape = tuple(checkpoint[twin].shape)
    loaded = kind.loaded_names({name: shape, twin: shape})
    return are_tied(kind.tied, loaded.get(name, name), loaded.get(twin, twin))


@lru_cache(maxsize=4)
def _class_of(config: str, most_layers: int) -> ModelClass | None:
    return next(classes_of(json.loads(config), most_layers), None)


def are_tied(pairs: Mapping[str, str], one: str, other: str) -> bool:
    """Return whether pairs head -> embedding make two names one weight, perhaps through others."""
    group, size = {one}, 0
    while size < len(group):
        size = len(group)
        group.update(n for pair in pairs.items() if not group.isdisjoint(pair) for n in pair)
    return other in group


def copies_of(checkpoint: Checkpoint, name: str, among: Container[str] | None = None) -> list[str]:
    """Return the other tensors of the same dtype, shape and bytes; scalars have none."""
    spec = checkpoint[name]
    if not spec.shape or not spec.nbytes:
        return []
    alike = [
        other for other in checkpoint.values()
        if other.name != name and (other.dtype, other.shape) == (spec.dtype, spec.shape)
        and (among is None or other.name in among)
    ]  # fmt: skip
    if not alike:
        return []
    first = min(spec.numel, PROBE_NBYTES // ITEMSIZE[spec.dtype])
    begin = digest_values(spec, 0, first)
    alike = [other for other in alike if digest_values(other, 0, first) == begin]
    whole_digest = digest_values(spec) if alike else None
    return [other.name for other in alike if digest_values(other) == whole_digest]


def _is_varied(spec: Source) -> bool:
    """Return whether a tensor has so many different values that no other has them by accident.

    Nearly always its beginning tells; rows of padding are zeros.
    """
    values: Any = np.empty(0)
    begin, numel = 0, PROBE_NBYTES // ITEMSIZE[spec.dtype]
    while values.size < VARIED and begin < spec.numel:
        numel = min(numel, spec.numel - begin)
        values = np.unique(np.concatenate([values, np.unique(values_of(spec, begin, numel))]))
        begin, numel = begin + numel, LOOKED_AT
    return bool(values.size >= VARIED)


# what models compute from their config and shapes: (last parts of names, which transformers ignores
# or no longer saves)
BUFFER = re.compile(
    r"(^|\.)(position_ids|(original_)?inv_freq|(attn|attention)\.(bias|masked_bias))$"
)


def recomputed(source: Source) -> str | None:
    """Return what a tensor is that models compute themselves, whatever a file holds; else None.

    Its name says which one, and its values are those: positions that count from 0, frequencies of
    rotary embeddings, a causal mask and the number that it puts.
    """
    found = BUFFER.search(source.name)
    if not found or not 0 < source.numel <= MOST_COMPUTED or source.dtype not in STORAGE_DTYPE:
        return None
    kind, (*outer, last) = found[2], source.shape or (1,)
    values = widen(values_of(source, 0, source.numel), source.dtype).reshape(-1, last)
    if kind == "position_ids":
        counted = source.dtype in INTEGERS and prod(outer) == 1
        return "positions" if counted and (values == np.arange(last)).all() else None
    if kind.endswith("inv_freq"):
        falling = len(source.shape) == 1 and bool((np.diff(values[0]) < 0).all())
        positive = source.dtype in FLOATS and bool((values > 0).all() and np.isfinite(values).all())
        return "rotary frequencies" if falling and positive else None
    if kind.endswith("masked_bias"):
        return "a mask's number" if source.numel == 1 and values[0, 0] <= -1e4 else None
    mask = source.shape == (1, 1, last, last) and np.array_equal(values, np.tri(last))
    return "a causal mask" if mask else None


def is_idle_buffer(name: str, delta: DeltaSource) -> bool:
    """Return whether a delta does nothing to a tensor that models compute, going by its name."""
    if not BUFFER.search(name):
        return False
    if delta.merged:
        return all(is_idle_buffer(name, part) for part in delta.parts)
    if (pair := delta.pair) is not None and not isinstance(pair.tuned, Patch):
        return same_bytes(pair.tuned, pair.base)
    return delta.is_zero


def may_change(delta: DeltaSource) -> bool:
    """Return whether a delta may change anything, as far as is known without reading it."""
    return not delta.is_zero


def under_name(source: Source, name: str) -> Source:
    """Return a tensor as it is, under another name."""
    if isinstance(source, TensorSpec):
        return source._replace(name=name)
    return Viewed(name, source.dtype, whole(source, source.shape))


def tied_heads(
    model: Checkpoint, touched: Mapping[str, Index], kept_apart: Iterable[str],
    ask: Callable[[], Mapping[str, str] | None],
) -> dict[str, str]:  # fmt: skip
    """Return the pairs of names that are one weight of a model: head -> where its values lie.

    A head lies in no file, or with the bytes of the other. `touched` are tensors to change, with
    their shapes: nothing is asked unless one outside the layers is a matrix or not in the model.
    `ask` gives the pairs that transformers' model of the config ties, under the names here, None
    where it makes none: then a head is told by its shape. Raises IncompatibleError where the config
    ties an embedding in `kept_apart` to a head whose name nothing tells.
    """
    outer = {n: shape for n, shape in touched.items() if not numbered(n)}
    likely = {n: shape for n, shape in outer.items() if len(shape) == 2}
    told = likely or [name for name in outer if name not in model]
    if not told or model.ties_embeddings is False or not model.config:
        return {}
    said = ask()
    inner = model.config.get("text_config")
    configs = [model.config, inner if isinstance(inner, dict) else {}]
    rows = [config.get("vocab_size") for config in configs]
    pairs = [pair for pair in (said or {}).items() if any(name in model for name in pair)]
    if said is None and model.ties_embeddings:
        pairs = _tied_by_shape(model, likely, [n for n in rows if type(n) is int])
    for name in kept_apart if not pairs and (said or model.ties_embeddings) else ():
        if name in model and likely.get(name, (-1,))[0] in rows:
            raise IncompatibleError(
                f"{name}: the config of {model.ref} ties it to a head whose name nothing tells"
                " (transformers makes no such model of the config): merge the adapter into its"
                " base with PEFT and give the merged model"
            )
    found = {}
    for head, source in pairs:
        if source not in model:
            head, source = source, head
        if head not in model or same_bytes(model[head], model[source]):
            found[head] = source
    return found


def _tied_by_shape(
    model: Checkpoint, likely: Mapping[str, Index], rows: Sequence[int]
) -> list[tuple[str, str]]:
    """Pair names that a model lacks with the only matrix of their shape outside its layers.

    Heads have as many `rows` as there are tokens, where that is known.
    """
    pairs = []
    for head, shape in likely.items():
        twins = [n for n, spec in model.items() if spec.shape == shape and not numbered(n)]
        if head not in model and len(twins) == 1 and (not rows or shape[0] in rows):
            pairs.append((head, twins[0]))
    return pairs


def same_bytes(one: Source, other: Source) -> bool:
    """Return whether two tensors have one dtype, shape and bytes."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    first = min(one.numel, PROBE_NBYTES // ITEMSIZE[one.dtype])
    alike = alike and digest_values(one, 0, first) == digest_values(other, 0, first)
    return alike and digest_values(one) == digest_values(other)
