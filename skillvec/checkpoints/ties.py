"""Weights that are one under several names: tied by transformers, or copies by bytes."""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.fingerprint import PROBE_NBYTES
from skillvec.checkpoints.model_classes import ModelClass, classes_of, need_model_classes
from skillvec.checkpoints.renaming import numbered
from skillvec.errors import IncompatibleError
from skillvec.files.header import ITEMSIZE, TensorSpec
from skillvec.files.tensors import Source, Viewed, digest_values, values_of
from skillvec.files.views import Index, whole

VARIED = 16  # values of a tensor that differ, from which on its bytes are its own
LOOKED_AT = 1 << 20  # values that are looked at in one go to find as many
MAX_TIED = 16  # tensors on one side only, beyond which nobody looks for copies: other models


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
