"""Tensors that no file holds as they are: views of others, and the root of those that are computed.

A source has a name, dtype and shape, and gives any range of its values in row-major order. A
`TensorSpec` reads them from a file; a `Derived` makes them of other sources, block by block, so
that nothing is ever held whole. A `Viewed` is put together as a `View` says.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from skillvec.files.file import LEAF_NBYTES, fold_digest, leaf_digests, read_into
from skillvec.files.gather import Gatherer, fill, gathering
from skillvec.files.header import ITEMSIZE, TensorSpec
from skillvec.files.views import Index, View
from skillvec.ops.kernels import STORAGE_DTYPE, Array, widen


class Derived(ABC):
    """A tensor that is made of others when it is read; frozen and picklable.

    `nbytes` is what its values take, not what its parts take on the disk.
    """

    name: str
    dtype: str
    shape: Index

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def nbytes_read(self) -> int:
        """What reading all its values reads, as plans count it."""
        return self.nbytes

    @property
    def path(self) -> str:
        """The file where its first part lies."""
        return next(files_of(self), "")

    @property
    @abstractmethod
    def parts(self) -> "tuple[Source, ...]":
        """What it is read from."""

    @abstractmethod
    def read(self, begin: int, out: Array) -> None:
        """Fill `out`, 1-D in the storage dtype, with values begin.. in row-major order."""

    def of_integers(self, dtype: str) -> "Source":
        """Return it as integers of a dtype, of the same bytes."""
        raise NotImplementedError(f"{self.name}: {self.dtype}, expected a dtype to compute with")


Source = TensorSpec | Derived


def as_integers(source: Source) -> Source:
    """Return a tensor of a dtype that nothing computes with as integers of the same bytes."""
    if source.dtype in STORAGE_DTYPE:
        return source
    width = ITEMSIZE.get(source.dtype, 1)
    dtype = f"U{8 * width}"
    if isinstance(source, TensorSpec):
        shape = source.shape if source.dtype in ITEMSIZE else (source.nbytes,)
        return source._replace(dtype=dtype, shape=shape)
    return source.of_integers(dtype)


def value_range(spec: TensorSpec, begin: int, numel: int) -> tuple[str, int, int]:
    """Return where some values of a tensor lie: path, offset and bytes."""
    width = ITEMSIZE[spec.dtype]
    return spec.path, spec.start + begin * width, numel * width


def read_values(source: Source, begin: int, out: Array) -> None:
    """Fill `out`, 1-D in the storage dtype, with the values of a source from `begin` on."""
    if isinstance(source, TensorSpec):
        where = source.start + begin * ITEMSIZE[source.dtype]
        read_into(source.path, where, out.view(np.uint8).data)
    else:
        source.read(begin, out)


def values_of(source: Source, begin: int, numel: int) -> Array:
    """Return some values of a source as a new array."""
    out = np.empty(numel, STORAGE_DTYPE[source.dtype])
    read_values(source, begin, out)
    return out


def read_raw(source: Source, begin: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of a source's values from byte `begin` on."""
    if isinstance(source, TensorSpec):
        read_into(source.path, source.start + begin, buffer)
        return
    source = as_integers(source)
    width = ITEMSIZE[source.dtype]
    first, last = begin // width, -(-(begin + len(buffer)) // width)
    held = values_of(source, first, last - first).view(np.uint8)
    buffer[:] = held[begin - first * width :][: len(buffer)].data


def files_of(source: Source) -> Iterator[str]:
    """Yield the files that a source is read from, first part first, perhaps one more than once."""
    if isinstance(source, TensorSpec):
        yield source.path
    else:
        for part in source.parts:
            yield from files_of(part)


def digest_values(source: Source, begin: int = 0, numel: int | None = None) -> str:
    """Return the digest of some values of a source (all, if not said how many), 8 MiB at a time."""
    source = as_integers(source)
    end = source.numel if numel is None else begin + numel
    width = ITEMSIZE[source.dtype]
    step = 8 * LEAF_NBYTES // width
    buffer = np.empty(min(step, max(end - begin, 1)), STORAGE_DTYPE[source.dtype])
    leaves = bytearray()
    with gathering(Gatherer()) if end - begin > step else contextlib.nullcontext():
        for at in range(begin, end, step):
            piece = buffer[: min(step, end - at)]
            read_values(source, at, piece)
            leaves += leaf_digests(piece.view(np.uint8).data)
    return fold_digest(leaves)


@dataclass(frozen=True)
class Viewed(Derived):
    """A tensor that is a view of other sources, all of its dtype."""

    name: str
    dtype: str
    view: View

    @property
    def shape(self) -> Index:  # type: ignore[override]
        return self.view.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return self.view.sources

    def read(self, begin: int, out: Array) -> None:
        fill(self, self.view, begin, out, read_values)

    def of_integers(self, dtype: str) -> Source:
        boxes = tuple(box._replace(source=as_integers(box.source)) for box in self.view.boxes)
        return Viewed(self.name, dtype, self.view._replace(boxes=boxes))


@dataclass(frozen=True)
class Widened(Derived):
    """A tensor of floats in a wider dtype, F32 or F64, which holds all its values."""

    name: str
    dtype: str
    source: Source

    @property
    def shape(self) -> Index:  # type: ignore[override]
        return self.source.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self.source,)

    def read(self, begin: int, out: Array) -> None:
        out[:] = widen(values_of(self.source, begin, out.size), self.source.dtype)
