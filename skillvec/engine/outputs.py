"""Where output may go, in what form, and how it gets there: staged files, one rename."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from skillvec import __version__
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.folder import VECTOR_INDEX
from skillvec.checkpoints.side_files import ADAPTER_CONFIG
from skillvec.engine.jobs.list import ListJob
from skillvec.engine.plan import Plan
from skillvec.engine.run import Run
from skillvec.errors import OutputError, UsageError
from skillvec.files.file import forget_open_files, prefetch
from skillvec.files.fingerprints import fingerprints
from skillvec.files.header import ITEMSIZE, TensorSpec
from skillvec.files.journal import KEPT
from skillvec.files.output_file import OutputFile, available_memory_nbytes
from skillvec.files.staging import Staging, staging, staging_of
from skillvec.files.tensors import Source, value_range, values_of
from skillvec.ops import kernels
from skillvec.ops.arithmetic import subtract
from skillvec.ops.block import block_count
from skillvec.ops.codecs import DENSE_SHARE, is_packed_within
from skillvec.ops.special import bit_pattern
from skillvec.remote.references import is_url
from skillvec.report import Watcher
from skillvec.vectors.deltas.base import Subtracted
from skillvec.vectors.manifest import Manifest
from skillvec.vectors.reader import PARTS, VectorFile
from skillvec.vectors.vector import SkillVector
from skillvec.vectors.writer import Entry, VectorWriter

if TYPE_CHECKING:
    from skillvec.checkpoints.patch_writer import PatchWriter

PathLike = str | os.PathLike[str]
PROBE_NUMEL = 4096
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip


class Output(NamedTuple):
    """Where output goes: a path of this disk, or a URL, and then where it is made before.

    `names` are those of the files that lie there now: "" alone for one file, None for nothing.
    """

    ref: str
    path: Path
    is_url: bool
    names: frozenset[str] | None

    @property
    def is_folder(self) -> bool:
        return self.names is not None and "" not in self.names

    @property
    def disk(self) -> Path:
        """The nearest folder above the output that is there: on its disk it is made."""
        return next(folder for folder in self.path.parents if folder.is_dir())

    @property
    def staging(self) -> Path:
        return staging_of(self.path)

    def refuse_closed(self) -> None:
        """Raise OutputError where nothing can be made, UsageError for too long a name."""
        disk, name = self.disk, self.staging.name
        if not os.access(disk, os.W_OK | os.X_OK, effective_ids=True):
            read_only = os.statvfs(disk).f_flag & os.ST_RDONLY
            why = os.strerror(errno.EROFS if read_only else errno.EACCES)
            raise OutputError(f"output {self.ref}: nothing can be written to {disk}: {why}")
        longest = os.pathconf(disk, "PC_NAME_MAX")
        if len(os.fsencode(name)) > longest:
            raise UsageError(
                f"output {self.ref}: its name is too long: it is made as {name:.40}..., and names"
                f" have at most {longest} bytes there"
            )

    def refuse_full(self, least_nbytes: int) -> None:
        """Raise OutputError where so many bytes do not fit beside what lies there.

        What an interrupted run has left is written over, so its room counts as free. An old output
        goes when the new one is whole.
        """
        free = free_nbytes(self.disk)
        if free is None or least_nbytes <= free + _taken_nbytes(self.staging):
            return
        raise OutputError(
            f"output {self.ref}: does not fit: {least_nbytes:,} bytes are needed, {free:,} are free"
            f" on the disk of {self.disk}: make room there, or write elsewhere"
            + (" (what is replaced goes last)" if self.names is not None else "")
        )

    def delivery(self, force: bool, watcher: Watcher | None) -> Callable[[Path], None] | None:
        """Return what brings a file or folder to the URL; None for a path."""
        if not self.is_url:
            return None
        from skillvec.remote import object_store

        object_store.make_folder(self.path.parent)

        def deliver(source: Path) -> None:
            if not force and object_store.names(self.ref) is not None:
                raise OutputError(f"{self.ref}: exists now: another run made it meanwhile")
            files = [file for file in (source, *source.rglob("*")) if file.is_file()]
            total = sum(file.stat().st_size for file in files)

            def told(nbytes: int) -> None:
                if watcher:
                    watcher.advanced(nbytes, total)

            object_store.upload(source, self.ref, told)

        return deliver


def free_nbytes(folder: Path) -> int | None:
    """Return the bytes that anyone may still write to the disk of a folder; None if it says none.

    So it is where a file system does not know its own size.
    """
    free = shutil.disk_usage(folder).free
    return free if free or os.statvfs(folder).f_blocks else None


def _taken_nbytes(folder: Path) -> int:
    """Return the room that a run has taken in its folder, without the output that it replaced."""
    taken = 0
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(at, name) != folder / KEPT]
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # that run goes on
                taken += 512 * os.lstat(os.path.join(at, name)).st_blocks
    return taken


def _place(output: PathLike, force: bool, inputs: Sequence[Checkpoint | VectorFile]) -> Output:
    """Return where output goes, links above it resolved, or refuse the place."""
    ref = os.fspath(output)
    if not ref.strip():  # as a path it would be the folder of the caller
        raise UsageError(f"output {ref!r}: an empty name, expected a path")
    if is_url(ref):
        from skillvec.remote import object_store

        url = ref.rstrip("/")
        for at in (f"{other.ref.rstrip('/')}/" for other in inputs):
            if at.startswith(f"{url}/") or f"{url}/".startswith(at):
                raise UsageError(f"output {url}: in or around the input {at}: write it elsewhere")
        folder = object_store.cache_folder("outputs", url)
        place = Output(url, folder / url.rpartition("/")[2], True, object_store.names(url))
    else:
        place = _local_place(ref, inputs)
    if place.names is not None and not force:
        raise UsageError(f"output {place.ref}: exists already; --force overwrites it")
    place.refuse_closed()
    return place


def _local_place(output: str, inputs: Sequence[Checkpoint | VectorFile]) -> Output:
    path = Path(os.path.abspath(os.path.expanduser(output)))
    try:
        path = path.parent.resolve() / path.name
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UsageError(f"output {path}: {error}") from None
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
    names = None
    if path.exists():
        names = frozenset(os.listdir(path)) if path.is_dir() else frozenset([""])
    return Output(os.fspath(path), path, False, names)


def output_vector(
    output: PathLike, force: bool, vector: SkillVector, inputs: Sequence[Checkpoint] = ()
) -> Output:
    place = _place(output, force, [*vector.inputs(), *inputs])
    if place.path.suffix != ".safetensors":
        raise UsageError(f"output {place.ref}: the name of a safetensors file ends in .safetensors")
    if place.path.name == "model.safetensors":
        raise UsageError(
            f"output {place.ref}: a vector must not be called model.safetensors, or"
            " from_pretrained would load differences as weights"
        )
    if place.is_folder and VECTOR_INDEX not in (place.names or ()):
        raise UsageError(f"output {place.ref}: a folder that holds no vector: it is not replaced")
    return place


def output_model(
    output: PathLike,
    force: bool,
    target: Checkpoint,
    inputs: Sequence[Checkpoint | VectorFile],
) -> Output:
    place = _place(output, force, inputs)
    held = place.names or frozenset()
    if not target.is_folder:
        if place.path.suffix != ".safetensors" or place.is_folder:
            raise UsageError(
                f"output {place.ref}: the target is one file, so the output is one .safetensors"
                " file"
            )
    elif held and not any(name.endswith(".safetensors") for name in held):
        raise UsageError(f"output {place.ref}: holds no model, so --force does not replace it")
    return place


def output_adapter(
    output: PathLike, force: bool, inputs: Sequence[Checkpoint | VectorFile]
) -> Output:
    return _output_with(ADAPTER_CONFIG, "adapter", output, force, inputs)


def output_report(
    output: PathLike, force: bool, inputs: Sequence[Checkpoint | VectorFile]
) -> Output:
    return _output_with("report.json", "report", output, force, inputs)


def _output_with(
    name: str, what: str, output: PathLike, force: bool, inputs: Sequence[Checkpoint | VectorFile]
) -> Output:
    """Return the place of a folder; one that is there is replaced only if it holds `name`."""
    place = _place(output, force, inputs)
    if place.names is not None and name not in place.names:
        raise UsageError(f"output {place.ref}: holds no {what}, so --force does not replace it")
    return place


def _is_windowed(nbytes: int) -> bool:
    # the kernel throttles a writer that has dirtied a fifth of the memory (vm.dirty_ratio)
    return nbytes * 6 > available_memory_nbytes()


@contextlib.contextmanager
def staged(
    plan: Plan, output: Output, run: Run, request: Mapping[str, Any]
) -> Iterator[tuple[Staging, contextlib.ExitStack]]:
    """Yield a staging folder in which a plan can be taken up again, and what is closed at its end.

    `request` is all that the bytes of the output depend on, besides the inputs.
    """
    said = {"tool": __version__, "verb": plan.verb, **request}
    with contextlib.ExitStack() as stack:
        stack.callback(forget_open_files)
        inputs = fingerprints(plan.files())
        deliver = output.delivery(run.force, run.watcher)
        stage = stack.enter_context(staging(output.path, run.force, said, inputs, deliver))
        stage.made  # noqa: B018 - is there from here on
        yield stage, stack


@contextlib.contextmanager
def writing(
    plan: Plan, output: Output, run: Run, request: Mapping[str, Any]
) -> Iterator[tuple[Staging, list[OutputFile]]]:
    """Yield the staging folder and the plan's files, allocated in full; close what is left open."""
    windowed = _is_windowed(plan.nbytes_written)
    with staged(plan, output, run, request) as (stage, stack):
        files = []
        for entry in os.scandir(stage.made):  # of a run that was killed late
            if entry.name not in {planned.name for planned in plan.outputs}:
                shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
        for planned in plan.outputs:
            files.append(OutputFile(os.fspath(stage.made / planned.name), planned.nbytes, windowed))
            stack.callback(files[-1].close)
        yield stage, files


