"""Patches: changed values of the exact base as lists, the forms in which RL stacks send weights.

`lists`: for each changed tensor NAME a rising `NAME.indices` (I32 or I64, flat positions) and
`NAME.values` (the tuned values, in the base's dtype). `vllm`: the same, and what vLLM's weight
transfer is told beside them. `verl`: all lists of a flush of verl end to end in three tensors. What
is not listed did not change. Hides the forms, and how a part of a list is found without reading the
rest; to all others a patched tensor is a source. A patch is hostile until checked, block by block.
"""

import contextlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from skillvec.block import block_count
from skillvec.checkpoint import (
    INDEX,
    METADATA_KEY,
    Checkpoint,
    Opened,
    kind_of_file,
    locate,
    open_tensors,
)
from skillvec.errors import (
    FormatError,
    IncompatibleError,
    NonfiniteError,
    up_to_five,
    up_to_five_each,
)
from skillvec.kernels import FLOATS, Array, narrow, widen
from skillvec.manifest import check_json
from skillvec.opened import PATCHED
from skillvec.operators import differ
from skillvec.sources import Derived, Index, Source, Widened, read_values, values_of
from skillvec.storage import (
    ITEMSIZE,
    MAX_HEADER_NBYTES,
    OutputFile,
    Place,
    RowWriter,
    TensorSpec,
    digest_bytes,
    digest_file_range,
    encode_header,
    file_nbytes,
    read_header,
    read_into,
    refuse_duplicates,
    refuse_misread,
)

FORMS = ("lists", "verl", "vllm")
INDICES, VALUES = ".indices", ".values"
SPEC, ALL_INDICES, ALL_VALUES = "__delta_spec__", "__positions__", "__values__"  # of verl
UPDATE = "update_info"  # header metadata: what vLLM's weight transfer is told
POSITIONS: dict[str, Any] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
STEP = 1 << 20  # positions that are looked at together
NARROW = 1 << 31  # values of a tensor whose positions verl and vLLM can send
ENTRY = 64 << 20  # values of one entry of a flush, as verl cuts them
RUNS = 4096  # rising parts of one entry of verl, which lays end to end what ranks have gathered
ALL_RUNS = 1 << 22  # of a whole patch: they are held in memory


def positions_dtype(numel: int) -> str:
    """Return the dtype in which positions in a tensor are written."""
    return "I64" if numel > 1 << 31 else "I32"


# -------------------------------------------------------------------------------- listed tensors


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


# ------------------------------------------------------------------------------- opening patches


@dataclass(frozen=True)
class Patch:
    """A patch: what it lists of each tensor, by the names that its sender uses.

    `family` is that of the base where skillvec wrote it; its names and shapes are then the base's.
    """

    place: Place
    form: str
    listings: Mapping[str, Listing]
    digest: str
    family: str | None
    opened: Opened

    @property
    def ref(self) -> str:
        return self.place.ref

    def problems(
        self, model: Mapping[str, Source], names: Mapping[str, str] = {}
    ) -> dict[str, list[str]]:
        """Return why lists do not fit a model, by kind, from headers alone.

        `names` says what the model calls tensors, where that is another name.
        """
        found = defaultdict(list)
        for name, listing in self.listings.items():
            spec = model.get(names.get(name, name))
            if spec is None:
                found["not in the base"].append(f"{name}: not in the base")
            elif listing.shape not in (None, spec.shape):
                said = f"{name}: {list(listing.shape or ())}, expected {list(spec.shape)}"
                found["of other shapes"].append(said)
            elif listing.dtype != spec.dtype:
                said = f"{name}: values in {listing.dtype}, expected {spec.dtype}"
                found["of other values"].append(said)
            elif spec.dtype not in FLOATS:
                found["no floats"].append(f"{name}: {spec.dtype}, no floats")
        return dict(found)

    def laid_over(
        self, model: Mapping[str, Source], names: Mapping[str, str] = {}
    ) -> dict[str, Source]:
        """Return the tensors of a model that it changes, changed, under the model's names.

        `names` as of `problems`. Raises FormatError for positions that do not rise, or lie outside.
        """
        listed = {names.get(n, n): one for n, one in self.listings.items() if one.numel}
        found: dict[str, Source] = {}
        runs = 0
        for name, listing in listed.items():
            found[name] = made = listing.over(model[name])
            runs += sum(len(one.starts) for one in made.lists)
            if runs > ALL_RUNS:
                raise FormatError(f"patch {self.ref}: {name}: positions in over {ALL_RUNS} runs")
        return found

    def tuned(self, tensors: Mapping[str, Source]) -> Checkpoint:
        """Return these tensors as the model that it leads to."""
        return Checkpoint(self.place, replace(self.opened, tensors=tensors, format=PATCHED))


