"""Where output may go, in what form, and how it gets there: staged files, one rename."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skillvec import kernels
from skillvec.checkpoint import ADAPTER_CONFIG, VECTOR_INDEX, Checkpoint
from skillvec.codecs import DENSE_SHARE, encode_block
from skillvec.errors import UsageError
from skillvec.operators import bit_pattern, subtract
from skillvec.patch import Patch, PatchWriter
from skillvec.plan import Plan
from skillvec.sources import Source, value_range, values_of
from skillvec.storage import (
    ITEMSIZE,
    OutputFile,
    Staging,
    TensorSpec,
    available_memory_nbytes,
    forget_open_files,
    prefetch,
    staging,
)
from skillvec.vector import PairDelta, SkillVector
from skillvec.vectorfile import PARTS, Entry, StoredDelta, VectorFile, VectorWriter

PathLike = str | os.PathLike[str]
PROBE_NUMEL = 4096
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip


def _place(output: PathLike, force: bool, inputs: Sequence[Checkpoint | VectorFile]) -> Path:
    """Return the output's path, links above it resolved, or refuse the place."""
    path = Path(os.path.abspath(os.path.expanduser(output)))
    path = path.parent.resolve() / path.name
    for checkpoint in inputs:
        at, end = checkpoint.path, path.resolve()
        if at in (path, end) or (at.is_dir() and at in (*path.parents, *end.parents)):
            raise UsageError(
                f"output {path}: inside the input {checkpoint.ref}; write it elsewhere"
            )
        if any(path == file or path in file.parents for file in (at, *checkpoint.real_files)):
            raise UsageError(f"output {path}: holds the input {checkpoint.ref}; write it elsewhere")
    if not path.parent.is_dir():
        raise UsageError(f"output {path}: the folder {path.parent} does not exist")
    if path.is_symlink():
        raise UsageError(f"output {path}: is a link; name what it points to")
    if path.exists() and not force:
        raise UsageError(f"output {path}: exists already; --force overwrites it")
    return path


def output_vector(
    output: PathLike, force: bool, vector: SkillVector, inputs: Sequence[Checkpoint] = ()
) -> Path:
    path = _place(output, force, [*vector.inputs(), *inputs])
    if path.suffix != ".safetensors":
        raise UsageError(f"output {path}: the name of a safetensors file ends in .safetensors")
    if path.name == "model.safetensors":
        raise UsageError(
            f"output {path}: a vector must not be called model.safetensors, or from_pretrained"
            " would load differences as weights"
        )
    if path.is_dir() and not (path / VECTOR_INDEX).is_file():
        raise UsageError(f"output {path}: a folder that holds no vector, so it is not replaced")
    return path


def output_model(
    output: PathLike,
    force: bool,
    target: Checkpoint,
    inputs: Sequence[Checkpoint | VectorFile],
) -> Path:
    path = _place(output, force, inputs)
    if not target.is_folder:
        if path.suffix != ".safetensors" or path.is_dir():
            raise UsageError(
                f"output {path}: the target is one file, so the output is one .safetensors file"
            )
    elif path.exists() and (
        not path.is_dir() or (any(path.iterdir()) and not any(path.glob("*.safetensors")))
    ):
        raise UsageError(f"output {path}: holds no model, so --force does not replace it")
    return path


def output_adapter(
    output: PathLike, force: bool, inputs: Sequence[Checkpoint | VectorFile]
) -> Path:
    path = _place(output, force, inputs)
    if path.exists() and not (path / ADAPTER_CONFIG).is_file():
        raise UsageError(f"output {path}: holds no adapter, so --force does not replace it")
    return path


def output_report(output: PathLike, force: bool, inputs: Sequence[Checkpoint | VectorFile]) -> Path:
    path = _place(output, force, inputs)
    if path.exists() and not (path / "report.json").is_file():
        raise UsageError(f"output {path}: holds no report, so --force does not replace it")
    return path


@contextlib.contextmanager
def writing(plan: Plan, path: Path, force: bool) -> Iterator[tuple[Staging, list[OutputFile]]]:
    """Yield the staging folder and the plan's files, allocated in full; close what is left open."""
    # the kernel throttles a writer that has dirtied a fifth of the memory (vm.dirty_ratio)
    windowed = plan.nbytes_written * 6 > available_memory_nbytes()
    with staging(path, force) as stage, contextlib.ExitStack() as stack:
        made = stage.folder / "made"
        made.mkdir()
        files = []
        for output in plan.outputs:
            files.append(OutputFile(os.fspath(made / output.name), output.nbytes, windowed))
            stack.callback(files[-1].close)
        stack.callback(forget_open_files)
        yield stage, files


