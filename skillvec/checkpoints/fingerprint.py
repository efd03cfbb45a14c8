"""Whose relative a checkpoint is: what a manifest records of it, and how that is compared.

A sketch (a few normalised weights) stays close under fine-tuning; a probe (a digest of samples) is
that of the very bytes. Hides which values are looked at.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Annotated, TypedDict

import numpy as np

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.files.file import allocate, digest_bytes, leaf_digests, prefetch
from skillvec.files.header import TensorSpec
from skillvec.files.tensors import Source, read_raw, value_range, values_of
from skillvec.ops.kernels import FLOATS, widen
from skillvec.remote.references import is_of_hub

Digest = Annotated[str, re.compile("[0-9a-f]{32}")]


class ModelFacts(TypedDict):
    """What is recorded of a checkpoint, short of its tensors."""

    ref: str
    revision: str | None
    model_type: str | None
    config: Digest | None
    tokenizer: Digest | None
    family: Digest
    probe: Digest | None
    sketch: dict[str, list[Annotated[int, range(-127, 128)]]]
    dtypes: dict[str, int]


PROBE_TENSORS, PROBE_NBYTES = 256, 4096
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
    linked = snapshot and not checkpoint.place.revision and is_of_hub(checkpoint.ref)
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


def _probed_bytes(checkpoint: Mapping[str, Source]) -> list[tuple[Source, int, int]]:
    """Return tensors with the byte range from their middle that the probe digests."""
    names = sorted(checkpoint)
    specs = [checkpoint[n] for n in names[:: max(1, len(names) // PROBE_TENSORS)][:PROBE_TENSORS]]
    sizes = [min(PROBE_NBYTES, spec.nbytes) for spec in specs]
    return [(s, (s.nbytes - n) // 2, n) for s, n in zip(specs, sizes, strict=True)]


def probe_digest(checkpoint: Mapping[str, Source]) -> str:
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


def content_digest(tensors: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """Return the digest of a model's content, of name, dtype, shape and digest of every tensor.

    The same whatever the order of the tensors, however many files hold them and whatever else is in
    these; docs/format.md has the construction.
    """
    rows = sorted([name, dtype, list(shape), digest] for name, dtype, shape, digest in tensors)
    return digest_bytes(json.dumps(rows).encode())
