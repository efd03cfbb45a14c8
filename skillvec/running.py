"""Plans into results: the report before the work, measuring passes, the run itself."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skillvec import engine, kernels, streaming
from skillvec.checkpoint import is_away
from skillvec.engine import JobResult
from skillvec.errors import UsageError
from skillvec.patch import PatchWriter
from skillvec.plan import Plan
from skillvec.report import Report, Watcher
from skillvec.storage import OutputFile, file_nbytes, forget_open_files
from skillvec.summary import job_line
from skillvec.vector import MixDelta
from skillvec.vectorfile import VectorWriter


def worker_count(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise UsageError(f"workers {workers}: expected at least 1")
    return workers or min(16, len(os.sched_getaffinity(0)))


def fetch(files: Iterable[str], watcher: Watcher | None) -> None:
    """Bring those files of the Hub here that are not here yet."""
    away = [file for file in files if is_away(file)]
    if away:
        from skillvec import hub

        hub.fetch_all(away, watcher)


def planned(
    plan: Plan,
    facts: dict[str, Any],
    workers: int | None,
    watcher: Watcher | None,
    stream: bool = False,
) -> Report:
    """Return the report as far as headers can tell, and show it to the watcher."""
    count = worker_count(workers)
    mixed = [len(d.sources) for job in plan.jobs for d in job.deltas if isinstance(d, MixDelta)]
    each = 24 + 4 * max(mixed, default=0)  # MB of buffers a worker, and of each vector it merges
    planned = {
        "nbytes_read": plan.nbytes_read,
        "nbytes_written": plan.nbytes_written,
        "files": [output.name for output in plan.outputs if output.name],
        "side_files": [name for _, name in plan.copies],
        "workers": count,
        "memory_nbytes": (64 + count * each) << 20,
        "kernels": kernels.kernels_in_use(),
    }
    away = [file for file in plan.files() if is_away(file)]
    if away:
        planned["nbytes_fetched"] = sum(file_nbytes(file) for file in away)
        planned["fetched"] = len(away)
    if stream:
        planned["stream"] = streaming.schedule(plan.jobs)
    status = {"add": "applied", "store": "delta", "copy": "passed through", "compare": "compared",
              "same": "compared", "list": "listed"}  # fmt: skip
    report = Report(plan.verb, facts | planned, warnings=list(plan.warnings))
    named = {line["name"] for line in plan.ledger}
    report.ledger = [
        job_line(job, status[job.operator]) for job in plan.jobs if job.name not in named
    ] + plan.ledger
    if watcher:
        watcher.planned(report)
    return report


def measured(
    plan: Plan, workers: int | None, watcher: Watcher | None, stream: bool = False
) -> Plan:
    """Run the measuring passes of the plan's operators, if they have any."""
    passes = max((mix.operator.passes(mix.parameters) for mix in plan.mixes), default=0)
    if passes and stream:
        raise UsageError(
            f"stream reads every shard once, but {plan.mixes[0].operator.name} has to measure"
            " before: store its vectors first"
        )
    if passes:
        fetch(plan.files(), watcher)
    total = sum(mix.nbytes for mix in plan.mixes)

    def progress(done_nbytes: int) -> None:
        if watcher:
            watcher.advanced(done_nbytes, total)

    try:
        for number in range(passes):
            plan = engine.measure(plan, number, worker_count(workers), progress)
    finally:
        forget_open_files()
    return plan


def run_plan(
    plan: Plan,
    files: list[OutputFile],
    workers: int | None,
    watcher: Watcher | None,
    writer: VectorWriter | PatchWriter | None = None,
    folder: Path | None = None,
) -> list[JobResult]:
    """Run a plan; with `folder`, shards on the Hub are fetched into it as they are needed."""
    total = sum(job.nbytes_read for job in plan.jobs)
    done = 0

    def progress(done_nbytes: int) -> None:
        if watcher:
            watcher.advanced(done + done_nbytes, total)

    held = writer
    if folder is not None and isinstance(writer, VectorWriter):
        held = streaming.ReorderedWriter(writer, folder)

    def run(part: Plan) -> list[JobResult]:
        nonlocal done
        count = worker_count(workers)
        results = engine.run(part, files, writer=held, workers=count, progress=progress)
        done += sum(job.nbytes_read for job in part.jobs)
        return results

    try:
        if folder is None:
            fetch(plan.files(), watcher)
            return run(plan)
        shards = {file for job in plan.jobs for file in job.files()}
        fetch((file for file in plan.files() if file not in shards), watcher)
        results = streaming.run_streamed(plan, run, folder, watcher)
        if isinstance(held, streaming.ReorderedWriter):
            held.replay()
        return results
    finally:
        if isinstance(held, streaming.ReorderedWriter):
            held.close()
        forget_open_files()