def find_patch(ref: str | os.PathLike[str] | Place, role: str = "patch") -> list[Checkpoint] | None:
    """Return the files of a patch, a folder of several each for itself; None where it is none."""
    place = ref if isinstance(ref, Place) else locate(ref, role)
    flat = sorted(name for name in place.files if name.endswith(".safetensors") and "/" not in name)
    if place.member is not None or INDEX in place.files or len(flat) < 2:
        opened = open_tensors(place, role)
        return [opened] if form_of(opened, opened.metadata) else None
    headers = (read_header(place.files[name]) for name in flat)
    if not all(form_of(header.tensors, header.metadata) for header in headers):
        return None
    return [open_tensors(place._replace(member=name), role) for name in flat]


def form_of(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Return the form of a file that is a patch, by names and header metadata; None of any other.

    Of lists all tensors are pairs of positions and values; of none, if it says so.
    """
    names = set(names)
    if SPEC in names:
        return "verl"
    stems = {name.removesuffix(INDICES) for name in names if name.endswith(INDICES)}
    said = bool(names) or kind_of_file(metadata) == "patch"
    if not said or names != {stem + part for stem in stems for part in (INDICES, VALUES)}:
        return None
    return "vllm" if UPDATE in metadata else "lists"


def open_patch(ref: str | os.PathLike[str] | Place) -> Patch:
    """Open a patch of any form, which the file itself tells; headers and checksums are read.

    Raises IncompatibleError for what is no patch, or of dtypes that are not taken, FormatError for
    broken ones.
    """
    place = ref if isinstance(ref, Place) else locate(ref, "patch")
    files = find_patch(place)
    if files is None:
        raise IncompatibleError(
            f"patch {place.ref}: expected pairs of NAME{INDICES} and NAME{VALUES} or a flush of"
            f" verl ({SPEC}, {ALL_INDICES}, {ALL_VALUES})"
        )
    forms = {form_of(file, file.metadata) or "": file.ref for file in files}
    if len(forms) > 1:
        raise IncompatibleError(f"patch {place.ref}: files of several forms: {', '.join(forms)}")
    form = next(iter(forms))
    listings: dict[str, Listing] = {}
    for file in files:
        read = _of_verl if form == "verl" else _of_lists
        for name, listing in read(file).items():
            listings[name] = _joined(place.ref, name, listings.get(name), listing)
    seen = {path: state for file in files for path, state in file.opened.seen.items()}
    opened = replace(files[0].opened, seen=seen)
    return Patch(place, form, listings, _digest_of(files), _family(files[0]), opened)


def _joined(ref: str, name: str, one: Listing | None, other: Listing) -> Listing:
    """Return what two files list of a tensor as one."""
    if one is None:
        return other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise FormatError(f"patch {ref}: {name}: two dtypes or shapes in one patch")
    if any(listed.indices is None for listed in (*one.lists, *other.lists)):
        raise FormatError(f"patch {ref}: {name}: whole, and listed once more")
    return one._replace(lists=(*one.lists, *other.lists))


def _family(file: Checkpoint) -> str | None:
    if kind_of_file(file.metadata) != "patch":
        return None
    return str(json.loads(file.metadata[METADATA_KEY]).get("family"))


def _digest_of(files: Sequence[Checkpoint]) -> str:
    """Return the digest of a file, of several that of their digests."""
    paths = [path for file in files for path in file.files or [os.fspath(file.path)]]
    digests = [digest_file_range(path, 0, file_nbytes(path)) for path in paths]
    return digests[0] if len(digests) == 1 else digest_bytes(json.dumps(digests).encode())


def _of_lists(opened: Checkpoint) -> dict[str, Listing]:
    """Read a file of NAME.indices and NAME.values, with the shapes that vLLM is told."""
    problems, found = defaultdict(list), {}
    shapes = _told(opened) if UPDATE in opened.metadata else {}
    for full, indices in opened.items():
        name, _, kind = full.rpartition(".")
        if f".{kind}" != INDICES:
            continue
        values = opened[name + VALUES]
        if indices.dtype not in POSITIONS or len(indices.shape) != 1:
            said = f"{full}: {indices.dtype} {list(indices.shape)}, expected I32 or I64"
            problems["of other positions"].append(said)
        elif values.shape != indices.shape:
            said = f"{values.name}: {list(values.shape)}, expected {list(indices.shape)}"
            problems["of other values"].append(said)
        else:
            assert isinstance(indices, TensorSpec) and isinstance(values, TensorSpec)
            found[name] = Listing(values.dtype, shapes.get(name), (Listed(indices, values),))
    if problems:
        raise IncompatibleError(f"patch {opened.ref}:\n{up_to_five_each(problems)}")
    return found


class Update(TypedDict):
    """The fields of vLLM's SparseNCCLWeightTransferUpdateInfo, each with an item for a tensor."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    num_updates_list: list[int]


def _told(opened: Checkpoint) -> dict[str, Index]:
    """Return the shapes by name that vLLM is told, which have to be of what is listed."""
    try:
        said = json.loads(opened.metadata[UPDATE], object_pairs_hook=refuse_duplicates)
        check_json(said, Update, UPDATE)
        told = list(zip(*(said[field] for field in Update.__annotations__), strict=True))
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"patch {opened.ref}: {UPDATE} in its header: {error!s:.200}") from None
    shapes = {name: tuple(shape) for name, _, shape, _ in told}
    held = [name.removesuffix(VALUES) for name in opened if name.endswith(VALUES)]
    wrong = [
        f"{name}: {dtype} {count}, but {_listed(opened, name)}"
        for name, dtype, _, count in told
        if name not in held
        or (TORCH.get(opened[name + VALUES].dtype), opened[name + VALUES].numel) != (dtype, count)
    ]
    times = Counter(name for name, *_ in told)
    wrong += [f"{name}: told {n} times" for name, n in times.items() if n > 1]
    wrong += [f"{name}: listed, and not told" for name in held if name not in times]
    if wrong:
        raise FormatError(
            f"patch {opened.ref}: {UPDATE} in its header is of {len(told)} tensors, {len(held)} are"
            f" listed; they differ in these:\n{up_to_five(wrong)}"
        )
    return shapes


