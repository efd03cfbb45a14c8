"""Kinds of deltas: where the values of one tensor come from. One contract, a class a kind.

A delta is stored, subtracted, computed, seen through a view or merged. All kinds are frozen,
picklable addresses and numbers, which plans hold, and read any block of their values. Nothing
else asks what kind a delta is: a new kind is a class that says what `DeltaSource` asks for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from skillvec.errors import FormatError, NonfiniteError, UsageError
from skillvec.files.file import fold_digest
from skillvec.files.gather import Gatherer, gathering
from skillvec.files.header import TensorSpec
from skillvec.files.tensors import Source
from skillvec.files.views import View, whole
from skillvec.ops.arithmetic import Exactness
from skillvec.ops.block import BLOCK_NUMEL, block_count
from skillvec.ops.delta import STEP, Delta
from skillvec.ops.kernels import DTYPE_NAMES, Array
from skillvec.vectors.block_reader import Block, StoredReader, Workspace

NO_DIGEST = fold_digest(b"")
Decoded = tuple[Delta, npt.NDArray[Any]]  # a block, and the replacements that go with it


class Subtracted(Protocol):
    """Two tensors that are subtracted, into values of a dtype."""

    @property
    def tuned(self) -> Source: ...
    @property
    def base(self) -> Source: ...
    @property
    def dtype(self) -> str: ...
    @property
    def exactness(self) -> Exactness: ...


class InFile(Protocol):
    """A delta of a vector file: where it lies, and what its manifest says of its bytes."""

    @property
    def spec(self) -> TensorSpec: ...
    @property
    def codec(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def is_zero(self) -> bool: ...


class DeltaSource(ABC):
    """A tensor's delta: what it is read from, and how a block of it is made.

    A kind is a frozen dataclass with slots; where a field of it stands for a property of this
    contract it is declared with `field()`, or the property would be taken for its default.
    """

    __slots__ = ()
    is_stored: ClassVar[bool] = False  # in a vector file, whose manifest has its digest and counts
    is_relaid: ClassVar[bool] = False  # its values lie in another layout than its vector's own

    @property
    @abstractmethod
    def spec(self) -> Source:
        """The tensor's name and shape, and where it or the first of its parts lies."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What reading all of it reads."""

    @abstractmethod
    def read(self, block: Block, role: str) -> Decoded:
        """Return a block of it; `role` names its buffer, and its digests in `block.leaves`."""

    @property
    def dtype(self) -> str:
        """The safetensors dtype of its values."""
        return self.spec.dtype

    def files(self) -> Iterator[str]:
        """Yield the files that its tensors lie in, perhaps one more than once; no vector files."""
        for part in self.parts:
            yield from part.files()

    @property
    def parts(self) -> "tuple[DeltaSource, ...]":
        """The deltas that it is made of."""
        return ()

    @property
    def merged(self) -> int:
        """How many deltas of one shape are held to make it, 0 where none is merged."""
        return 0

    @property
    def pair(self) -> "Subtracted | None":
        """The two tensors that are subtracted for it, None where it is no difference."""
        return None

    @property
    def is_zero(self) -> bool:
        """Whether it is known to be zero without being read."""
        return False

    @property
    def fits(self) -> str:
        """The narrowest dtype that is known to hold all its values."""
        return self.dtype

    @property
    def stack(self) -> "Stack | None":
        """The factors that it is multiplied out of, as what a file keeps of it; None: no factors.

        Its dtype is that of the factors; its name and shape are those of the product.
        """
        return None

    def stored_parts(self, role: str) -> "Iterator[tuple[str, InFile]]":
        """Yield the stored deltas that are read whole for it, with their roles."""
        yield from ()

    @property
    def names(self) -> list[str]:
        """The names under which its vector holds what it is made of."""
        return [self.spec.name]

    def name_in_manifest(self, name: str) -> str:
        """Return where its manifest speaks of it if a vector calls it `name`; "" for nowhere."""
        return name

    @property
    def key(self) -> str:
        """What tells it from the others that views read in one run."""
        return f"{self.spec.path}\n{self.spec.name}"

    @property
    def way(self) -> Any:
        """How its values are made: equal ways of equal parts give equal values; None: not sure."""
        return None

    @property
    def passes(self) -> int:
        """How many measuring passes come before it can be read."""
        return 0

    def informed(self, known: Mapping[Any, Any]) -> Self:
        """Return it with what measuring passes have found by now, by scope."""
        return self

    def stored_as(self, dtype: str) -> "DeltaSource":
        """Return it as it is read in order to be stored in a dtype."""
        return self

    def as_view(self) -> View:
        """Return it as a view of what it is read from."""
        return whole(self, self.spec.shape)


