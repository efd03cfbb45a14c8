"""What travels to the workers of a cluster, and what they do with it."""

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

from skillvec import __version__
from skillvec.engine.plan import Job, Plan
from skillvec.engine.threads import Found, Threads
from skillvec.files.file import RemoteFile
from skillvec.files.output_file import OutputFile
from skillvec.files.rows import Segment
from skillvec.ops import compiled

SCRATCH = "rows"  # in the staging folder


class Shared(NamedTuple):
    """What the tasks of a run have in common.

    `plan` is without jobs. `inputs` are the driver's fingerprints by place on the disk, `nonce` is
    what it has written into the folder `scratch`, `shape` that of its writer's rows.
    """

    plan: Plan
    outputs: list[str]
    remotes: dict[str, RemoteFile]
    inputs: dict[str, list[Any]]
    versions: dict[str, str]
    scratch: str | None
    nonce: str
    shape: tuple[int, int] | None


class Batch(NamedTuple):
    """What a task gives back: results, and lines of the rows that lie in the file `segment`."""

    found: Found
    rows: dict[int, list[int]]
    segment: str


class Move(NamedTuple):
    """Bytes to copy from a segment to an output."""

    start: int
    nbytes: int
    output: str
    offset: int


def receive_shared(shared: Shared) -> None:
    """Do nothing: to have got what is shared is the proof."""


def versions() -> dict[str, str]:
    """Return the versions on which the bytes of an output, or digits of a report, may depend."""
    found = {name: version(name) for name in ("numpy", "xxhash", "zstandard")}
    return {"skillvec": __version__, "kernels": compiled.in_use(), **found}


def run_batch(shared: Shared, jobs: Sequence[Job]) -> Batch:
    """Run jobs; their bytes are on the disk when it returns."""
    # verify has the jobs of apply, with their outputs, and writes none
    written = [job.output[0] for job in jobs if job.output is not None and shared.outputs]
    names = list(dict.fromkeys(written))

    def placed(job: Job) -> Job:
        if job.output is None or not names:
            return job
        return replace(job, output=(names.index(job.output[0]), job.output[1]))

    with contextlib.ExitStack() as stack:
        files = [OutputFile(shared.outputs[name], 0, shared=True) for name in names]
        segment = None
        if shared.shape is not None:
            assert shared.scratch is not None
            segment = Segment(os.path.join(shared.scratch, uuid.uuid4().hex), *shared.shape)
            files.append(segment.file)
        for file in files:
            stack.callback(file.close)
        found = Threads(0).run(replace(shared.plan, jobs=[*map(placed, jobs)]), files, segment)
        for file in files:
            file.flush()
        if segment is None:
            return Batch(found, {}, "")
        return Batch(found, {row: segment.line(row) for row in segment.offsets}, segment.file.path)


def copy_ranges(shared: Shared, segment: str, moves: Sequence[Move]) -> None:
    """Copy rows from a segment to their places; they are on the disk when it returns."""
    with contextlib.ExitStack() as stack, open(segment, "rb", buffering=0) as source:
        files = {}
        for path in {move.output for move in moves}:
            files[path] = OutputFile(path, 0, shared=True)
            stack.callback(files[path].close)
        for move in moves:
            files[move.output].copy(move.offset, source.fileno(), move.start, move.nbytes)
        for file in files.values():
            file.flush()
