"""Where the delta of one tensor comes from: subtracted, computed, seen through a view, merged.

Plain picklable addresses and numbers, which plans hold and blocks read. Nothing here knows files.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from skillvec.errors import UsageError
from skillvec.kernels import DTYPE_NAMES, HALVES
from skillvec.merging import Operator
from skillvec.operators import Exactness
from skillvec.sources import Derived, Source, View
from skillvec.storage import ITEMSIZE, TensorSpec
from skillvec.vectorfile import StoredDelta


class PairDelta(NamedTuple):
    """A tensor's delta as two tensors to subtract into values of `dtype`."""

    tuned: Source
    base: Source
    dtype: str
    exactness: Exactness = Exactness.WHOLE

    @property
    def spec(self) -> Source:
        return self.base

    @property
    def nbytes(self) -> int:
        tuned = self.tuned
        read = tuned.nbytes_read if isinstance(tuned, Derived) else tuned.nbytes
        return read + self.base.nbytes


class ComputedDelta(NamedTuple):
    """A tensor's delta as a formula in fp32 or fp64, such as s B A of the adapter `ref`."""

    source: Derived
    ref: str

    @property
    def spec(self) -> Derived:
        return self.source

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


class ViewDelta(NamedTuple):
    """A tensor's delta as boxes of those of another layout; what no box covers is 0."""

    spec: TensorSpec  # F32, or F64 where a source is
    view: View

    @property
    def nbytes(self) -> int:
        return self.spec.numel * ITEMSIZE[self.spec.dtype]


class MixDelta(NamedTuple):
    """A tensor's delta as several to merge by an operator; `known` is what its passes measured."""

    spec: TensorSpec
    sources: "tuple[StoredDelta | PairDelta | ComputedDelta | ViewDelta, ...]"
    weights: tuple[float, ...]
    parameters: tuple[dict[str, Any], ...]
    operator: Operator
    streams: tuple[str, ...]  # identities, which address random numbers
    origins: tuple[str, ...]  # what tells these vectors from others in one run
    seed: int
    known: Any = None

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    @property
    def scope(self) -> str:
        """What its measurements are summed over: the tensor, or all with the same parameters."""
        key = [self.operator.name, self.origins, self.seed, self.parameters]
        return json.dumps([*key, self.spec.name, self.weights] if self.per_tensor else key)

    @property
    def per_tensor(self) -> bool:
        return self.operator.scope(self.parameters) == "tensor"

    @property
    def by_value(self) -> bool:
        """Whether equal deltas are sure to give equal results, whatever the tensors are called."""
        return not getattr(self.operator, "random", True)


DeltaSource = StoredDelta | PairDelta | MixDelta | ComputedDelta | ViewDelta


def value_dtype(tuned: str, base: str, dtype: str = "auto") -> tuple[str, Exactness]:
    """Return the storage dtype of a delta and how exact it is.

    `auto` stores BF16 - BF16 as BF16 and F16 - F16 as F16 (exceptions in fp32), any F64 as F64,
    every other pair as F32, and restores every value of tuned.
    """
    if dtype == "auto":
        if "F64" in (tuned, base):
            return "F64", Exactness.WHOLE
        return (tuned if tuned == base and tuned in HALVES else "F32"), Exactness.WHOLE
    fits = dtype == "F32" and "F64" not in (tuned, base)
    return dtype, Exactness.EXCEPTIONS if fits else Exactness.ROUNDED


def dtype_of(name: str) -> str:
    """Return the safetensors dtype of a name such as bf16; UsageError for others."""
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype {name!r}: expected one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def views_in(deltas: "Iterable[DeltaSource]") -> "Iterator[ViewDelta]":
    """Yield the views among deltas, in combinations, and in what views are of."""
    for delta in deltas:
        if isinstance(delta, ViewDelta):
            yield delta
            yield from views_in(delta.view.sources)
        elif isinstance(delta, MixDelta):
            yield from views_in(delta.sources)


def key_of(delta: "DeltaSource") -> str:
    """Return what tells a delta that views read from others in one run."""
    origin = delta.scope if isinstance(delta, MixDelta) else delta.spec.path
    return f"{origin}\n{delta.spec.name}"


def names_of(delta: DeltaSource) -> list[str]:
    """Return the names under which a vector holds what a delta is made of."""
    if isinstance(delta, ViewDelta):
        return [part.spec.name for part in delta.view.sources]
    return [delta.spec.name]


def delta_dtype(delta: DeltaSource) -> str:
    return delta.dtype if isinstance(delta, PairDelta) else delta.spec.dtype
