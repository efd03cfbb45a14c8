"""Displacements: the skill vector as a file with a manifest, or as a pair of checkpoints.

Hides where a delta comes from: stored values with exceptions, or tuned and base subtracted as they
are read. Vectors can be scaled; what has no meaning (a vector plus a model) is a TypeError that
says so. The file format is docs/format.md.
"""

import fnmatch
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    is_vector,
    open_checkpoint,
    open_tensors,
)
from skillvec.errors import FormatError, IncompatibleError, UsageError, up_to_five
from skillvec.kernels import FLOATS
from skillvec.storage import (
    LEAF_NBYTES,
    OutputFile,
    TensorSpec,
    allocate,
    digest_bytes,
    digest_file_range,
    fold_digest,
    leaf_digests,
    read_into,
)

SCHEMA = 1
BLOCK_NUMEL = 1 << 20  # elements a block: the unit of work, of exceptions and of random numbers
BLOCKS, EXCEPTIONS, REPLACEMENTS = (
    "skillvec.blocks",
    "skillvec.exceptions",
    "skillvec.replacements",
)
SIDE = (BLOCKS, EXCEPTIONS, REPLACEMENTS)
EXCEPTION = np.dtype([("position", "<u4"), ("value", "<f4")])
REPLACEMENT = np.dtype([("position", "<u4"), ("bits", "<u8")])
PROBE_TENSORS, PROBE_NBYTES = 256, 4096
FP32_MAX = 3.4028234e38