@contextlib.contextmanager
def writing_vector(
    plan: Plan, output: Output, run: Run, entries: Sequence[Entry], manifest: Manifest,
    max_shard_nbytes: int,
) -> Iterator[tuple[Staging, VectorWriter]]:  # fmt: skip
    """Yield the staging folder and a writer of vector blocks; close what is left open."""
    windowed = _is_windowed(sum(entry.nbytes for entry in entries))
    # what lies in the staging folder depends on it, if not what comes of it
    request = {**manifest, "max_shard_size": max_shard_nbytes, "stream": run.stream}
    with staged(plan, output, run, request) as (stage, stack):
        writer = VectorWriter(stage.folder, entries, manifest, max_shard_nbytes, windowed)
        stack.callback(writer.close)
        yield stage, writer


@contextlib.contextmanager
def writing_patch(
    plan: Plan, output: Output, run: Run, request: Mapping[str, Any]
) -> Iterator[tuple[Staging, "PatchWriter"]]:
    """Yield the staging folder and a writer of lists; close what is left open."""
    from skillvec.checkpoints.patch_writer import PatchWriter  # patches are rare

    with staged(plan, output, run, request) as (stage, stack):
        specs = [job.point for job in plan.jobs if isinstance(job, ListJob)]
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


def vector_nbytes(entries: Sequence[Entry], manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Return the least and the most that a vector file takes.

    Dense tensors are sure; of exceptions nothing is known, so the most has a fiftieth for them. The
    header says each name three times, and of a tensor at most 400 bytes more.
    """
    least = sum(entry.nbytes for entry in entries if entry.codec == "dense")
    most = sum(entry.nbytes * 51 // 50 + 12 * block_count(entry.numel) for entry in entries)
    most += sum(3 * len(json.dumps(entry.name)) + 400 for entry in entries)
    return least, most + 2 * len(json.dumps(manifest)) + 4096


def choose_storage(vector: SkillVector, dtype: str, codec: str) -> dict[str, tuple[str, str]]:
    """Choose dtype and codec of every delta of a vector that is to be written.

    A pair of checkpoints is probed: a 16-bit dtype where an exception a value would take more room
    (8 bytes; fp32 takes 2 more a value, so the turn is at one in four) gives way to fp32.
    """
    chosen = {}
    names = set(vector.deltas)
    pairs = [delta.pair for delta in vector.deltas.values()]
    sides = [side for pair in pairs if pair is not None for side in (pair.tuned, pair.base)]
    prefetch([value_range(s, *_middle(s)) for s in sides if isinstance(s, TensorSpec)])
    for name, delta in vector.deltas.items():
        kept, dense = dtype if dtype != "auto" else delta.fits, codec == "dense"
        if (pair := delta.pair) is not None and not vector.is_sparse:
            kept, sample = _probed(pair, pair.tuned)
            nonzero = int((sample != 0).sum())
            if codec == "sparse":
                dense = nonzero > DENSE_SHARE * sample.size
            elif codec == "auto" and nonzero:
                dense = not is_packed_within(sample, 0.98)
        elif delta.is_stored:
            kept = delta.spec.dtype
            if codec == "sparse" and not delta.is_zero:
                changed = vector.manifest["tensors"][name]["changed"]
                dense |= changed > DENSE_SHARE * delta.spec.numel
        taken = any(name + part in names for parts in PARTS.values() for part in parts if part)
        plain = dense or taken  # a tensor of the model has the name of a part
        chosen[name] = kept, "dense" if plain else {"auto": "packed"}.get(codec, codec)
        if delta.stack is not None and (dtype, codec, taken) == ("auto", "auto", False):
            chosen[name] = delta.stack.dtype, "factors"
    return chosen


def _middle(side: Source) -> tuple[int, int]:
    """Return begin and count of the values of a tensor that are probed."""
    numel = min(PROBE_NUMEL, side.numel)
    return (side.numel - numel) // 2, numel


def _probed(delta: Subtracted, tuned: Source) -> tuple[str, Any]:
    """Return the dtype to store a pair's difference in, and the 4,096 values in its middle."""
    numel = min(PROBE_NUMEL, delta.base.numel)
    if not numel:
        return delta.dtype, kernels.from_bytes(bytearray(), "U16")
    sides = [values_of(side, *_middle(side)) for side in (tuned, delta.base)]
    dtype = delta.dtype
    while True:
        out = kernels.from_bytes(bytearray(numel * ITEMSIZE[dtype]), dtype)
        found = subtract(sides[0], tuned.dtype, sides[1], delta.base.dtype, dtype,
                         delta.exactness, out)  # fmt: skip
        if found.delta.positions.size * 4 <= numel or ITEMSIZE[dtype] > 2:
            return dtype, bit_pattern(out)
        dtype = "F32"