def _listed(opened: Checkpoint, name: str) -> str:
    values = opened.get(name + VALUES)
    if values is None:
        return "no values are listed"
    return f"{TORCH.get(values.dtype, values.dtype)} {values.numel} are listed"


# ------------------------------------------------------------------------------ a flush of verl


class FlushEntry(TypedDict):
    """Where in a flush the values of a tensor stand, or those of a part of it."""

    name: str
    dtype: str
    shape: list[int]
    pos_start: int
    pos_end: int
    pos_width: int
    val_start: int
    val_end: int


class Flush(TypedDict):
    """The JSON text beside the lists of a flush."""

    encoding: str
    checksum: int
    params: list[FlushEntry]


def _of_verl(opened: Checkpoint) -> dict[str, Listing]:
    """Read a flush: entries of a JSON text over one tensor of positions and one of values.

    An entry has what ranks gathered, end to end, so that its positions rise in several runs.
    """
    what = f"patch {opened.ref}"
    said, indices, values = _flush(opened, what)
    dtypes = {theirs: ours for ours, theirs in TORCH.items()}
    found: dict[str, Listing] = {}
    at = 0
    for entry in said["params"]:
        name, shape, end = entry["name"], tuple(entry["shape"]), entry["val_end"]
        width = 0 if indices is None else 4
        places = [entry["val_start"], entry["pos_start"], entry["pos_end"]]
        if places != [at, width * at, width * end] or not at <= end <= values.numel:
            raise FormatError(
                f"{what}: {name}: its entry in {SPEC} does not go on where the one before it ends,"
                " or goes beyond what was sent"
            )
        if entry["dtype"] not in dtypes or entry["pos_width"] != 4:
            raise IncompatibleError(
                f"{what}: {name}: {entry['dtype']:.80}, positions of {entry['pos_width']} bytes;"
                f" expected one of {', '.join(dtypes)}, positions of 4"
            )
        if indices is None and end - at != prod(shape):
            raise FormatError(f"{what}: {name}: {end - at} values, expected {list(shape)}")
        listed = Listed(
            indices and cut_part(indices, at, end)._replace(name=f"{name} in {ALL_INDICES}"),
            cut_part(values, at, end)._replace(name=f"{name} in {ALL_VALUES}"),
        )
        listing = Listing(dtypes[entry["dtype"]], shape, (listed,), RUNS)
        found[name] = _joined(opened.ref, name, found.get(name), listing)
        at = end
    if at != values.numel or (indices is not None and at != indices.numel):
        raise FormatError(f"{what}: {ALL_VALUES} goes on behind the entries of {SPEC}")
    return found