def block_count(numel: int) -> int:
    """Return how many blocks of 2^20 elements a tensor has."""
    return -(-numel // BLOCK_NUMEL)


class StoredDelta(NamedTuple):
    """A tensor of a vector file; `first_block` is its first row in skillvec.blocks."""

    spec: TensorSpec
    first_block: int

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


class PairDelta(NamedTuple):
    """A tensor's delta as two tensors to subtract into values of `dtype`.

    `exact` asks for exceptions and replacements; without, values are just rounded to `dtype`.
    """

    tuned: TensorSpec
    base: TensorSpec
    dtype: str
    exact: bool = True

    @property
    def spec(self) -> TensorSpec:
        return self.base

    @property
    def nbytes(self) -> int:
        return self.tuned.nbytes + self.base.nbytes


DeltaSource = StoredDelta | PairDelta


def value_dtype(tuned: str, base: str, dtype: str = "auto") -> tuple[str, bool]:
    """Return the storage dtype of a delta and whether it is kept exact.

    `auto` stores BF16 - BF16 as BF16 and F16 - F16 as F16 (exceptions in fp32), any F64 as F64,
    every other pair as F32.
    """
    if dtype == "auto":
        if "F64" in (tuned, base):
            return "F64", True
        return (tuned if tuned == base and tuned in ("BF16", "F16") else "F32"), True
    return dtype, dtype == "F32" and "F64" not in (tuned, base)


@dataclass(frozen=True)
class SkillVector:
    """A displacement tuned - base, times `scale`.

    `deltas` maps tensor names to where the delta comes from. `equal` are integer and bool tensors
    that are the same on both sides, `differing` those that are not and are not transferred,
    `tied` maps a tensor stored on one side only to the one it is a copy of.
    """

    ref: str
    deltas: Mapping[str, DeltaSource]
    manifest: dict[str, Any]
    scale: float = 1.0
    stored: Checkpoint | None = None
    tuned: Checkpoint | None = None
    base: Checkpoint | None = None
    report: Any = field(default=None, compare=False)  # of the diff that wrote it

    @staticmethod
    def open(ref: "str | os.PathLike[str] | SkillVector", role: str = "vector") -> "SkillVector":
        """Open a vector file, headers only. Raises IncompatibleError for a model."""
        if isinstance(ref, SkillVector):
            return ref
        stored = open_tensors(ref, role)
        if not is_vector(stored.metadata):
            raise IncompatibleError(
                f"{role} {stored.ref}: this is not a skill vector (no manifest in its header);"
                " skillvec diff makes one from two models"
            )
        manifest = json.loads(stored.metadata[METADATA_KEY])
        return SkillVector(stored.ref, _stored_deltas(stored, manifest), manifest, stored=stored)

    @staticmethod
    def between(
        tuned: str | os.PathLike[str] | Checkpoint,
        base: str | os.PathLike[str] | Checkpoint,
        dtype: str = "auto",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> "SkillVector":
        """Return tuned - base without computing it: every name and shape is checked here.

        Raises IncompatibleError naming tensors that stand on one side only or differ in shape.
        """
        tuned, base = open_checkpoint(tuned, "tuned"), open_checkpoint(base, "base")
        matched = _match(tuned, base, include, exclude)
        deltas = {
            name: PairDelta(
                tuned[name], base[name], *value_dtype(tuned[name].dtype, base[name].dtype, dtype)
            )
            for name in matched["deltas"]
        }
        manifest = {
            "kind": "vector",
            "schema": SCHEMA,
            "formula": "tuned - base",
            "base": identity(base),
            "tuned": identity(tuned),
            "equal": {name: [tuned[name].dtype, None] for name in matched["integers"]},
            "tied": matched["tied"],
            "excluded": matched["excluded"],
        }
        ref = f"{tuned.ref}::{base.ref}"
        return SkillVector(ref, deltas, manifest, tuned=tuned, base=base)

    def __mul__(self, factor: object) -> "SkillVector":
        if not isinstance(factor, Real) or not isfinite(factor):
            raise TypeError(
                f"vector * {type(factor).__name__}: a skill vector can be multiplied by a finite"
                " number only"
            )
        scale = self.scale * float(factor)
        if not isfinite(scale):
            raise UsageError(f"{self.scale:g} * {factor:g} * vector: the factor overflows")
        return replace(self, scale=scale)

    __rmul__ = __mul__

    def __neg__(self) -> "SkillVector":
        return self * -1.0

    def __add__(self, other: object) -> Any:
        raise TypeError(
            f"vector + {type(other).__name__}: to add a vector to a model use"
            " skillvec.apply(model, vector, output)"
        )

    __radd__ = __add__

    @property
    def dtypes(self) -> str:
        """Dtype lineage in a word or two: of tuned and base, as BF16 - F32."""
        sides = ("+".join(self.manifest[side]["dtypes"]) for side in ("tuned", "base"))
        return " - ".join(sides)

    def base_digest(self, name: str) -> str | None:
        """Return the digest of the base's tensor that the delta was taken from, if recorded."""
        entry = self.manifest.get("tensors", {}).get(name)
        return entry["base"][1] if entry else None

    def tuned_dtype(self, name: str) -> str:
        delta = self.deltas[name]
        if isinstance(delta, PairDelta):
            return delta.tuned.dtype
        return str(self.manifest["tensors"][name]["tuned"][0])


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a manifest records of a checkpoint, short of its tensors."""
    return {
        "ref": checkpoint.ref,
        "model_type": checkpoint.model_type,
        "config": checkpoint.config_digest,
        "tokenizer": checkpoint.tokenizer_digest,
        "family": checkpoint.family_digest,
        "probe": probe_digest(checkpoint),
        "dtypes": checkpoint.dtypes,
    }


def probe_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of 4 KiB from the middle of up to 256 tensors.

    Tells two checkpoints apart in milliseconds; full digests, taken while tensors are read anyway,
    have the last word.
    """
    names = sorted(checkpoint)
    step = max(1, len(names) // PROBE_TENSORS)
    buffer = memoryview(allocate(PROBE_NBYTES))
    leaves = bytearray()
    for name in names[::step][:PROBE_TENSORS]:
        spec = checkpoint[name]
        nbytes = min(PROBE_NBYTES, spec.nbytes)
        read_into(spec.path, spec.start + (spec.nbytes - nbytes) // 2, buffer[:nbytes])
        leaves += leaf_digests(buffer[:nbytes])
    shapes = sorted((name, spec.dtype, list(spec.shape)) for name, spec in checkpoint.items())
    return digest_bytes(json.dumps(shapes).encode() + leaves)


# ----------------------------------------------------------------------------------- matching


def is_selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether globs keep a name: it matches an include (if any) and no exclude."""
    if include and not any(fnmatch.fnmatchcase(name, glob) for glob in include):
        return False
    return not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)


def refuse_idle_globs(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise IncompatibleError for a glob that matches no tensor: a typing error, not a wish."""
    idle = [g for g in (*include, *exclude) if not fnmatch.filter(names, g)]
    if idle:
        raise IncompatibleError(f"globs that match no tensor:\n{up_to_five(idle)}")


def find_tied(checkpoint: Checkpoint, name: str) -> str | None:
    """Return another tensor that holds the same bytes: evidence that `name` is a tied copy."""
    spec = checkpoint[name]
    if len(spec.shape) < 2 or not spec.nbytes:
        return None
    digest = None
    for other in checkpoint.values():
        if other.name != name and (other.dtype, other.shape) == (spec.dtype, spec.shape):
            first = min(spec.nbytes, PROBE_NBYTES)
            if digest_file_range(spec.path, spec.start, first) != digest_file_range(
                other.path, other.start, first
            ):
                continue
            digest = digest or digest_file_range(spec.path, spec.start, spec.nbytes)
            if digest_file_range(other.path, other.start, other.nbytes) == digest:
                return other.name
    return None


def _match(
    tuned: Checkpoint, base: Checkpoint, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Any]:
    """Sort the names of two checkpoints into deltas, integers, tied and excluded, or refuse."""
    names = list(dict.fromkeys((*base, *tuned)))
    refuse_idle_globs(names, include, exclude)
    excluded = [name for name in names if not is_selected(name, include, exclude)]
    found: dict[str, Any] = {"deltas": [], "integers": [], "tied": {}, "excluded": excluded}
    problems = []
    for name in names:
        if not is_selected(name, include, exclude):
            continue
        if name in SIDE:
            problems.append(f"{name}: this name is reserved for the vector file")
        elif name not in tuned or name not in base:
            here, there = (tuned, base) if name in tuned else (base, tuned)
            twin = find_tied(here, name) if there.ties_embeddings is not False else None
            if twin and twin in there and is_selected(twin, include, exclude):
                found["tied"][name] = twin
            else:
                hint = ""
                if here.ties_embeddings and name.endswith("lm_head.weight"):
                    hint = " (tied by its config, but its bytes are those of no other tensor)"
                problems.append(f"{name} {list(here[name].shape)}: only in {here.ref}{hint}")
        elif tuned[name].shape != base[name].shape:
            shapes = f"{list(tuned[name].shape)}, base {list(base[name].shape)}"
            problems.append(f"{name}: tuned {shapes}")
        else:
            dtypes = tuned[name].dtype, base[name].dtype
            if dtypes[0] in FLOATS and dtypes[1] in FLOATS:
                found["deltas"].append(name)
            elif dtypes[0] == dtypes[1]:
                found["integers"].append(name)
            else:
                problems.append(f"{name}: tuned is {dtypes[0]}, base is {dtypes[1]}")
    if problems:
        raise IncompatibleError(
            f"{tuned.ref} and {base.ref} do not match (--exclude GLOB leaves tensors out):\n"
            + up_to_five(problems)
        )
    if not found["deltas"]:
        raise IncompatibleError(f"{tuned.ref} and {base.ref}: no tensor is left to subtract")
    return found


# ---------------------------------------------------------------------------------- the file


OPTIONAL = str | None
TENSOR_SIDE = {0: str, 1: str}
IDENTITY = {
    "ref": str, "model_type": OPTIONAL, "config": OPTIONAL, "tokenizer": OPTIONAL, "family": str,
    "probe": str, "dtypes": {...: int},
}  # fmt: skip
MANIFEST = {
    "kind": str, "tool": str, "command": str, "formula": str, "dtype": str,
    "exactness": {"claim": str, "exceptions": int, "replacements": int, "unrestored": int},
    "base": IDENTITY, "tuned": IDENTITY,
    "tensors": {
        ...: {"base": TENSOR_SIDE, "tuned": TENSOR_SIDE, "digest": str, "changed": int,
              "norm": int | float},
    },
    "equal": {...: TENSOR_SIDE}, "differing": {0: ...}, "tied": {...: str}, "excluded": {0: ...},
    "side": {...: str},
}  # fmt: skip


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raise TypeError where `value` is not of `shape`: a type, or a dict of shapes by key.

    The key ... stands for every key, {0: ...} for a list of strings, {0: x, 1: y} for a pair.
    """
    if not isinstance(shape, dict):
        if not isinstance(value, shape) or isinstance(value, bool):
            raise TypeError(f"{where}: expected {shape}, found {str(value)[:40]!r}")
    elif shape == {0: ...} or 0 in shape:
        if not isinstance(value, list) or (shape != {0: ...} and len(value) != len(shape)):
            raise TypeError(f"{where}: expected a list, found {str(value)[:40]!r}")
        for i, item in enumerate(value):
            check_shape(item, str if shape == {0: ...} else shape[i], f"{where}[{i}]")
    elif not isinstance(value, dict):
        raise TypeError(f"{where}: expected an object, found {str(value)[:40]!r}")
    else:
        for key in value if ... in shape else shape:
            if key not in value:
                raise TypeError(f"{where}: {key} is missing")
            check_shape(value[key], shape[... if ... in shape else key], f"{where}.{key}")


def _stored_deltas(stored: Checkpoint, manifest: dict[str, Any]) -> dict[str, DeltaSource]:
    """Check a manifest against the tensors of its file and number the blocks."""
    where = f"vector {stored.ref}"
    if manifest.get("schema") != SCHEMA or manifest.get("block_numel") != BLOCK_NUMEL:
        raise FormatError(
            f"{where}: manifest schema {manifest.get('schema')!r} with blocks of"
            f" {manifest.get('block_numel')!r}; this version reads schema {SCHEMA}, blocks of"
            f" {BLOCK_NUMEL}: a newer skillvec is needed"
        )
    try:
        check_shape(manifest, MANIFEST, "manifest")
    except TypeError as error:
        raise FormatError(f"{where}: broken {error}") from None
    entries = manifest["tensors"]
    names = [name for name in stored if name not in SIDE]
    if set(entries) != set(names):
        raise FormatError(f"{where}: the manifest does not list the tensors of the file")
    for name in names:
        dtypes = stored[name].dtype, entries[name]["base"][0], entries[name]["tuned"][0]
        if not set(dtypes) <= set(FLOATS):
            raise FormatError(
                f"{where}: broken manifest: {name}: {', '.join(dtypes)}: expected floats"
            )
    deltas: dict[str, DeltaSource] = {}
    row = 0
    for name in names:
        deltas[name] = StoredDelta(stored[name], row)
        row += block_count(stored[name].numel)
    blocks = stored.get(BLOCKS)
    if blocks is None or (blocks.dtype, blocks.shape) != ("U8", (row, 8)):
        raise FormatError(f"{where}: {BLOCKS} is not U8 [{row}, 8]")
    return deltas


class SideTable:
    """Exceptions and replacements of a vector file by block row, checked as they are read."""

    def __init__(self, stored: Checkpoint, manifest: dict[str, Any]) -> None:
        self._stored = stored
        for name in SIDE:
            if name in stored:
                spec = stored[name]
                if digest_file_range(spec.path, spec.start, spec.nbytes) != manifest["side"].get(
                    name
                ):
                    raise FormatError(
                        f"vector {stored.ref}: {name} differs from its digest in the manifest:"
                        " the file was altered"
                    )
        counts = self._read(BLOCKS, 0, stored[BLOCKS].shape[0], np.dtype(("<u4", 2)))
        self._ends = np.zeros((len(counts) + 1, 2), np.int64)
        np.cumsum(counts, axis=0, out=self._ends[1:])
        for column, (name, record) in enumerate(
            ((EXCEPTIONS, EXCEPTION), (REPLACEMENTS, REPLACEMENT))
        ):
            total = int(self._ends[-1, column])
            shape = (total, record.itemsize)
            if (total or name in stored) and (
                name not in stored or (stored[name].dtype, stored[name].shape) != ("U8", shape)
            ):
                raise FormatError(f"vector {stored.ref}: {name} is not U8 {list(shape)}")

    def _read(self, name: str, first: int, last: int, record: np.dtype[Any]) -> npt.NDArray[Any]:
        content = bytearray((last - first) * record.itemsize)
        spec = self._stored[name]
        read_into(spec.path, spec.start + first * record.itemsize, memoryview(content))
        return np.frombuffer(content, record)

    def exceptions(self, row: int, numel: int) -> npt.NDArray[Any]:
        """Return the records (position, value) of a block of `numel` elements."""
        return self._records(EXCEPTIONS, 0, row, numel, EXCEPTION)

    def replacements(self, row: int, numel: int) -> npt.NDArray[Any]:
        """Return the records (position, bits) of a block of `numel` elements."""
        return self._records(REPLACEMENTS, 1, row, numel, REPLACEMENT)

    def _records(
        self, name: str, column: int, row: int, numel: int, record: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        first, last = self._ends[row : row + 2, column].tolist()
        if first == last:
            return np.zeros(0, record)
        records = self._read(name, first, last, record)
        at = records["position"]
        if at[-1] >= numel or (at.size > 1 and not (at[1:] > at[:-1]).all()):
            raise FormatError(
                f"vector {self._stored.ref}: {name}, block {row}: positions do not rise within the"
                f" block of {numel}"
            )
        return records


class SideWriter:
    """Collects exceptions and replacements of blocks in any order, writes them in block order.

    Records wait in two files in the staging folder, so memory holds 24 bytes a block at most.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._files = [OutputFile(os.fspath(folder / f"side-{i}"), 0) for i in range(2)]
        self._starts = np.zeros((rows, 2), np.int64)
        self._counts = np.zeros((rows, 2), np.uint32)
        self._lock = threading.Lock()

    def add(self, row: int, exceptions: npt.NDArray[Any], replacements: npt.NDArray[Any]) -> None:
        """Take the records of one block."""
        for column, records in enumerate((exceptions, replacements)):
            if records.size:
                with self._lock:
                    self._starts[row, column] = self._files[column].append(records.tobytes())
                self._counts[row, column] = records.size

    @property
    def totals(self) -> tuple[int, int]:
        """Number of exceptions and of replacements taken so far."""
        exceptions, replacements = self._counts.sum(axis=0, dtype=np.int64)
        return int(exceptions), int(replacements)

    def write(self, output: OutputFile, blocks_offset: int) -> dict[str, str]:
        """Write the block table at `blocks_offset`, append the records, return the digests."""
        table = self._counts.astype("<u4").tobytes()
        output.write(blocks_offset, table)
        digests = {BLOCKS: digest_bytes(table)}
        for column, (name, record) in enumerate(
            ((EXCEPTIONS, EXCEPTION), (REPLACEMENTS, REPLACEMENT))
        ):
            if not self.totals[column]:
                continue
            leaves, pending = bytearray(), bytearray()
            for row in np.flatnonzero(self._counts[:, column]):
                content = bytearray(int(self._counts[row, column]) * record.itemsize)
                self._files[column].read_into(int(self._starts[row, column]), memoryview(content))
                pending += content
                whole = len(pending) // LEAF_NBYTES * LEAF_NBYTES
                if whole:
                    piece = bytes(pending[:whole])
                    output.append(piece)
                    leaves += leaf_digests(memoryview(piece))
                    del pending[:whole]
            output.append(bytes(pending))
            leaves += leaf_digests(memoryview(bytes(pending)))
            digests[name] = fold_digest(leaves)
        return digests

    def close(self) -> None:
        for file in self._files:
            file.close()
