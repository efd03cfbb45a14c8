"""Writing a vector file: blocks in any order, placed in turn, the header last."""

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.checkpoints.checkpoint import METADATA_KEY
from skillvec.checkpoints.folder import VECTOR_INDEX
from skillvec.files.file import LEAF_NBYTES, allocate, digest_bytes, fold_digest, leaf_digests
from skillvec.files.header import ITEMSIZE, encode_header
from skillvec.files.official_reader import refuse_misread
from skillvec.files.output_file import OutputFile, fsync_path
from skillvec.files.rows import RowWriter
from skillvec.ops.block import BLOCK_NUMEL, block_count
from skillvec.ops.delta import EXCEPTION
from skillvec.vectors.block_reader import REPLACEMENT
from skillvec.vectors.deltas.factored import stack_numel
from skillvec.vectors.manifest import (
    MAX_NORM,
    Claim,
    Manifest,
    TensorEntry,
    TensorSide,
    encode_manifest,
)
from skillvec.vectors.reader import BLOCK_ROW_NBYTES, BLOCKS, EXCEPTIONS, PARTS, REPLACEMENTS, SIDE


class Entry(NamedTuple):
    """A delta to be written: the codec is the one planned, zero if all its values turn out so."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    rank: int = 0  # of factors

    @property
    def numel(self) -> int:
        """How many values are stored."""
        return stack_numel(self.shape, self.rank) if self.rank else prod(self.shape)

    @property
    def bitmap_nbytes(self) -> int:
        return -(-self.numel // 8) if self.codec == "sparse" else 0

    @property
    def nbytes(self) -> int:
        """The most it can take."""
        return self.numel * ITEMSIZE[self.dtype] + self.bitmap_nbytes


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Return entries in the order of the data: wide dtypes first, what is only bytes last."""
    return sorted(
        entries, key=lambda e: (e.codec in ("packed", "factors"), -ITEMSIZE[e.dtype], e.name)
    )


def tensor_entry(
    entry: Entry, codec: str, block: int, digest: str, changed: int, norm: float,
    base: TensorSide | None, tuned: TensorSide | None, unrestored: int = 0, nonfinite: int = 0,
) -> TensorEntry:  # fmt: skip
    """Return the manifest's line on one tensor; the norm in the 5 digits it is good for."""
    line = TensorEntry(
        dtype=entry.dtype, shape=list(entry.shape), codec=codec, block=block, digest=digest,
        changed=changed, norm=float(f"{min(norm, MAX_NORM):.4e}"), base=base, tuned=tuned,
    )  # fmt: skip
    if unrestored:
        line["unrestored"] = unrestored
    if nonfinite:
        line["nonfinite"] = nonfinite
    if entry.rank and codec != "zero":
        line["rank"] = entry.rank
    return line


def _widest(manifest: Manifest, entries: Sequence[Entry]) -> Manifest:
    """Return the manifest at its longest: what is known last, with the most digits."""
    hexes = "0" * 32
    total = sum(entry.numel for entry in entries)
    rows = total // BLOCK_NUMEL + len(entries)
    side = ["BF16", hexes]
    least, allowed = -1.2345e-300, manifest.get("allow_nonfinite", False)
    lines = {
        e.name: tensor_entry(e, "factors" if e.rank else "packed", rows, hexes, prod(e.shape),
                             least, side, side, e.numel, e.numel if allowed else 0)
        for e in entries
    }  # fmt: skip
    return {
        **manifest,
        **({"kept": least} if any(e.rank for e in entries) else {}),  # type: ignore[typeddict-item]
        "tensors": lines,
        "equal": {name: [entry[0], hexes] for name, entry in manifest["equal"].items()},
        "differing": list(manifest["equal"]),
        "side": [dict.fromkeys(SIDE, hexes)],
        "exactness": Claim(
            claim="combined", exceptions=total, replacements=total, unrestored=total
        ),
    }


class Settled(NamedTuple):
    """What a manifest is completed with when all rows are in.

    `placed` maps a tensor to its codec and first row; `side` has digests a shard.
    """

    placed: dict[str, tuple[str, int]]
    side: list[dict[str, str]]
    exceptions: int
    replacements: int


class _Shard:
    """One file being written: which rows it has, and where its side records wait."""

    def __init__(self, path: str, reserved_nbytes: int, windowed: bool) -> None:
        self.file = OutputFile(path, 0, windowed)
        self.file.reserve(reserved_nbytes)
        self.reserved_nbytes = reserved_nbytes
        self.entries: list[int] = []
        self.side_nbytes = 0  # bitmaps, block table and records so far
        self.used = False  # whether anything but zeros was put in
        self.records: tuple[int, ...] = ()  # exceptions and replacements


