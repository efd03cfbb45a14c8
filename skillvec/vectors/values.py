"""The values of a vector, tensor by tensor, as numpy arrays: the public way to read one."""

import sys
from collections.abc import Iterator, KeysView, Mapping, Sequence
from difflib import get_close_matches
from math import prod
from typing import Any, ClassVar

import numpy as np

from skillvec.errors import NonfiniteError, UsageError
from skillvec.files.file import forget_open_files
from skillvec.ops.kernels import Array
from skillvec.vectors.deltas.base import DeltaSource, pieces_of
from skillvec.vectors.deltas.mix import mixes_in
from skillvec.vectors.displacement import Displacement
from skillvec.vectors.reader import readers_of


class Readable(Displacement):
    """A displacement that gives its values by name, as a mapping does."""

    __array_ufunc__: ClassVar[None] = None  # numpy's numbers leave `number * vector` to the vector

    def __getitem__(self, key: str | tuple[str, slice]) -> Array:
        """Return one tensor, or `rows` of it: vector["name"], vector["name", 10:20].

        fp32, or fp64 where a side is, times the vector's scale; of the tensor's shape. Of rows only
        the blocks of 2^20 values that hold them are read. Where an operator measures before it
        merges, that is done at each call. Raises KeyError for an unknown name, NonfiniteError where
        a difference is not finite, FormatError where a stored tensor, read whole, is not what its
        digest says.
        """
        name, rows = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        if not isinstance(name, str) or not isinstance(rows, slice | None):
            raise TypeError(
                f"vector[{key!r:.80}]: expected the name of a tensor, and perhaps a slice of its"
                ' rows: vector["name", 10:20]'
            )
        if name not in self.keys():
            near = get_close_matches(name, self.deltas, 5) or list(self.deltas)[:5]
            raise KeyError(f"{name}: vector {self.ref} has no such tensor; near: {', '.join(near)}")
        return self._read(self._measured([name])[name], name, rows)

    def items(self) -> Iterator[tuple[str, Array]]:
        """Yield names and whole tensors, one in memory at a time, in the order of the file."""
        for name, delta in self._measured(list(self.keys())).items():
            yield name, self._read(delta, name, None)

    def keys(self) -> KeysView[str]:
        """Return the names of its tensors, in the order of the file."""
        if not self.deltas:
            raise UsageError(
                f"vector {self.ref}: its base tells which tensors an adapter adds to: open"
                f" {self.ref}::BASE, or store it with skillvec diff ADAPTER BASE -o"
            )
        return self.deltas.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __bool__(self) -> bool:
        return True  # a vector is there, whatever it holds

    def _measured(self, names: Sequence[str]) -> Mapping[str, DeltaSource]:
        """Return deltas of these names that can be read."""
        found = {name: self.deltas[name] for name in names}
        if any(mix.passes for mix in mixes_in(found.values())):
            package: Any = sys.modules["skillvec"]  # sugar: its face knows the engine, above
            found = package.measure(self, names)
        return found

    def _read(self, delta: DeltaSource, name: str, rows: slice | None) -> Array:
        shape = delta.spec.shape
        first, last = 0, delta.spec.numel
        if rows is not None:
            if not shape or rows.step not in (None, 1):
                what = "a number has none" if not shape else f"a step of {rows.step}"
                raise UsageError(f"{name}: rows {rows}: {what}: expected a slice such as 10:20")
            begin, end, _ = rows.indices(shape[0])
            shape = (max(end - begin, 0), *shape[1:])
            first, last = begin * prod(shape[1:]), begin * prod(shape[1:]) + prod(shape)
        out: Array = np.empty(last - first, np.float64 if delta.dtype == "F64" else np.float32)
        factor = np.float64(self.scale)  # one rounding, as when a multiple is stored
        try:
            for begin, values in pieces_of(delta, readers_of(self.files()), None, first, last):
                with np.errstate(over="ignore"):
                    out[begin - first : begin - first + values.size] = values * factor
        finally:
            forget_open_files()
        if not np.isfinite(out).all():
            raise NonfiniteError(
                f"{name}: {self.scale:g} times it is beyond the range of its dtype"
            )
        out += 0.0  # no negative zeros
        return out.reshape(shape)
