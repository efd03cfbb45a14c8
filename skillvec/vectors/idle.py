"""Buffers that models compute themselves, and deltas that do nothing to them."""

import re
from math import prod

import numpy as np

from skillvec.checkpoints.ties import same_bytes
from skillvec.checkpoints.unread import INTEGERS
from skillvec.files.tensors import Source, values_of
from skillvec.ops.kernels import FLOATS, STORAGE_DTYPE, widen
from skillvec.vectors.deltas.base import DeltaSource

MOST_COMPUTED = 1 << 24  # values of a buffer that are looked at
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
    if (pair := delta.pair) is not None:
        return same_bytes(pair.tuned, pair.base)
    return delta.is_zero
