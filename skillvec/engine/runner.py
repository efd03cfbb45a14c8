"""Plans into results: the report before the work, measuring passes, the run itself."""

import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from skillvec.checkpoints.folder import is_away
from skillvec.engine.factors import factors_nbytes, find_factors
from skillvec.engine.outputs import Output, free_nbytes
from skillvec.engine.plan import Job, JobResult, Plan, from_line, job_line, to_line
from skillvec.engine.run import Run
from skillvec.engine.threads import check_views, measure
from skillvec.errors import UsageError
from skillvec.files.file import digest_file_range, file_nbytes, forget_open_files
from skillvec.files.fingerprints import fingerprints, refuse_changed
from skillvec.files.header import ITEMSIZE
from skillvec.files.journal import Journal
from skillvec.files.output_file import OutputFile
from skillvec.files.rows import RowWriter, Segment
from skillvec.files.staging import Staging
from skillvec.ops import compiled
from skillvec.report import Report, Watcher
from skillvec.vectors.deltas.low_rank import low_rank_in
from skillvec.vectors.reader import readers_of

CLAIM_SECONDS = 10.0  # between the lines of a journal: what a killed run has to do again


def fetch(files: Iterable[str], watcher: Watcher | None) -> None:
    """Bring those files of the Hub here that are not here yet."""
    away = [file for file in files if is_away(file)]
    if away:
        from skillvec.remote import hub

        hub.fetch_all(away, watcher)


def show_plan(
    plan: Plan,
    facts: dict[str, Any],
    run: Run,
    place: Output | None = None,
    matrices_nbytes: int = 0,
) -> Report:
    """Return the report as far as headers can tell, and show it to the watcher.

    `matrices_nbytes` is memory that whole matrices take beside the blocks of the workers, and what
    operators look at in the pass before.
    Raises OutputError where what is sure to be written does not fit on the disk of `place`. What is
    free there, only the report of a dry run keeps.
    """
    mixed = [delta.merged for job in plan.jobs for delta in job.deltas]
    each = 24 + 4 * max(mixed, default=0)  # MB of buffers a worker, and of each vector it merges
    planned = {
        "nbytes_read": plan.nbytes_read,
        "nbytes_written": plan.nbytes_written,
        "files": [output.name for output in plan.outputs if output.name],
        "side_files": [name for _, name in plan.copies],
        "engine": run.engine.name,
        "workers": max(run.engine.workers, 1),
        "memory_nbytes": ((64 + run.engine.in_process * each) << 20)
        + max(matrices_nbytes, factors_nbytes(plan, run.engine.in_process)),
        "kernels": compiled.in_use(),
    }
    away = [file for file in plan.files() if is_away(file)]
    if away:
        planned["nbytes_fetched"] = sum(file_nbytes(file) for file in away)
        planned["fetched"] = len(away)
    if run.stream:
        from skillvec.engine import streaming  # with the client of the Hub

        planned["stream"] = streaming.schedule(plan.jobs)
    report = Report(plan.verb, facts | planned, warnings=list(plan.warnings))
    named = {line["name"] for line in plan.ledger}
    report.ledger = [
        job_line(job, job.status) for job in plan.jobs if job.name not in named
    ] + plan.ledger
    if place is not None:
        report.now["nbytes_free"] = free_nbytes(place.disk)
    if run.watcher:
        run.watcher.planned(report)
    if place is not None:
        shards = report.facts["stream"]["most_nbytes"] if run.stream else 0
        place.refuse_full(plan.least_nbytes + shards)
        free = report.now["nbytes_free"] if run.dry_run else report.now.pop("nbytes_free")
        if run.dry_run and free is not None and free < plan.nbytes_written:
            report.warnings.append(
                f"the output may not fit: it takes at most {plan.nbytes_written:,} bytes, often"
                f" less, and {free:,} are free on the disk of {place.disk}"
            )
    return report


def measure_plan(plan: Plan, run: Run) -> Plan:
    """Run the measuring passes of the plan's operators, if they have any."""
    passes = max((mix.passes for mix in plan.mixes), default=0)
    whole = any(low_rank_in(delta for job in plan.jobs for delta in job.deltas))
    if (passes or whole) and run.stream:
        raise UsageError(
            f"stream reads every shard once, but {plan.mixes[0].operator.name} has to measure"
            " before: store its vectors first"
        )
    if passes or whole:
        fetch(plan.files(), run.watcher)
    total = sum(mix.nbytes for mix in plan.mixes)

    def progress(done_nbytes: int) -> None:
        if run.watcher:
            run.watcher.advanced(done_nbytes, total)

    try:
        plan = find_factors(plan, run.engine.in_process, run.watcher)
        for number in range(passes):
            plan = measure(plan, number, run.engine, progress)
    finally:
        forget_open_files()
    return plan


