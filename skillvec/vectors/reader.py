"""The vector file: layout, and stored deltas read block by block.

Hides how deltas lie on the disk: which tensors a codec makes of one delta, the block table, fp32
exceptions and replacements, shards and their index. A file that someone else wrote is hostile
until checked. docs/format.md is the normative text.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from skillvec.checkpoints.checkpoint import METADATA_KEY
from skillvec.checkpoints.folder import VECTOR_INDEX, is_there, read_index
from skillvec.checkpoints.locate import locate
from skillvec.checkpoints.opened_by import SUFFIXES
from skillvec.checkpoints.opening import kind_of_file
from skillvec.errors import FormatError, up_to_five, up_to_five_each
from skillvec.files.file import (
    LEAF_NBYTES,
    Place,
    digest_file_range,
    file_nbytes,
    read_into,
    remote_of,
)
from skillvec.files.header import (
    ITEMSIZE,
    MAX_DIMENSIONS,
    Header,
    TensorSpec,
    read_header,
    refuse_duplicates,
)
from skillvec.ops.block import BLOCK_NUMEL, block_count
from skillvec.ops.codecs import NO_BYTES, Encoded, decode_block
from skillvec.ops.delta import EXCEPTION
from skillvec.ops.kernels import FLOATS, Array, Bytes
from skillvec.vectors.block_reader import REPLACEMENT, StoredBlock
from skillvec.vectors.deltas.factored import FactoredDelta, stack_numel
from skillvec.vectors.deltas.stored import StoredDelta
from skillvec.vectors.manifest import (
    MAX_NORM,
    SCHEMAS,
    Manifest,
    TensorEntry,
    check_manifest,
    manifest_digest,
)

BLOCKS, EXCEPTIONS, REPLACEMENTS = (
    "skillvec.blocks",
    "skillvec.exceptions",
    "skillvec.replacements",
)
SIDE = (BLOCKS, EXCEPTIONS, REPLACEMENTS)
BLOCK_ROW_NBYTES = 12  # of the block table
FLOATS_SET = frozenset(FLOATS)
MAX_NUMEL = 1 << 36  # values a tensor: sixteen times the largest in use
# codec -> the tensors that hold a delta: the payload first
PARTS = {
    "zero": (), "dense": ("",), "sparse": (".values", ".bitmap"), "packed": (".packed",),
    "factors": (".factors",),
}  # fmt: skip


class VectorFile:
    """A vector on the disk, headers only: one file, or a folder of shards with an index.

    `deltas` are in the order of the data. Raises FormatError where manifest and tensors disagree.
    """

    def __init__(
        self, ref: str, path: Path, headers: dict[str, Header], metadata: dict[str, str]
    ) -> None:
        self.ref, self.path, self.headers = ref, path, headers
        try:
            self.manifest: Manifest = json.loads(
                metadata[METADATA_KEY], object_pairs_hook=_as_entry
            )
            self.digest = manifest_digest(self.manifest)
        except (ValueError, RecursionError) as error:  # escaped lone surrogates are no text
            raise self._broken(f"the manifest is not valid text: {str(error)[:200]}") from None
        self.deltas = self._checked()
        if self.manifest["digest"] != self.digest:
            raise self._broken("the manifest differs from its own digest: the file was altered")

    @cached_property
    def reader(self) -> "BlockReader":
        """What reads its blocks; the tables beside them are read and checked once."""
        return BlockReader(self)

    @property
    def files(self) -> list[str]:
        return list(self.headers)

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors as the files hold them, parts of deltas and side tables too."""
        return [spec for header in self.headers.values() for spec in header.tensors.values()]

    @property
    def real_files(self) -> list[Path]:
        """The files of this disk that links lead to."""
        return [Path(file).resolve() for file in self.files if remote_of(file) is None]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    def _broken(self, what: str) -> FormatError:
        return FormatError(f"vector {self.ref}: {what}")

    def _checked(self) -> dict[str, StoredDelta | FactoredDelta]:
        """Check the manifest against the tensors and number the blocks."""
        manifest = self.manifest
        if manifest.get("schema") not in SCHEMAS or manifest.get("block_numel") != BLOCK_NUMEL:
            raise self._broken(
                f"manifest schema {manifest.get('schema')!r} with blocks of"
                f" {manifest.get('block_numel')!r}; this version reads schemas 1 to"
                f" {SCHEMAS[-1]}, blocks of {BLOCK_NUMEL}: a newer skillvec is needed"
            )
        try:
            check_manifest(manifest)
        except TypeError as error:
            raise self._broken(f"broken {error}") from None
        entries = manifest["tensors"]
        homes = {
            name: (path, spec)
            for path, header in self.headers.items()
            for name, spec in header.tensors.items()
            if name not in SIDE
        }
        deltas: dict[str, StoredDelta | FactoredDelta] = {}
        claimed: set[str] = set()
        for name, entry in entries.items():
            delta = self._stored(name, entry, homes)
            deltas[name] = delta
            claimed.update([name + part for part in PARTS[delta.codec]])
        if claimed != set(homes):
            extra = sorted(set(homes) - claimed)
            raise self._broken(f"tensors that the manifest does not list:\n{up_to_five(extra)}")
        self._check_rows(deltas)
        return deltas

    def _stored(
        self, name: str, entry: TensorEntry, homes: dict[str, tuple[str, TensorSpec]]
    ) -> StoredDelta | FactoredDelta:
        codec, dtype, shape = entry["codec"], entry["dtype"], tuple(entry["shape"])
        sides = [side[0] for side in (entry["base"], entry["tuned"]) if side]
        if codec not in PARTS:
            raise self._broken(f"{name}: codec {codec!r}: a newer skillvec is needed")
        fits = min(shape, default=0) >= 0 and len(shape) <= MAX_DIMENSIONS
        numel = prod(shape) if fits else -1
        if not FLOATS_SET.issuperset((dtype, *sides)) or not 0 <= numel <= MAX_NUMEL:
            raise self._broken(
                f"broken manifest: {name}: {dtype} {str(list(shape))[:80]}: expected floats,"
                f" at most {MAX_NUMEL}"
            )
        if (entry["base"] is None) != (entry["tuned"] is None):
            raise self._broken(f"broken manifest: {name}: base and tuned go together")
        for count in (entry["changed"], entry.get("unrestored", 0), entry.get("nonfinite", 0)):
            if type(count) is not int or not 0 <= count <= numel:
                numel = -1
        if numel < 0 or not 0 <= entry["norm"] <= MAX_NORM:
            raise self._broken(f"broken manifest: {name}: counts or norm that cannot be")
        if codec == "zero":
            return StoredDelta(TensorSpec(name, dtype, shape, "", 0, 0), codec)
        rank, product = entry.get("rank", 0), TensorSpec(name, "F32", shape, "", 0, 0)
        if codec == "factors":
            held = stack_numel(shape, rank) if type(rank) is int and len(shape) > 1 else 0
            if not 0 < held < numel or rank < 1 or dtype == "F64":
                raise self._broken(f"{name}: {dtype} {list(shape)} of rank {str(rank)[:40]}")
            numel, shape = held, (held,)
        found = [homes.get(name + part) for part in PARTS[codec]]
        if any(home is None or home[0] != found[0][0] for home in found):  # type: ignore[index]
            raise self._broken(f"{name}: its {codec} tensors are missing")
        specs = [home[1] for home in found if home]
        payload = specs[0]
        wanted: list[tuple[str, tuple[int, ...] | None]] = [("U8", None)]
        if codec not in ("packed", "factors"):
            wanted = [(dtype, shape if codec == "dense" else None)]
        if codec == "sparse":
            wanted.append(("U8", (-(-numel // 8),)))
        for spec, (want_dtype, want_shape) in zip(specs, wanted, strict=True):
            wrong = spec.dtype != want_dtype or len(spec.shape) != (
                1 if want_shape is None else len(want_shape)
            )
            if wrong or (want_shape is not None and spec.shape != want_shape):
                raise self._broken(
                    f"{spec.name}: {spec.dtype} {list(spec.shape)}, the manifest says {codec}"
                    f" {dtype} {list(shape)}"
                )
        if payload.nbytes > numel * ITEMSIZE[dtype]:
            raise self._broken(f"{name}: {payload.nbytes} bytes for {numel} values")
        place = payload._replace(name=name, dtype=dtype, shape=shape)
        bitmap = specs[1] if codec == "sparse" else None
        kept = "packed" if codec == "factors" else codec
        stored = StoredDelta(place, kept, bitmap, entry["block"], entry["digest"])
        if codec != "factors":
            return stored
        product = product._replace(path=payload.path, start=payload.start, nbytes=payload.nbytes)
        return FactoredDelta(product, stored, rank)

    def _check_rows(self, deltas: Mapping[str, StoredDelta | FactoredDelta]) -> None:
        """Refuse block tables whose rows are not those of the deltas, each row once."""
        rows = dict.fromkeys(self.headers, 0)
        stored = {name: delta.payload for name, delta in deltas.items()}
        for name, delta in sorted(stored.items(), key=lambda item: item[1].first_block):
            if delta.codec == "zero":
                continue
            if delta.first_block != rows[delta.spec.path]:
                raise self._broken(
                    f"{name}: first block {delta.first_block}, expected {rows[delta.spec.path]}"
                )
            rows[delta.spec.path] += block_count(delta.spec.numel)
        for path, count in rows.items():
            blocks = self.headers[path].tensors.get(BLOCKS)
            if blocks is None or (blocks.dtype, blocks.shape) != ("U8", (count, 12)):
                raise self._broken(f"{os.path.basename(path)}: {BLOCKS} is not U8 [{count}, 12]")


def _as_entry(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a manifest; the names of dtypes and codecs are one string everywhere."""
    entry = refuse_duplicates(pairs)
    for key in ("dtype", "codec"):
        if type(name := entry.get(key)) is str:
            entry[key] = sys.intern(name)
    for key in ("base", "tuned"):
        side = entry.get(key)
        if type(side) is list and side and type(side[0]) is str:
            side[0] = sys.intern(side[0])
    return entry


def find_vector(ref: str | os.PathLike[str] | Place, role: str = "vector") -> VectorFile | None:
    """Open a vector file or folder, or return None where the reference leads to something else."""
    place = ref if isinstance(ref, Place) else locate(ref, role)
    files = place.files
    if place.member is None and VECTOR_INDEX in files:
        index = files[VECTOR_INDEX]
        weight_map, metadata = read_index(index)
        if kind_of_file(metadata) != "vector":
            raise FormatError(f"{index}: no manifest of a skill vector in its metadata")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if name not in files or not is_there(files[name])]
        if missing:
            raise FormatError(f"vector {place.ref}: shards are missing:\n{up_to_five(missing)}")
        headers = {files[name]: read_header(files[name]) for name in names}
        held = {(n, os.path.basename(p)) for p, h in headers.items() for n in h.tensors}
        listed = set(weight_map.items())
        wrong = {
            f"only in {where}": [f"{n}: only in {where} ({file})" for n, file in sorted(pairs)
                                 if n not in SIDE or n in weight_map]
            for where, pairs in (("the shards", held - listed), ("the index", listed - held))
        }  # fmt: skip
        if any(wrong.values()):
            raise FormatError(
                f"vector {place.ref}: index and shards disagree:\n{up_to_five_each(wrong)}"
            )
        return VectorFile(place.ref, place.path, headers, metadata)
    address = _one_file(place)
    if address is None:
        return None
    header = read_header(address)
    kind = kind_of_file(header.metadata)
    if kind == "vector shard":
        raise FormatError(f"{address}: one shard of a vector: open the folder it lies in")
    if kind != "vector":
        return None
    at = place.path if remote_of(address) else Path(address)
    headers = {address: header._replace(metadata={})}  # its text is long, and not needed any more
    return VectorFile(place.ref, at, headers, header.metadata)


def _one_file(place: Place) -> str | None:
    """Return the one safetensors file that a place is, or that lies in a folder without a model."""
    if place.member is not None:
        address = place.files[place.member]
    elif place.files or place.path.is_dir():
        names = [name for name in place.files if name.endswith(".safetensors")]
        if len(names) != 1 or names[0] == "model.safetensors":
            return None
        address = place.files[names[0]]
    else:
        address = os.fspath(place.path)
    if Path(address).suffix in SUFFIXES - {".safetensors"}:
        return None
    return address if is_there(address) and file_nbytes(address) >= 8 else None


def readers_of(vectors: Iterable[VectorFile]) -> "dict[str, BlockReader]":
    """Return a reader of each vector, by each of its files."""
    return {path: vector.reader for vector in vectors for path in vector.headers}


class BlockReader:
    """Reads stored deltas block by block, in any order and from any thread, checking as it goes."""

    def __init__(self, vector: VectorFile) -> None:
        self._vector = vector
        self._ends: dict[str, npt.NDArray[np.int64]] = {}
        sides = vector.manifest["side"]
        if len(sides) != len(vector.headers):
            raise self._broken("the manifest lists another number of shards")
        for (path, header), digests in zip(vector.headers.items(), sides, strict=True):
            for name in SIDE:
                if name in header.tensors:
                    spec = header.tensors[name]
                    if digest_file_range(path, spec.start, spec.nbytes) != digests.get(name):
                        raise self._broken(f"{name} differs from its digest in the manifest")
            self._ends[path] = self._read_table(path, header)
        for delta in vector.deltas.values():
            self._check_lengths(delta.payload)

    def _broken(self, what: str) -> FormatError:
        return FormatError(f"vector {self._vector.ref}: {what}: the file was altered")

    def _read_table(self, path: str, header: Header) -> npt.NDArray[np.int64]:
        """Return the running sums of payload bytes, exceptions and replacements by row."""
        spec = header.tensors[BLOCKS]
        content = bytearray(spec.nbytes)
        read_into(path, spec.start, memoryview(content))
        counts = np.frombuffer(content, "<u4").reshape(-1, 3)
        ends = np.zeros((len(counts) + 1, 3), np.int64)
        np.cumsum(counts, axis=0, out=ends[1:])
        for column, name, record in ((1, EXCEPTIONS, EXCEPTION), (2, REPLACEMENTS, REPLACEMENT)):
            total, found = int(ends[-1, column]), header.tensors.get(name)
            shape = (total, record.itemsize)
            if (total or found) and (found is None or (found.dtype, found.shape) != ("U8", shape)):
                raise self._broken(f"{name} is not U8 {list(shape)}")
        return ends

    def _check_lengths(self, delta: StoredDelta) -> None:
        if delta.codec == "zero":
            return
        first, numel = delta.first_block, delta.spec.numel
        itemsize = ITEMSIZE[delta.spec.dtype]
        ends = self._ends[delta.spec.path][first : first + block_count(numel) + 1, 0]
        raw = np.full(ends.size - 1, BLOCK_NUMEL * itemsize)
        if raw.size:
            raw[-1] = (numel - (raw.size - 1) * BLOCK_NUMEL) * itemsize
        lengths = np.diff(ends)
        fits = (lengths == raw if delta.codec == "dense" else lengths <= raw).all()
        if not fits or ends[-1] - ends[0] != delta.spec.nbytes:
            raise self._broken(f"{delta.spec.name}: {BLOCKS} does not fit its {delta.codec} bytes")

    def read(self, delta: StoredDelta, block: int, out: Array, scratch: Bytes) -> StoredBlock:
        """Fill `out` with a block's values.

        `scratch` has room for the values and a bitmap. Raises FormatError naming the tensor where
        the bytes do not decode.
        """
        if delta.codec == "zero":
            out.fill(0)
            return StoredBlock(np.zeros(0, EXCEPTION), np.zeros(0, REPLACEMENT), b"", True)
        path, row = delta.spec.path, delta.first_block + block
        ends = self._ends[path]
        begin, end = (int(ends[r, 0] - ends[delta.first_block, 0]) for r in (row, row + 1))
        payload = out.view(np.uint8) if delta.codec == "dense" else scratch[: end - begin]
        bitmap = NO_BYTES
        hashed = xxh3_128()
        if delta.bitmap is not None:
            bitmap = scratch[out.nbytes :][: -(-out.size // 8)]
            read_into(path, delta.bitmap.start + block * BLOCK_NUMEL // 8, bitmap.data)
            hashed.update(bitmap.data)
        step = LEAF_NBYTES if remote_of(path) is None else end - begin
        for at in range(0, end - begin, step or 1):  # hashed while it is in the processor's cache
            piece = payload[at : at + step].data
            read_into(path, delta.spec.start + begin + at, piece)
            hashed.update(piece)
        if delta.codec != "dense":
            try:
                decode_block(Encoded(payload, bitmap), delta.codec, out)
            except ValueError as error:
                raise self._broken(f"{delta.spec.name}, block {block}: {error}") from None
        return StoredBlock(
            self._records(path, EXCEPTIONS, 1, row, out.size, EXCEPTION),
            self._records(path, REPLACEMENTS, 2, row, out.size, REPLACEMENT),
            hashed.digest(),
            begin == end,
        )

    def _records(
        self, path: str, name: str, column: int, row: int, numel: int, record: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        first, last = self._ends[path][row : row + 2, column].tolist()
        if first == last:
            return np.zeros(0, record)
        if last - first > numel:
            raise self._broken(f"{name}, block {row}: {last - first} records for {numel} values")
        content = bytearray((last - first) * record.itemsize)
        spec = self._vector.headers[path].tensors[name]
        read_into(path, spec.start + first * record.itemsize, memoryview(content))
        records = np.frombuffer(content, record)
        at = records["position"]
        if at[-1] >= numel or (at.size > 1 and not (at[1:] > at[:-1]).all()):
            raise self._broken(
                f"{name}, block {row}: positions do not rise within the block of {numel}"
            )
        return records
