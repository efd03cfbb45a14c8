"""Remote checkpoints shard by shard: which files are on the disk when, and in which order jobs run.

Hides fetching and deleting. Jobs that need the same files of the Hub are one step; neighbouring
steps share files, so that each is fetched once where the layouts allow. What no later step needs
is deleted at once, and nothing is fetched before there is room: at most `LIMIT` files are on the
disk, more only while a tensor is made that spans more. Results come back in the plan's order, and a
vector file gets the bytes that it has without streaming. Vector files are not streamed.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from skillvec.engine.plan import Job
from skillvec.errors import OutputError
from skillvec.files.file import file_nbytes, forget_open_files
from skillvec.files.rows import RowWriter, Segment
from skillvec.remote.hub import HubFile, not_here
from skillvec.report import Watcher

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
    jobs: Sequence[Job],
    left: Sequence[int],
    run: Callable[[Sequence[int]], None],
    folder: Path,
    watcher: Watcher | None = None,
) -> None:
    """Run the jobs of which numbers are `left` step by step, their files in a folder below.

    `run` takes the numbers of jobs. The folder below `folder` is removed whatever happens. Raises
    OutputError, before anything is fetched, where the disk has no room for the largest step.
    """
    planned = _steps_of([jobs[number] for number in left])
    remotes = {
        remote.address: remote for number in left for remote in not_here(jobs[number].files())
    }
    free, most = shutil.disk_usage(folder).free, _most_nbytes(planned)
    if free < most:
        raise OutputError(f"{folder}: {most} bytes of shards do not fit on the disk: {free} free")
    shards = folder / "shards"
    shutil.rmtree(shards, ignore_errors=True)  # of an interrupted run
    shards.mkdir()
    total, before, shown = sum(remotes[f].nbytes for s in planned for f in s.fetched), 0, 0.0

    def told(received: int) -> None:
        nonlocal shown
        if watcher and time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            watcher.advanced(before + received, total)

    try:
        for step in planned:
            _delete(remotes[file] for file in step.dropped)
            for file in sorted(step.fetched):
                remotes[file].fetch(shards, told)
                before += remotes[file].nbytes
            run([left[number] for number in step.jobs])
            _delete(remotes[file] for file in step.done)
    finally:
        _delete(remotes.values())
        shutil.rmtree(shards, ignore_errors=True)


def _delete(remotes: Iterable[HubFile]) -> None:
    forget_open_files()  # an open file keeps its room on the disk
    for remote in remotes:
        if remote.local is not None:
            Path(remote.local).unlink(missing_ok=True)
            remote.local = None


def replay(kept: Segment, writer: RowWriter) -> None:
    """Give all rows that a segment keeps to the writer, in their order.

    A vector file has then the bytes that it has when blocks come in order. The blocks lie on the
    disk twice while this runs.
    """
    for row in sorted(kept.offsets):
        writer.add(row, kept.read(row))