class _Claims:
    """What the journal of a run says is done, and what it will say next."""

    def __init__(
        self, plan: Plan, journal: Journal, files: Sequence[OutputFile], writer: RowWriter | None
    ) -> None:
        self._plan, self._journal, self._files, self._writer = plan, journal, files, writer
        self._noted: deque[tuple[int, JobResult]] = deque()
        self._due = time.monotonic() + CLAIM_SECONDS

    def restored(self) -> dict[int, JobResult]:
        """Return what an interrupted run has done, by job, as far as it lies on the disk.

        Of rows, which lie behind each other, only those before the first that is missing.
        """
        lines = {line["job"]: line for line in self._journal.found}
        done: dict[int, JobResult] = {}
        gap = False
        for number, job in enumerate(self._plan.jobs):
            line = lines.get(number)
            if job.has_rows and not isinstance(self._writer, Segment):
                gap |= line is None
            if line is None or (gap and job.has_rows):
                continue
            result = from_line(job, line)
            for row, kept in zip(job.rows, line["rows"], strict=True):
                assert self._writer is not None
                self._writer.restore(row, kept)
            if job.output is None or self._is_there(job, result.digests["output"]):
                done[number] = result
        return done

    def _is_there(self, job: Job, digest: str) -> bool:
        assert job.output is not None
        file, start = job.output
        nbytes = job.numel * ITEMSIZE[job.out_dtype]
        return digest_file_range(self._files[file].path, start, nbytes) == digest

    def note(self, number: int, result: JobResult) -> None:
        """Take a job that is done; from any thread."""
        self._noted.append((number, result))

    def settle(self) -> None:
        """Write to the journal what was noted, if it is time."""
        if time.monotonic() < self._due or not self._noted:
            return
        lines = []
        while self._noted:
            number, result = self._noted.popleft()
            rows = result.job.rows
            kept = [self._writer.line(row) for row in rows] if self._writer is not None else []
            lines.append({"job": number, "rows": kept, **to_line(result)})
        files = self._files if self._writer is None else self._writer.files
        self._journal.claim(lines, files)
        self._due = time.monotonic() + CLAIM_SECONDS


def run_plan(
    plan: Plan,
    how: Run,
    stage: Staging | None = None,
    files: Sequence[OutputFile] = (),
    writer: RowWriter | None = None,
) -> list[JobResult]:
    """Run a plan, from where an interrupted run of it has left `stage`; return results in order.

    With `how.stream`, shards on the Hub are fetched into the stage as they are needed. Raises
    FormatError where an input changed meanwhile.
    """
    journal = stage.journal if stage is not None else None
    before = fingerprints(plan.files()) if journal is None else journal.inputs
    total = sum(job.nbytes_read for job in plan.jobs)
    kept: Segment | None = None
    if how.stream and writer is not None:
        assert stage is not None
        kept = Segment(os.fspath(stage.folder / "out-of-order"), *writer.sizes.shape)
    held = writer if kept is None else kept
    claims = _Claims(plan, journal, files, held) if journal is not None else None
    results = claims.restored() if claims is not None else {}
    if results and stage is not None:
        stage.resumed = len(results)
        # the vectors that they read are proved to be whole at the end of a run only
        done_jobs = [result.job for result in results.values()]
        check_views(replace(plan, jobs=done_jobs), readers_of(plan.vectors), {})
    done = sum(result.job.nbytes_read for result in results.values())

    def progress(done_nbytes: int) -> None:
        if how.watcher:
            how.watcher.advanced(done + done_nbytes, total)
        if claims is not None:
            claims.settle()

    def run(numbers: Sequence[int]) -> None:
        nonlocal done

        def finished(number: int, result: JobResult) -> None:
            if claims is not None:
                claims.note(numbers[number], result)

        part = replace(plan, jobs=[plan.jobs[number] for number in numbers])
        found = how.engine.run(part, files, held, progress, finished)
        results.update(zip(numbers, found.results, strict=True))
        done += sum(job.nbytes_read for job in part.jobs)

    left = [number for number in range(len(plan.jobs)) if number not in results]
    try:
        if not how.stream:
            fetch(plan.files(), how.watcher)
            run(left)
        else:
            from skillvec.engine.streaming import replay, run_streamed

            assert stage is not None
            shards = {file for job in plan.jobs for file in job.files()}
            fetch((file for file in plan.files() if file not in shards), how.watcher)
            run_streamed(plan.jobs, left, run, stage.folder, how.watcher)
            if kept is not None and writer is not None:
                replay(kept, writer)
    finally:
        if kept is not None:
            kept.file.close()
        forget_open_files()
    refuse_changed(before)
    return [results[number] for number in range(len(plan.jobs))]
