"""Writing a patch: lists of changed values in the forms that RL stacks send."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skillvec.checkpoints.checkpoint import METADATA_KEY
from skillvec.checkpoints.patch import (
    ALL_INDICES,
    ALL_VALUES,
    INDICES,
    SPEC,
    TORCH,
    UPDATE,
    VALUES,
    FlushEntry,
    Update,
    checksum,
)
from skillvec.checkpoints.patch_lists import Listed, pieces, positions_dtype
from skillvec.errors import NonfiniteError, up_to_five
from skillvec.files.header import ITEMSIZE, TensorSpec, encode_header
from skillvec.files.official_reader import refuse_misread
from skillvec.files.output_file import OutputFile
from skillvec.files.rows import RowWriter
from skillvec.files.tensors import Source, Widened
from skillvec.files.views import Index
from skillvec.ops.block import block_count
from skillvec.ops.kernels import widen

# name, dtype and shape, what it is read from
ENTRY = 64 << 20  # values of one entry of a flush, as verl cuts them
ListedTensor = tuple[str, str, Index, Sequence[Source]]


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

    def _flush(self, lists: Sequence[tuple[Source, Listed]]) -> list[ListedTensor]:
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
        blobs: list[ListedTensor] = [(ALL_INDICES, "U8", (4 * at,), indices),
                                 (ALL_VALUES, dtype, (at,), values)]  # fmt: skip
        return [*sorted(blobs, key=lambda part: -max(ITEMSIZE[part[1]], 4 * (part[1] == "U8"))),
                (SPEC, "U8", spec.shape, [spec])]  # fmt: skip

    def close(self) -> None:
        for file in self._spills:
            file.close()


def _as_they_are(lists: Sequence[tuple[Source, Listed]]) -> list[ListedTensor]:
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
