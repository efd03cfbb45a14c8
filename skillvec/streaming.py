"""Remote checkpoints shard by shard: which files are on the disk when, and in which order jobs run.

Hides fetching and deleting. Jobs that need the same files of the Hub are one step; neighbouring
steps share files, so that each is fetched once where the layouts allow. What no later step needs
is deleted at once, and nothing is fetched before there is room: at most `LIMIT` files are on the
disk, more only while a tensor is made that spans more. Results come back in the plan's order, and a
vector file gets the bytes that it has without streaming. Vector files are not streamed.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.codecs import NO_BYTES, Encoded
from skillvec.engine import JobResult
from skillvec.errors import OutputError
from skillvec.hub import HubFile, not_here
from skillvec.plan import Job, Plan
from skillvec.report import Watcher
from skillvec.storage import OutputFile, file_nbytes, forget_open_files
from skillvec.vectorfile import EXCEPTION, REPLACEMENT, VectorWriter, block_digest

LIMIT = 2  # files of the Hub on the disk
Files = frozenset[str]


class Step(NamedTuple):
    """Jobs, by number, and what is done for them: `dropped` are deleted, then `fetched` come.

    `files` are all that lie on the disk while the jobs run, `done` those deleted after them.
    """

    jobs: tuple[int, ...]
    dropped: Files
    fetched: Files
    files: Files
    done: Files


def steps(needs: Sequence[Iterable[str]], limit: int = LIMIT) -> list[Step]:
    """Return the steps in which to run jobs that need these files.

    Next come always the jobs that want the fewest files not on the disk, of these those for which
    the fewest are dropped that are wanted again, of these the first in the order of the names. Two
    checkpoints that are cut into different shards are so walked through side by side.
    """
    alike: dict[Files, list[int]] = {}
    for number, files in enumerate(needs):
        alike.setdefault(frozenset(files), []).append(number)
    order = {files: rank for rank, files in enumerate(sorted(alike, key=sorted))}
    left = dict.fromkeys(order)
    wanted: dict[str, set[Files]] = {}
    for files in order:
        for file in files:
            wanted.setdefault(file, set()).add(files)
    held: Files = frozenset()
    found = []
    while left:
        near = {files for file in held for files in wanted[file]} or {next(iter(left))}
        _, _, _, best = min(
            (
                len(files - held),
                max(len(held | files) - max(limit, len(files)), 0),
                order[files],
                files,
            )
            for files in near
        )
        del left[best]
        for file in best:
            wanted[file].remove(best)
        soonest = sorted(
            held - best, key=lambda file: (min(order[files] for files in wanted[file]), file)
        )
        here = best | set(soonest[: max(limit - len(best), 0)])
        done = frozenset(file for file in best if not wanted[file])
        found.append(Step(tuple(alike[best]), held - here, best - held, here, done))
        held = here - done
    return found


def _steps_of(jobs: Sequence[Job]) -> list[Step]:
    return steps([[remote.address for remote in not_here(job.files())] for job in jobs])


def schedule(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what a streamed run will fetch and hold: numbers of files and bytes.

    `wide` names the tensors that span more files than are held else.
    """
    planned = _steps_of(jobs)
    fetched = [file for step in planned for file in step.fetched]
    wide = [jobs[n].name for step in planned if len(step.files) > LIMIT for n in step.jobs]
    return {
        "fetched": len(fetched),
        "fetched_again": len(fetched) - len(set(fetched)),
        "nbytes_fetched": sum(map(file_nbytes, fetched)),
        "most_files": max((len(step.files) for step in planned), default=0),
        "most_nbytes": _most_nbytes(planned),
        "wide": wide,
    }


def _most_nbytes(planned: Iterable[Step]) -> int:
    return max((sum(map(file_nbytes, step.files)) for step in planned), default=0)


