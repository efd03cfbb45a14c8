"""A delta as several that a method merges."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from skillvec.errors import FormatError
from skillvec.files.header import TensorSpec
from skillvec.ops import merge_kernels
from skillvec.ops.delta import STEP, Delta
from skillvec.ops.kernels import Array
from skillvec.ops.merge_methods import Operator, Position
from skillvec.vectors.block_reader import NO_RECORDS, Block
from skillvec.vectors.deltas.base import Decoded, DeltaSource, InFile, Stack
from skillvec.vectors.deltas.factored import CoarseDelta


@dataclass(frozen=True, slots=True, repr=False)
class MixDelta(DeltaSource):
    """A tensor's delta as several to merge by an operator; `known` is what its passes measured."""

    spec: TensorSpec = field()
    sources: tuple[DeltaSource, ...]
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
    def parts(self) -> tuple[DeltaSource, ...]:
        return self.sources

    @property
    def merged(self) -> int:
        return len(self.sources)

    def stored_parts(self, role: str) -> Iterator[tuple[str, InFile]]:
        for n, part in enumerate(self.sources):
            yield from part.stored_parts(f"{role}.{n}")

    @property
    def key(self) -> str:
        return f"{self.scope}\n{self.spec.name}"

    @property
    def way(self) -> Any:
        if getattr(self.operator, "random", True):  # other numbers for tensors of other names
            return None
        return self.weights, self.parameters, self.spec.shape

    @property
    def stack(self) -> Stack | None:
        alone = self.weights == (1.0,) and isinstance(self.sources[0], CoarseDelta)
        return self.sources[0].stack if alone else None

    @property
    def fits(self) -> str:
        alone = self.weights in ((1.0,), (0.0,)) and self.spec.dtype == "F32"
        return "BF16" if alone and self.parameters[0].get("bits", 8) <= 7 else self.spec.dtype

    @property
    def passes(self) -> int:
        return self.operator.passes(self.parameters)

    @property
    def scope(self) -> str:
        """What its measurements are summed over: the tensor, or all with the same parameters."""
        key = [self.operator.name, self.origins, self.seed, self.parameters]
        return json.dumps([*key, self.spec.name, self.weights] if self.per_tensor else key)

    @property
    def per_tensor(self) -> bool:
        return self.operator.scope(self.parameters) == "tensor"

    def measure(self, block: Block, role: str, number: int) -> Array:
        """Return what pass `number` finds in a block: counts (int64), or float64 to be summed."""
        parts = self._read_parts(block, role)
        total: Array | None = merge_kernels.measure(self.operator, number, parts, self.known)
        if total is not None:
            return total
        for place, wide in self._pieces(block, parts):
            found = self.operator.measure(
                number, wide, self.weights, self.parameters, place, self.known
            )
            total = found if total is None else total + found
        assert total is not None
        return total

    def settle(self, number: int, total: Array) -> Any:
        """Return what is known when pass `number` over its scope has given `total`."""
        return self.operator.settle(number, total, self.weights, self.parameters, self.known)

    def informed(self, known: Mapping[Any, Any]) -> Self:
        sources = tuple(source.informed(known) for source in self.sources)
        return replace(self, sources=sources, known=known.get(self.scope, self.known))

    def read(self, block: Block, role: str) -> Decoded:
        values = block.array(role, self.spec.dtype)
        parts = self._read_parts(block, role)
        if not merge_kernels.combine(
            self.operator, parts, self.weights, self.parameters, self._place(block.begin),
            self.known, values,
        ):  # fmt: skip
            for place, wide in self._pieces(block, parts):
                at = place.begin - block.begin
                values[at : at + wide[0].size] = self.operator.combine(
                    wide, self.weights, self.parameters, place, self.known
                )
            if not np.isfinite(values).all():
                raise FormatError(f"{self.spec.name}: {self.operator.name} left the range of fp32")
        return Delta(values, self.spec.dtype), NO_RECORDS

    def _read_parts(self, block: Block, role: str) -> list[Delta]:
        return [part.read(block, f"{role}.{i}")[0] for i, part in enumerate(self.sources)]

    def _place(self, begin: int) -> Position:
        return Position(self.spec.name, begin, self.seed, self.streams)

    def _pieces(self, block: Block, parts: list[Delta]) -> Iterator[tuple[Position, list[Array]]]:
        """Yield the parts piece by piece, widened, with their place."""
        for begin in range(0, block.size, STEP):
            wide = [part.wide(begin, begin + STEP) for part in parts]
            yield self._place(block.begin + begin), wide


def mixes_in(deltas: Iterable[DeltaSource]) -> list[MixDelta]:
    """Return the combinations among deltas, which may have to be measured before they are read."""
    return [delta for delta in deltas if isinstance(delta, MixDelta)]
