"""Where output may go, and how it gets there: refused places, staged files, one rename."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skillvec.checkpoint import VECTOR_INDEX, Checkpoint
from skillvec.errors import UsageError
from skillvec.patch import PatchWriter
from skillvec.plan import Plan
from skillvec.storage import (
    OutputFile,
    Staging,
    TensorSpec,
    available_memory_nbytes,
    forget_open_files,
    staging,
)
from skillvec.vector import SkillVector
from skillvec.vectorfile import Entry, VectorFile, VectorWriter

PathLike = str | os.PathLike[str]


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
    if not target.path.is_dir():
        if path.suffix != ".safetensors" or path.is_dir():
            raise UsageError(
                f"output {path}: the target is one file, so the output is one .safetensors file"
            )
    elif path.exists() and (
        not path.is_dir() or (any(path.iterdir()) and not any(path.glob("*.safetensors")))
    ):
        raise UsageError(f"output {path}: holds no model, so --force does not replace it")
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
    path: Path, force: bool, specs: Sequence[TensorSpec]
) -> Iterator[tuple[Staging, PatchWriter]]:
    """Yield the staging folder and a writer of lists; close what is left open."""
    with staging(path, force) as stage, contextlib.ExitStack() as stack:
        stack.callback(forget_open_files)
        writer = PatchWriter(stage.folder, specs)
        stack.callback(writer.close)
        yield stage, writer
