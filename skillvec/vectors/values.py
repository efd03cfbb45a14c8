"""The values of a vector, tensor by tensor, as numpy arrays: the public way to read one."""

import sys
from collections.abc import Iterator, KeysView, Sequence
from difflib import get_close_matches
from typing import ClassVar

from skillvec.errors import UsageError
from skillvec.ops.kernels import Array
from skillvec.vectors.displacement import Displacement


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
        ((_, values),) = self._values([name], rows)
        return values

    def items(self) -> Iterator[tuple[str, Array]]:
        """Yield names and whole tensors, one in memory at a time, in the order of the file."""
        return self._values(list(self.keys()), None)

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

    def _values(self, names: Sequence[str], rows: slice | None) -> Iterator[tuple[str, Array]]:
        # sugar: the face of the package knows the engine, above
        yield from sys.modules["skillvec"].read_values(self, names, rows)
