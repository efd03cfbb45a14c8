"""Patches: changed values of the exact base as lists, the form in which RL stacks send weights.

One safetensors file: for each changed tensor NAME a sorted `NAME.indices` (I32 or I64, flat
positions) and `NAME.values` (the tuned values, in the base's dtype). What is not listed did not
change. Hides how one block's part of a sorted list is found without reading the rest. A patch is
hostile until checked, block by block.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from skillvec.checkpoint import METADATA_KEY, Checkpoint, kind_of_file, open_tensors
from skillvec.errors import FormatError, IncompatibleError, only_here, up_to_five_each
from skillvec.kernels import STORAGE_DTYPE, Array
from skillvec.sources import Source
from skillvec.storage import (
    ITEMSIZE,
    OutputFile,
    RowWriter,
    TensorSpec,
    allocate,
    digest_file_range,
    encode_header,
    read_into,
)
from skillvec.vectorfile import BLOCK_NUMEL, block_count

INDICES, VALUES = ".indices", ".values"
POSITIONS: dict[str, Any] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


def positions_dtype(numel: int) -> str:
    """Return the dtype in which positions in a tensor are written."""
    return "I64" if numel > 1 << 31 else "I32"


class Patch(NamedTuple):
    """A tuned tensor as its base and a list of what changed; None where nothing did."""

    base: Source
    indices: TensorSpec | None
    values: TensorSpec | None

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + sum(s.nbytes for s in (self.indices, self.values) if s)

    def overlay(self, block: int, values: Array) -> None:
        """Turn a block of the base into that of tuned; raise FormatError for a broken list."""
        if self.indices is None or self.values is None:
            return
        begin, end = self._bound(block), self._bound(block + 1)
        positions = np.empty(end - begin, POSITIONS[self.indices.dtype])
        if end - begin > values.size:
            raise self._broken(block)
        read_into(
            self.indices.path,
            self.indices.start + begin * positions.itemsize,
            positions.view(np.uint8).data,
        )
        at = positions.astype(np.int64) - block * BLOCK_NUMEL
        if at.size and (at[0] < 0 or at[-1] >= values.size or (at[1:] <= at[:-1]).any()):
            raise self._broken(block)
        listed = np.empty(end - begin, STORAGE_DTYPE[self.values.dtype])
        where = self.values.start + begin * listed.itemsize
        read_into(self.values.path, where, listed.view(np.uint8).data)
        values[at] = listed

    def _bound(self, block: int) -> int:
        """Return how many listed positions lie before a block: a search of a few reads."""
        assert self.indices is not None
        width, low, high = ITEMSIZE[self.indices.dtype], 0, self.indices.numel
        if block == 0:
            return 0
        if block == block_count(self.base.numel):
            return high
        record = bytearray(width)
        while low < high:
            middle = (low + high) // 2
            read_into(self.indices.path, self.indices.start + middle * width, memoryview(record))
            if int.from_bytes(record, "little", signed=True) < block * BLOCK_NUMEL:
                low = middle + 1
            else:
                high = middle
        return low

    def _broken(self, block: int) -> FormatError:
        assert self.indices is not None
        return FormatError(
            f"{self.indices.path}: {self.indices.name}: positions do not rise within the tensor's"
            f" {self.base.numel} values (block {block})"
        )


def open_patch(
    ref: str | os.PathLike[str], base: Checkpoint
) -> tuple[dict[str, Patch], Checkpoint, str]:
    """Return every tensor of `base` as a Patch, the patch's own tensors, and its file's digest.

    Raises IncompatibleError for lists that do not fit the base or say they are for another.
    """
    opened = open_tensors(ref, "patch")
    if not is_patch(opened):
        raise IncompatibleError(
            f"patch {opened.ref}: expected pairs of NAME{INDICES} and NAME{VALUES}"
        )
    problems, listed = defaultdict(list), set[str]()
    patches = {name: Patch(spec, None, None) for name, spec in base.items()}
    for full, indices in opened.items():
        name, _, kind = full.rpartition(".")
        if f".{kind}" != INDICES:
            continue
        values, spec = opened[name + VALUES], base.get(name)
        listed.add(name)
        if spec is None:
            problems["not in the base"].append(f"{name}: not in the base")
        elif indices.dtype not in POSITIONS or len(indices.shape) != 1:
            said = f"{full}: {indices.dtype} {list(indices.shape)}, expected I32 or I64"
            problems["of other positions"].append(said)
        elif values.dtype != spec.dtype or values.shape != indices.shape:
            problems["of other values"].append(
                f"{values.name}: {values.dtype} {list(values.shape)}, expected {spec.dtype}"
                f" {list(indices.shape)}"
            )
        else:
            assert isinstance(indices, TensorSpec) and isinstance(values, TensorSpec)
            patches[name] = Patch(spec, indices, values)
    other = False
    if kind_of_file(opened.metadata) == "patch":
        family = json.loads(opened.metadata[METADATA_KEY]).get("family")
        other = family != base.family_digest
    if problems or other:
        if "not in the base" in problems:
            problems |= only_here(base, listed, "the base")
        what = "was made for a model of another shape than" if other else "does not fit"
        names = f":\n{up_to_five_each(problems)}" if problems else ""
        raise IncompatibleError(f"patch {opened.ref} {what} {base.ref}{names}")
    path = os.fspath(opened.path)
    return patches, opened, digest_file_range(path, 0, os.path.getsize(path))


def is_patch(opened: Checkpoint) -> bool:
    """Return whether all tensors are pairs of positions and values; of none, if it says so."""
    names = set(opened)
    stems = {name.removesuffix(INDICES) for name in names if name.endswith(INDICES)}
    said = bool(names) or kind_of_file(opened.metadata) == "patch"
    return said and names == {stem + part for stem in stems for part in (INDICES, VALUES)}


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

    def finish(self, said: dict[str, Any]) -> Path:
        """Write the file: values before positions, wide before narrow; return its path."""
        parts = []
        ends = [0, 0]
        for owner, spec in enumerate(self._specs):
            count = int(self.counts[owner])
            for spill, (suffix, dtype) in enumerate(
                ((INDICES, positions_dtype(spec.numel)), (VALUES, spec.dtype))
            ):
                nbytes = count * ITEMSIZE[dtype]
                if count:
                    parts.append((spec.name + suffix, dtype, (count,), spill, ends[spill], nbytes))
                ends[spill] += nbytes
        parts.sort(key=lambda part: (-ITEMSIZE[part[1]], part[0]))
        metadata = {"format": "pt", METADATA_KEY: json.dumps(said | {"kind": "patch"})}
        file = OutputFile(os.fspath(self._folder / "patch"), 0)
        try:
            file.append(encode_header([part[:3] for part in parts], metadata))
            buffer = memoryview(allocate(8 << 20))
            for *_, spill, start, nbytes in parts:
                for at in range(0, nbytes, len(buffer)):
                    piece = buffer[: min(len(buffer), nbytes - at)]
                    self._spills[spill].read_into(start + at, piece)
                    file.append(piece)
            file.sync()
        finally:
            file.close()
        return Path(file.path)

    def close(self) -> None:
        for file in self._spills:
            file.close()
