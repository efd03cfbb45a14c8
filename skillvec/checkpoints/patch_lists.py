"""What a patch lists of a tensor, as a source laid over the base's."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from skillvec.errors import FormatError
from skillvec.files.file import read_into
from skillvec.files.header import ITEMSIZE, TensorSpec
from skillvec.files.tensors import Derived, Source, read_values, values_of
from skillvec.files.views import Index
from skillvec.ops.kernels import Array, narrow, widen
from skillvec.ops.special import differ

FORMS = ("lists", "verl", "vllm")
NARROW = 1 << 31  # values of a tensor whose positions verl and vLLM can send
POSITIONS: dict[str, Any] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
STEP = 1 << 20  # positions that are looked at together


def positions_dtype(numel: int) -> str:
    """Return the dtype in which positions in a tensor are written."""
    return "I64" if numel > 1 << 31 else "I32"


class Listed(NamedTuple):
    """Values at positions of a flat tensor that rise from each of `starts` to the next.

    Without positions: of all of it.
    """

    indices: TensorSpec | None
    values: TensorSpec
    starts: tuple[int, ...] = (0,)

    def within(self, begin: int, end: int, dtype: str) -> Iterator[tuple[Any, Array]]:
        """Yield the listed positions from begin to end, counted from begin, and their values.

        Raises FormatError where they do not rise, or the dtype does not hold a value.
        """
        if self.indices is None:
            yield slice(None), self._narrowed(values_of(self.values, begin, end - begin), dtype)
            return
        for run in pairwise((*self.starts, self.indices.numel)):
            low, high = self._bound(begin, *run), self._bound(end, *run)
            at = values_of(self.indices, low, min(max(high - low, 0), end - begin))
            at = at.astype(np.int64) - begin
            rises = at.size == high - low and (at[1:] > at[:-1]).all()
            if not rises or (at.size and (at[0] < 0 or at[-1] >= end - begin)):
                raise FormatError(
                    f"{self.indices.path}: {self.indices.name}: positions do not rise (of values"
                    f" {begin} to {end})"
                )
            yield at, self._narrowed(values_of(self.values, low, high - low), dtype)

    def _bound(self, position: int, low: int, high: int) -> int:
        """Return where in a run of the list a position would stand: a search of a few reads."""
        assert self.indices is not None
        width = ITEMSIZE[self.indices.dtype]
        record = bytearray(width)
        while low < high:
            middle = (low + high) // 2
            read_into(self.indices.path, self.indices.start + middle * width, memoryview(record))
            if int.from_bytes(record, "little", signed=True) < position:
                low = middle + 1
            else:
                high = middle
        return low

    def _narrowed(self, values: Array, dtype: str) -> Array:
        """Return values in a narrower dtype: a flush has one for all, as torch.cat makes it."""
        if self.values.dtype == dtype:
            return values
        wide = widen(values, self.values.dtype)
        found = narrow(wide, dtype)
        if differ(widen(found, dtype), wide).any():
            raise FormatError(
                f"{self.values.path}: {self.values.name}: values in {self.values.dtype} that"
                f" {dtype}, the dtype of their tensor, does not hold"
            )
        return found


@dataclass(frozen=True)
class Overlaid(Derived):
    """A tensor with listed values in place of its own; no position is in two of the lists."""

    base: Source
    lists: tuple[Listed, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.base.name

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    @property
    def shape(self) -> Index:  # type: ignore[override]
        return self.base.shape

    @property
    def nbytes_read(self) -> int:
        return self.nbytes + sum(part.nbytes for part in self.parts[1:])

    @property
    def parts(self) -> tuple[Source, ...]:
        listed = ((one.indices, one.values) for one in self.lists)
        return (self.base, *(spec for pair in listed for spec in pair if spec is not None))

    def read(self, begin: int, out: Array) -> None:
        read_values(self.base, begin, out)
        several = sum(len(one.starts) for one in self.lists) > 1
        taken = np.zeros(out.size if several else 0, np.bool_)
        for listed in self.lists:
            for at, values in listed.within(begin, begin + out.size, self.dtype):
                if several and taken[at].any():
                    raise FormatError(
                        f"{listed.values.path}: {self.name}: positions that are listed twice (of"
                        f" values {begin} to {begin + out.size})"
                    )
                if several:
                    taken[at] = True
                out[at] = values


class Listing(NamedTuple):
    """What a patch lists of a tensor; `shape` is None where its form does not say."""

    dtype: str
    shape: Index | None
    lists: tuple[Listed, ...]
    runs: int = 1  # rising parts that one list may have

    @property
    def numel(self) -> int:
        return sum(listed.values.numel for listed in self.lists)

    def over(self, base: Source) -> Overlaid:
        """Return a tensor with what is listed in it.

        Raises FormatError where positions lie outside, or do not rise.
        """
        lists = (one._replace(starts=_starts(one, base.numel, self.runs)) for one in self.lists)
        return Overlaid(base, tuple(lists))


def _starts(listed: Listed, numel: int, most: int) -> tuple[int, ...]:
    """Return where the at most `most` runs of a list begin, in which positions rise.

    Raises FormatError where there are more, or a position lies outside a tensor of `numel` values.
    """
    spec = listed.indices
    if spec is None:
        return (0,)
    where = f"{spec.path}: {spec.name}: positions do not rise within the tensor's {numel} values"
    starts, last, begin = [0], -1, 0
    for at in pieces(spec):
        if at.min() < 0 or at.max() >= numel:
            wrong = int(np.flatnonzero((at < 0) | (at >= numel))[0])
            raise FormatError(f"{where}: {at[wrong]} stands at {begin + wrong}")
        falls = np.flatnonzero(np.diff(at.astype(np.int64), prepend=last) <= 0)
        if len(starts) + falls.size > most:
            wrong = int(falls[most - len(starts)])
            raise FormatError(f"{where}: {at[wrong]} stands at {begin + wrong}")
        starts += (begin + falls).tolist()
        last, begin = int(at[-1]), begin + at.size
    return tuple(starts)


def cut_part(spec: TensorSpec, begin: int, end: int) -> TensorSpec:
    """Return values begin to end of a 1-D tensor."""
    width = ITEMSIZE[spec.dtype]
    at = spec.start + begin * width
    return spec._replace(shape=(end - begin,), start=at, nbytes=(end - begin) * width)


def pieces(source: Source) -> Iterator[Array]:
    """Yield all values of a source, a few MB at a time."""
    for begin in range(0, source.numel, STEP):
        yield values_of(source, begin, min(STEP, source.numel - begin))