def run_streamed(
    plan: Plan,
    run_group: Callable[[Plan], list[JobResult]],
    folder: Path,
    watcher: Watcher | None = None,
) -> list[JobResult]:
    """Run a plan step by step, its files of the Hub in a folder below `folder`.

    `run_group` runs a part of the plan. The folder below is removed whatever happens. Raises
    OutputError, before anything is fetched, where the disk has no room for the largest step.
    """
    planned = _steps_of(plan.jobs)
    remotes = {remote.address: remote for job in plan.jobs for remote in not_here(job.files())}
    free, most = shutil.disk_usage(folder).free, _most_nbytes(planned)
    if free < most:
        raise OutputError(f"{folder}: {most} bytes of shards do not fit on the disk: {free} free")
    shards = folder / "shards"
    shards.mkdir()
    total, before, shown = sum(remotes[f].nbytes for s in planned for f in s.fetched), 0, 0.0

    def told(received: int) -> None:
        nonlocal shown
        if watcher and time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            watcher.advanced(before + received, total)

    results: dict[int, JobResult] = {}
    try:
        for step in planned:
            _delete(remotes[file] for file in step.dropped)
            for file in sorted(step.fetched):
                remotes[file].fetch(shards, told)
                before += remotes[file].nbytes
            part = replace(plan, jobs=[plan.jobs[number] for number in step.jobs])
            results |= dict(zip(step.jobs, run_group(part), strict=True))
            _delete(remotes[file] for file in step.done)
    finally:
        _delete(remotes.values())
        shutil.rmtree(shards, ignore_errors=True)
    return [results[number] for number in range(len(plan.jobs))]


def _delete(remotes: Iterable[HubFile]) -> None:
    forget_open_files()  # an open file keeps its room on the disk
    for remote in remotes:
        if remote.local is not None:
            Path(remote.local).unlink(missing_ok=True)
            remote.local = None


class ReorderedWriter(VectorWriter):
    """Takes blocks in any order, keeps them in a file, and gives them to `writer` in row order.

    The vector file has then the bytes that it has when blocks come in order. Until `replay` the
    blocks lie on the disk once, while it runs twice.
    """

    def __init__(self, writer: VectorWriter, folder: Path) -> None:
        # not the base's own: it is `writer` that has shards and spills
        self._writer, self._lock = writer, threading.Lock()
        self._blocks: dict[int, tuple[int, ...]] = {}  # row -> offset and lengths
        self._kept = OutputFile(os.fspath(folder / "out-of-order"), 0)

    def add(
        self,
        row: int,
        encoded: Encoded,
        exceptions: npt.NDArray[Any],
        replacements: npt.NDArray[Any],
    ) -> bytes:
        """Keep one block; return the digest of its bytes."""
        records = exceptions.view(np.uint8), replacements.view(np.uint8)
        pieces = (encoded.payload, encoded.bitmap, *records)
        with self._lock:
            offset = self._kept.reserve(sum(piece.size for piece in pieces))
            self._blocks[row] = (offset, *(piece.size for piece in pieces))
        for piece in pieces:
            if piece.size:
                self._kept.write(offset, piece.data)
            offset += piece.size
        return block_digest(encoded)

    def stop(self) -> None:
        """Do nothing: no block waits for its turn, and the next step will add more."""

    def replay(self) -> None:
        """Give all blocks to the writer, in the order of their rows."""
        try:
            for row, (offset, *sizes) in sorted(self._blocks.items()):
                content = bytearray(sum(sizes))
                self._kept.read_into(offset, memoryview(content))
                whole = np.frombuffer(content, np.uint8) if content else NO_BYTES
                payload, bitmap, exceptions, replacements = np.split(whole, np.cumsum(sizes)[:-1])
                self._writer.add(
                    row,
                    Encoded(payload, bitmap),
                    exceptions.view(EXCEPTION),
                    replacements.view(REPLACEMENT),
                )
        finally:
            self.close()

    def close(self) -> None:
        """Give back the room of what was kept; a second call does nothing."""
        self._kept.close()
        Path(self._kept.path).unlink(missing_ok=True)