class VectorWriter(RowWriter):
    """Writes deltas block by block into one file, or into shards where one would grow too large.

    A row is a block: payload, bitmap, exceptions, replacements. Bitmaps and side records wait in
    files in the staging folder.
    """

    SPILLS = ("bitmaps", "exceptions", "replacements")

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Entry],
        manifest: Manifest,
        max_shard_nbytes: int,
        windowed: bool,
    ) -> None:
        self._first_rows = np.cumsum([0, *(block_count(e.numel) for e in entries)])
        super().__init__(int(self._first_rows[-1]), 4)
        self._folder, self._entries, self._windowed = folder, entries, windowed
        self._max_shard_nbytes = max_shard_nbytes
        self._made = folder / "made"
        self._made.mkdir(exist_ok=True)
        for file in self._made.glob("vector-*.safetensors"):  # a run was killed in `finish`
            os.rename(file, self._made / f"shard-{int(file.name.split('-')[1]) - 1}")
        self._owner = np.repeat(np.arange(len(entries)), np.diff(self._first_rows))
        self._spills = [OutputFile(os.fspath(folder / name), 0) for name in self.SPILLS]
        widest = encode_manifest(_widest(manifest, entries))
        self._reserved = [len(encode_header(self._layout(range(len(entries)), None), widest))]
        # what later shards need: the names that may still come
        widths = [len(json.dumps(e.name).encode()) * 2 + 40 * len(e.shape) + 200 for e in entries]
        self._reserved += [(1 << 10) + int(n) for n in np.cumsum(widths[::-1])[::-1][1:]]
        self._shards: list[_Shard] = []
        self._open_shard(0)

    def _open_shard(self, first_entry: int) -> None:
        path = self._made / f"shard-{len(self._shards)}"
        reserved = -(-self._reserved[first_entry] // 8) * 8
        self._shards.append(_Shard(os.fspath(path), reserved, self._windowed))

    @property
    def files(self) -> list[OutputFile]:
        return [*self._spills, *(shard.file for shard in self._shards)]

    def place(self, row: int, sizes: Sequence[int]) -> list[tuple[OutputFile, int]]:
        owner = int(self._owner[row])
        if row == self._first_rows[owner]:
            self._begin(owner)
        shard = self._shards[-1]
        shard.used |= sizes[0] + sizes[2] + sizes[3] > 0
        shard.side_nbytes += BLOCK_ROW_NBYTES + sum(sizes[1:])
        files = (shard.file, *self._spills)
        return [(file, file.reserve(size)) for file, size in zip(files, sizes, strict=True)]

    def _begin(self, owner: int) -> None:
        """Begin a tensor; in a new shard where this one might grow over the limit."""
        shard, entry = self._shards[-1], self._entries[owner]
        held = shard.file.nbytes + shard.side_nbytes
        # its rows, and a fiftieth for exceptions, of which nothing is known
        bound = entry.nbytes * 51 // 50 + BLOCK_ROW_NBYTES * block_count(entry.numel)
        if shard.used and held + bound > self._max_shard_nbytes:
            self._open_shard(owner)
            shard = self._shards[-1]
        shard.entries.append(owner)
        shard.side_nbytes += entry.bitmap_nbytes

    # ------------------------------------------------------------------------ when all is in

    @cached_property
    def _table(self) -> npt.NDArray[np.uint32]:
        """Payload bytes, exceptions and replacements of each block, when all rows are in."""
        widths = np.array([1, EXCEPTION.itemsize, REPLACEMENT.itemsize], np.uint32)
        return self.sizes[:, [0, 2, 3]] // widths

    @cached_property
    def _used(self) -> npt.NDArray[np.int64]:
        """The sums of the table over each tensor."""
        used = np.zeros((len(self._entries), 3), np.int64)
        np.add.at(used, self._owner, self._table)
        return used

    def _codec(self, owner: int) -> str:
        entry = self._entries[owner]
        empty = not self._used[owner].any() and (entry.codec != "dense" or not entry.numel)
        return "zero" if empty else entry.codec

    def _layout(
        self, owners: Iterable[int], records: Sequence[int] | None
    ) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return the tensors of a shard for its header; at the most they can take if no records."""
        payloads, bitmaps, rows, total = [], [], 0, 0
        for owner in owners:
            entry = self._entries[owner]
            codec = entry.codec if records is None else self._codec(owner)
            if codec == "zero":
                continue
            nbytes = entry.numel * ITEMSIZE[entry.dtype]
            total, rows = total + entry.numel, rows + block_count(entry.numel)
            if records is not None:
                nbytes = int(self._used[owner, 0])
            if codec == "dense":
                payloads.append((entry.name, entry.dtype, entry.shape))
            elif codec == "sparse":
                shape = (nbytes // ITEMSIZE[entry.dtype],)
                payloads.append((entry.name + PARTS[codec][0], entry.dtype, shape))
                bitmaps.append((entry.name + PARTS[codec][1], "U8", (entry.bitmap_nbytes,)))
            else:
                payloads.append((entry.name + PARTS[codec][0], "U8", (nbytes,)))
        exceptions, replacements = (total, total) if records is None else records
        sides = ((BLOCKS, rows, 12), (EXCEPTIONS, exceptions, 8), (REPLACEMENTS, replacements, 12))
        side = [(n, "U8", (count, width)) for n, count, width in sides if count or n == BLOCKS]
        return [*payloads, *bitmaps, *side]

    def settle(self) -> Settled:
        """Append bitmaps and side tables; return what the manifest is completed with."""
        if not self._shards[-1].used and len(self._shards) > 1:  # zeros alone
            unused = self._shards.pop().file
            unused.close()
            os.unlink(unused.path)
        placed = {entry.name: ("zero", 0) for entry in self._entries}
        sides, at = [], [0, 0, 0]
        for shard in self._shards:
            row, table = 0, []
            for owner in shard.entries:
                entry, codec = self._entries[owner], self._codec(owner)
                if codec != "zero":
                    placed[entry.name] = codec, row
                    table.append(self._table[slice(*self._first_rows[owner : owner + 2])])
                    row += len(table[-1])
                    if codec == "sparse":
                        self._append(shard.file, 0, at[0], entry.bitmap_nbytes)
                at[0] += entry.bitmap_nbytes
            counts = np.concatenate(table) if table else np.zeros((0, 3), np.uint32)
            content = counts.astype("<u4").tobytes()
            shard.file.append(content)
            digests = {BLOCKS: digest_bytes(content)}
            shard.records = tuple(int(n) for n in counts[:, 1:].sum(axis=0, dtype=np.int64))
            kinds = ((EXCEPTIONS, EXCEPTION), (REPLACEMENTS, REPLACEMENT))
            for spill, (name, record) in enumerate(kinds, 1):
                nbytes = shard.records[spill - 1] * record.itemsize
                if nbytes:
                    digests[name] = self._append(shard.file, spill, at[spill], nbytes)
                at[spill] += nbytes
            sides.append(digests)
        exceptions, replacements = np.sum(
            [shard.records for shard in self._shards], axis=0
        ).tolist()
        return Settled(placed, sides, exceptions, replacements)

    def _append(self, file: OutputFile, spill: int, start: int, nbytes: int) -> str:
        """Copy a range of a spill to the end of a file; return its digest."""
        leaves, buffer = bytearray(), memoryview(allocate(8 * LEAF_NBYTES))
        for at in range(0, nbytes, len(buffer)):
            piece = buffer[: min(len(buffer), nbytes - at)]
            self._spills[spill].read_into(start + at, piece)
            file.append(piece)
            leaves += leaf_digests(piece)
        return fold_digest(leaves)

    def finish(self, manifest: Manifest) -> Path:
        """Write headers, and an index for shards; return the file or folder, all on the disk."""
        if len(self._shards) == 1:
            self._write_header(self._shards[0], encode_manifest(manifest))
            return Path(self._shards[0].file.path)
        metadata = {"format": "pt", METADATA_KEY: '{"kind":"vector shard"}'}
        weight_map: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(self._shards, 1):
            name = f"vector-{number:05}-of-{len(self._shards):05}.safetensors"
            weight_map |= dict.fromkeys(self._write_header(shard, metadata), name)
            total += shard.file.nbytes - shard.reserved_nbytes
            os.rename(shard.file.path, self._made / name)
        index = {"metadata": {"total_size": total, **encode_manifest(manifest)}}
        text = json.dumps(index | {"weight_map": weight_map}, indent=2, ensure_ascii=False)
        (self._made / VECTOR_INDEX).write_text(text + "\n")
        fsync_path(os.fspath(self._made / VECTOR_INDEX))
        return self._made

    def _write_header(self, shard: _Shard, metadata: dict[str, str]) -> list[str]:
        layout = self._layout(shard.entries, shard.records)
        shard.file.write(0, encode_header(layout, metadata, shard.reserved_nbytes))
        shard.file.sync()
        refuse_misread(shard.file.path, layout)
        return [name for name, _, _ in layout if name not in SIDE]

    def close(self) -> None:
        for file in self.files:
            file.close()