class Stack(DeltaSource):
    """The factors of a delta, of `rank` columns."""

    __slots__ = ()
    rank: int


def dtype_of(name: str) -> str:
    """Return the safetensors dtype of a name such as bf16; UsageError for others."""
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype {name!r}: expected one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def views_in(deltas: Iterable[DeltaSource]) -> Iterator[DeltaSource]:
    """Yield the views among deltas, in combinations, and in what views are of."""
    for delta in deltas:
        if delta.is_relaid:
            yield delta
        yield from views_in(delta.parts)


def stored_in(deltas: Iterable[DeltaSource]) -> Iterator[tuple[str, InFile]]:
    """Yield the stored deltas of a job with their roles."""
    for i, delta in enumerate(deltas):
        yield from delta.stored_parts(f"delta{i}")


def check_digests(deltas: Iterable[DeltaSource], digests: Mapping[str, str]) -> None:
    """Refuse stored deltas whose bytes are not those that the manifest speaks of."""
    for role, source in stored_in(deltas):
        if digests.get(role, NO_DIGEST) != source.digest:
            raise FormatError(
                f"{source.spec.path}: {source.spec.name} differs from its digest in the"
                " manifest: the file was altered"
            )


def pieces_of(
    source: DeltaSource | Source,
    readers: Mapping[str, StoredReader],
    lost: dict[str, int] | None = None,
    first: int = 0,
    last: int | None = None,
) -> Iterator[tuple[int, Array]]:
    """Yield begin and values, in fp32 or fp64, of the pieces of a delta or a tensor of a model.

    Of the values `first` to `last` only. Where a delta is not finite the values are 0. `lost` takes
    how many that are, by name; without it NonfiniteError is raised behind the last piece. So is
    FormatError where stored deltas, read whole, are not what their digests say.
    """
    spec = source.spec if isinstance(source, DeltaSource) else source
    last = spec.numel if last is None else last
    workspace, gatherer, count = Workspace(), Gatherer(), 0
    leaves: dict[str, bytearray] = {}
    for index in range(first // BLOCK_NUMEL, block_count(last)):
        block = Block(index, spec.numel, workspace, readers, leaves)
        with gathering(gatherer):
            if isinstance(source, DeltaSource):
                delta = source.read(block, "delta0")[0]
            else:
                delta = Delta(block.read("point", source), source.dtype)
        here = slice(max(first - block.begin, 0), min(last - block.begin, block.size))
        if block.lost_codes is not None:
            count += int(np.count_nonzero(block.lost_codes[here]))
        for begin in range(here.start, here.stop, STEP):
            yield block.begin + begin, delta.wide(begin, min(begin + STEP, here.stop))
    if isinstance(source, DeltaSource) and (first, last) == (0, spec.numel):
        check_digests([source], {role: fold_digest(held) for role, held in leaves.items()})
    if count and lost is None:
        raise NonfiniteError(f"{spec.name}: {count} of {spec.numel} differences are not finite")
    if count and lost is not None:
        lost[spec.name] = count


def add_values(
    source: DeltaSource | Source, readers: Mapping[str, StoredReader], out: Array,
    factor: float = 1.0,
) -> None:  # fmt: skip
    """Add a whole delta times `factor`, or a tensor of a model, to `out`, flat and in fp32.

    Where a delta is not finite it counts as 0: who runs its jobs has counted and refused that.
    """
    for begin, values in pieces_of(source, readers, {}):
        out[begin : begin + values.size] += factor * values