def _flush(opened: Checkpoint, what: str) -> tuple[Flush, TensorSpec | None, TensorSpec]:
    """Return what a flush says, its positions (None where it sends all values) and its values."""
    if others := sorted(set(opened) - {SPEC, ALL_INDICES, ALL_VALUES}):
        raise IncompatibleError(
            f"{what}: a flush of verl ({SPEC}) and other tensors in one file: which of them?\n"
            + up_to_five(others)
        )
    blobs = [opened.get(name) for name in (SPEC, ALL_INDICES, ALL_VALUES)]
    for name, blob, dtypes in zip((SPEC, ALL_INDICES, ALL_VALUES), blobs,
                                  (("U8",), ("U8",), FLOATS), strict=True):  # fmt: skip
        found = "none" if blob is None else f"{blob.dtype} {list(blob.shape)}"
        optional = blob is None and name == ALL_INDICES
        if not optional and (blob is None or blob.dtype not in dtypes or len(blob.shape) != 1):
            expected = "U8" if dtypes == ("U8",) else "floats"
            raise IncompatibleError(f"{what}: {name}: {found}, expected {expected}, 1-D")
    spec, indices, values = blobs
    assert isinstance(spec, TensorSpec) and isinstance(values, TensorSpec)
    try:
        if spec.nbytes > MAX_HEADER_NBYTES:
            raise ValueError(f"{spec.nbytes} bytes, over the cap of {MAX_HEADER_NBYTES}")
        text = values_of(spec, 0, spec.numel).tobytes()
        said: Flush = json.loads(text, object_pairs_hook=refuse_duplicates)
        check_json(said, Flush, SPEC)
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{what}: {SPEC}: {error!s:.200}") from None
    nbytes = None if indices is None else indices.nbytes
    if nbytes is None or said["encoding"] == "dense":
        if said["encoding"] != "dense" or nbytes:
            raise IncompatibleError(
                f"{what}: encoding {said['encoding']:.80} with {nbytes or 'no'} bytes of positions,"
                f" expected indices with {ALL_INDICES}, or dense without"
            )
        indices = None
    elif said["encoding"] != "indices" or nbytes % 4:
        raise IncompatibleError(
            f"{what}: encoding {said['encoding']:.80} with {nbytes} bytes of positions, expected"
            " indices with 4 a value"
        )
    if said["checksum"] != checksum([] if indices is None else [indices], [values]):
        raise FormatError(f"{what}: the checksum in {SPEC} is not that of what was sent")
    if indices is not None:
        assert isinstance(indices, TensorSpec)
        indices = indices._replace(dtype="I32", shape=(indices.nbytes // 4,))
    return said, indices, values


def checksum(indices: Iterable[Source], values: Iterable[Source]) -> int:
    """Return verl's checksum: torch.hash_tensor of the positions' bytes, and of the values.

    That is the exclusive or of all, each as the bits of an unsigned integer or a float of 64 bits.
    """
    found = [0, 0]
    for number, sources in enumerate((indices, values)):
        for source in sources:
            for piece in pieces(source):
                if source.dtype in FLOATS:
                    with np.errstate(invalid="ignore"):  # signalling NaNs
                        bits = widen(piece, source.dtype).astype(np.float64).view(np.uint64)
                else:
                    bits = piece.view(np.uint8).astype(np.uint64)
                found[number] ^= int(np.bitwise_xor.reduce(bits))
    return found[0] ^ (found[1] << 1)


# ---------------------------------------------------------------------------------------- writing

_Written = tuple[str, str, Index, Sequence[Source]]  # name, dtype and shape, what it is read from


class PatchWriter(RowWriter):
    """Writes lists block by block, a row the positions and values of a block, into spill files."""

    def __init__(self, folder: Path, specs: Sequence[Source]) -> None:
        self._owner = np.repeat(np.arange(len(specs)), [block_count(spec.numel) for spec in specs])
        super().__init__(self._owner.size, 2)
        self._folder, self._specs = folder, specs
        self._spills = [OutputFile(os.fspath(folder / name), 0) for name in ("indices", "values")]
        self.counts = np.zeros(len(specs), np.int64)

    @property
    def files(self) -> list[OutputFile]:
        return self._spills

    def place(self, row: int, sizes: Sequence[int]) -> list[tuple[OutputFile, int]]:
        owner = int(self._owner[row])
        self.counts[owner] += sizes[1] // ITEMSIZE[self._specs[owner].dtype]
        return [(file, file.reserve(size)) for file, size in zip(self._spills, sizes, strict=True)]

    def finish(self, said: dict[str, Any], form: str = "lists") -> Path:
        """Write the file in a form; return its path.

        Raises NonfiniteError for NaN in a form whose readers take it for what did not change.
        """
        lists = self._lists()
        metadata = {"format": "pt", METADATA_KEY: json.dumps(said | {"kind": "patch"})}
        if form != "lists":
            _refuse_nan(lists, form)
        if form == "vllm":
            metadata[UPDATE] = json.dumps(Update(
                names=[spec.name for spec, _ in lists],
                dtype_names=[TORCH[spec.dtype] for spec, _ in lists],
                shapes=[list(spec.shape) for spec, _ in lists],
                num_updates_list=[listed.values.numel for _, listed in lists],
            ))  # fmt: skip
        parts = self._flush(lists) if form == "verl" else _as_they_are(lists)
        file = OutputFile(os.fspath(self._folder / "patch"), 0)
        try:
            layout = [part[:3] for part in parts]
            file.append(encode_header(layout, metadata))
            for *_, sources in parts:
                for source in sources:
                    for piece in pieces(source):
                        file.append(piece.view(np.uint8).data)
            file.sync()
        finally:
            file.close()
        refuse_misread(file.path, layout)
        return Path(file.path)

    def _lists(self) -> list[tuple[Source, Listed]]:
        """Return the tensors that changed, with their lists in the spill files."""
        found, ends = [], [0, 0]
        for spec, count in zip(self._specs, map(int, self.counts), strict=True):
            parts = []
            for n, dtype in enumerate((positions_dtype(spec.numel), spec.dtype)):
                name, nbytes = spec.name + (INDICES, VALUES)[n], count * ITEMSIZE[dtype]
                parts.append(
                    TensorSpec(name, dtype, (count,), self._spills[n].path, ends[n], nbytes)
                )
                ends[n] += nbytes
            if count:
                found.append((spec, Listed(parts[0], parts[1])))
        return found

    def _flush(self, lists: Sequence[tuple[Source, Listed]]) -> list[_Written]:
        """Return the three tensors of a flush of verl, aligned for who views their bytes."""
        dtype = _common_dtype([spec.dtype for spec, _ in lists] or ["F32"])
        indices = [listed.indices for _, listed in lists if listed.indices is not None]
        values = [one.values if one.values.dtype == dtype else Widened("", dtype, one.values)
                  for _, one in lists]  # fmt: skip
        params: list[FlushEntry] = []
        at = 0
        for spec, listed in lists:
            for begin in range(at, end := at + listed.values.numel, ENTRY):
                to = min(begin + ENTRY, end)
                params.append({
                    "name": spec.name, "dtype": TORCH[spec.dtype], "shape": list(spec.shape),
                    "pos_start": 4 * begin, "pos_end": 4 * to, "pos_width": 4,
                    "val_start": begin, "val_end": to,
                })  # fmt: skip
            at = end
        said = {"encoding": "indices", "params": params, "checksum": checksum(indices, values)}
        text = OutputFile(os.fspath(self._folder / "spec"), 0)
        with contextlib.closing(text):
            text.append(json.dumps(said).encode())
        spec = TensorSpec(SPEC, "U8", (text.nbytes,), text.path, 0, text.nbytes)
        blobs: list[_Written] = [(ALL_INDICES, "U8", (4 * at,), indices),
                                 (ALL_VALUES, dtype, (at,), values)]  # fmt: skip
        return [*sorted(blobs, key=lambda part: -max(ITEMSIZE[part[1]], 4 * (part[1] == "U8"))),
                (SPEC, "U8", spec.shape, [spec])]  # fmt: skip

    def close(self) -> None:
        for file in self._spills:
            file.close()


def _as_they_are(lists: Sequence[tuple[Source, Listed]]) -> list[_Written]:
    """Return pairs of tensors: values before positions, wide before narrow."""
    pairs = [(listed.indices, listed.values) for _, listed in lists]
    parts = [part for pair in pairs for part in pair if part is not None]
    parts.sort(key=lambda part: (-ITEMSIZE[part.dtype], part.name))
    return [(part.name, part.dtype, part.shape, [part]) for part in parts]


def _common_dtype(dtypes: Sequence[str]) -> str:
    """Return the dtype that torch.cat gives tensors of these floats."""
    widest = max(set(dtypes), key=ITEMSIZE.__getitem__)
    halves = {dtype for dtype in dtypes if ITEMSIZE[dtype] == 2}
    return "F32" if ITEMSIZE[widest] == 2 and len(halves) > 1 else widest


def pieces(source: Source) -> Iterator[Array]:
    """Yield all values of a source, a few MB at a time."""
    for begin in range(0, source.numel, STEP):
        yield values_of(source, begin, min(STEP, source.numel - begin))


def _refuse_nan(lists: Sequence[tuple[Source, Listed]], form: str) -> None:
    wrong = []
    for spec, listed in lists:
        wide = (widen(piece, spec.dtype) for piece in pieces(listed.values))
        if count := sum(int(np.isnan(piece).sum()) for piece in wide):
            wrong.append(f"{spec.name}: {count} of {listed.values.numel} listed values are NaN")
    if wrong:
        raise NonfiniteError(
            f"the form {form} cannot carry NaN, which its readers take for values that did not"
            f" change; lists can:\n{up_to_five(wrong)}"
        )