@contextlib.contextmanager
def writing_vector(
    path: Path,
    force: bool,
    entries: Sequence[Entry],
    manifest: dict[str, Any],
    max_shard_nbytes: int,
) -> Iterator[tuple[Staging, VectorWriter]]:
    """Yield the staging folder and a writer of vector blocks; close what is left open."""
    windowed = sum(entry.nbytes for entry in entries) * 6 > available_memory_nbytes()
    with staging(path, force) as stage, contextlib.ExitStack() as stack:
        stack.callback(forget_open_files)
        writer = VectorWriter(stage.folder, entries, manifest, max_shard_nbytes, windowed)
        stack.callback(writer.close)
        yield stage, writer


@contextlib.contextmanager
def writing_patch(
    path: Path, force: bool, specs: Sequence[Source]
) -> Iterator[tuple[Staging, PatchWriter]]:
    """Yield the staging folder and a writer of lists; close what is left open."""
    with staging(path, force) as stage, contextlib.ExitStack() as stack:
        stack.callback(forget_open_files)
        writer = PatchWriter(stage.folder, specs)
        stack.callback(writer.close)
        yield stage, writer


# ---------------------------------------------------------------------------------------- form


def parse_size(text: int | str) -> int:
    """Return bytes from a number or a text such as 5GB (decimal units) or 5GiB."""
    words = str(text).strip()
    number = words.rstrip("BKMGTibkmgtI")
    unit = words[len(number) :].upper()
    try:
        size = int(float(number) * SIZES["" if unit == "B" else unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"max_shard_size {text}: expected a size such as 5GB")
    return size


def choose_storage(vector: SkillVector, dtype: str, codec: str) -> dict[str, tuple[str, str]]:
    """Choose dtype and codec of every delta of a vector that is to be written.

    A pair of checkpoints is probed: a 16-bit dtype where an exception a value would take more room
    (8 bytes; fp32 takes 2 more a value, so the turn is at one in four) gives way to fp32.
    """
    chosen = {}
    names = set(vector.deltas)
    pairs = [delta for delta in vector.deltas.values() if isinstance(delta, PairDelta)]
    sides = [side for pair in pairs for side in (pair.tuned, pair.base)]
    prefetch([value_range(s, *_middle(s)) for s in sides if isinstance(s, TensorSpec)])
    for name, delta in vector.deltas.items():
        kept, dense = dtype if dtype != "auto" else delta.spec.dtype, codec == "dense"
        if isinstance(delta, PairDelta) and not isinstance(delta.tuned, Patch):
            kept, sample = _probed(delta, delta.tuned)
            nonzero = int((sample != 0).sum())
            if codec == "sparse":
                dense = nonzero > DENSE_SHARE * sample.size
            elif codec == "auto" and nonzero:
                dense = encode_block(sample, "packed").payload.size >= 0.98 * sample.nbytes
        elif isinstance(delta, StoredDelta):
            kept = delta.spec.dtype
            if codec == "sparse" and delta.codec != "zero":
                changed = vector.manifest["tensors"][name]["changed"]
                dense |= changed > DENSE_SHARE * delta.spec.numel
        taken = any(name + part in names for parts in PARTS.values() for part in parts if part)
        plain = dense or taken  # a tensor of the model has the name of a part
        chosen[name] = kept, "dense" if plain else {"auto": "packed"}.get(codec, codec)
    return chosen


def _middle(side: Source) -> tuple[int, int]:
    """Return begin and count of the values of a tensor that are probed."""
    numel = min(PROBE_NUMEL, side.numel)
    return (side.numel - numel) // 2, numel


def _probed(delta: PairDelta, tuned: Source) -> tuple[str, Any]:
    """Return the dtype to store a pair's difference in, and the 4,096 values in its middle."""
    numel = min(PROBE_NUMEL, delta.base.numel)
    if not numel:
        return delta.dtype, kernels.from_bytes(bytearray(), "U16")
    sides = [values_of(side, *_middle(side)) for side in (tuned, delta.base)]
    scratch = kernels.from_bytes(bytearray(2 * numel), "U16")
    dtype = delta.dtype
    while True:
        out = kernels.from_bytes(bytearray(numel * ITEMSIZE[dtype]), dtype)
        found = subtract(sides[0], tuned.dtype, sides[1], delta.base.dtype, dtype,
                         delta.exact, out, scratch)  # fmt: skip
        if found.delta.positions.size * 4 <= numel or ITEMSIZE[dtype] > 2:
            return dtype, bit_pattern(out)
        dtype = "F32"
