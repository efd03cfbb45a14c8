"""Patches: changed values of the exact base as lists, the forms in which RL stacks send weights.

`lists`: for each changed tensor NAME a rising `NAME.indices` (I32 or I64, flat positions) and
`NAME.values` (the tuned values, in the base's dtype). `vllm`: the same, and what vLLM's weight
transfer is told beside them. `verl`: all lists of a flush of verl end to end in three tensors. What
is not listed did not change. Hides the forms, and how a part of a list is found without reading the
rest; to all others a patched tensor is a source. A patch is hostile until checked, block by block.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypedDict

import numpy as np

from skillvec.checkpoints.checkpoint import METADATA_KEY, Checkpoint
from skillvec.checkpoints.folder import INDEX
from skillvec.checkpoints.locate import locate
from skillvec.checkpoints.opened import PATCHED, Opened
from skillvec.checkpoints.opening import kind_of_file, open_tensors
from skillvec.checkpoints.patch_lists import POSITIONS, Listed, Listing, cut_part, pieces
from skillvec.errors import FormatError, IncompatibleError, up_to_five, up_to_five_each
from skillvec.files.file import Place, digest_bytes, digest_file_range, file_nbytes
from skillvec.files.header import MAX_HEADER_NBYTES, TensorSpec, read_header, refuse_duplicates
from skillvec.files.tensors import Source, values_of
from skillvec.files.typed_json import check_json
from skillvec.files.views import Index
from skillvec.ops.kernels import FLOATS, widen

INDICES, VALUES = ".indices", ".values"
SPEC, ALL_INDICES, ALL_VALUES = "__delta_spec__", "__positions__", "__values__"  # of verl
UPDATE = "update_info"  # header metadata: what vLLM's weight transfer is told
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
RUNS = 4096  # rising parts of one entry of verl, which lays end to end what ranks have gathered
ALL_RUNS = 1 << 22  # of a whole patch: they are held in memory


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
