"""Running a plan's jobs: one plain thread a core, each reading, computing and writing its blocks.

Begin with `_ThreadedRun.run_block`: a block of a job, which the job itself does: read -> decode the
delta -> fp32 operator, one rounding -> write at the planned address (or compare) -> sums and
digests. When the last block of a tensor is done its numbers become a `JobResult`. Results depend on
the plan alone: sums are kept by block and added in block order, digests are trees, output addresses
are planned.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from skillvec.engine.jobs.measure import MeasureJob
from skillvec.engine.plan import (
    COUNTS,
    LOST_COUNT,
    OF_TARGET,
    OF_TUNED,
    Common,
    Job,
    JobResult,
    Plan,
    State,
    Task,
)
from skillvec.files.file import fold_digest
from skillvec.files.gather import Gatherer, gathering
from skillvec.files.held import HeldFiles, HeldRows
from skillvec.files.output_file import OutputFile
from skillvec.files.rows import RowWriter
from skillvec.ops import arithmetic
from skillvec.ops.block import block_count
from skillvec.ops.kernels import Array
from skillvec.vectors.block_reader import Block, Workspace
from skillvec.vectors.deltas.base import NO_DIGEST, check_digests, stored_in, views_in
from skillvec.vectors.deltas.mix import mixes_in
from skillvec.vectors.deltas.view import VIEW
from skillvec.vectors.reader import BlockReader, readers_of

# a worker does several small tensors in one go: to take one, to wait for its place and to write
# it costs as much as a thousand values
SMALL_NUMEL, BATCH_NUMEL, BATCH_JOBS = 1 << 15, 1 << 18, 64


class Found(NamedTuple):
    """What a run gives: results in the plan's order, and counts of measuring passes by scope."""

    results: list[JobResult]
    totals: dict[str, Array]


class Engine(Protocol):
    """Runs the jobs of a plan; the results and the bytes depend on the plan alone."""

    name: str
    workers: int  # at once; 0 for the calling thread
    in_process: int  # of these, in one process: they share its memory

    def run(
        self,
        plan: Plan,
        outputs: Sequence[OutputFile] = (),
        writer: RowWriter | None = None,
        progress: Callable[[int], None] = lambda done_nbytes: None,
        finished: Callable[[int, JobResult], None] = lambda number, result: None,
    ) -> Found:
        """Run every job, writing to `outputs` at planned places, or rows of blocks to `writer`.

        `progress` is called on the calling thread with the bytes read so far, about ten times a
        second; `finished`, from any thread, with the number of a job and its result when all its
        bytes were written. The first error stops the run and is raised here, as is Ctrl-C.
        """


def one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """Keep BLAS to one thread: the cores have blocks, and its threads would wait by turning."""
    if os.environ.get("OPENBLAS_NUM_THREADS") == "1":  # as in the command line: a quicker start
        return contextlib.nullcontext()
    from threadpoolctl import threadpool_limits

    limits: contextlib.AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


class Threads:
    """The engine of one machine: plain threads, or with 0 `workers` the calling thread alone."""

    def __init__(self, workers: int) -> None:
        self.name, self.workers = ("threads" if workers else "serial"), workers
        self.in_process = max(workers, 1)

    def run(
        self,
        plan: Plan,
        outputs: Sequence[OutputFile] = (),
        writer: RowWriter | None = None,
        progress: Callable[[int], None] = lambda done_nbytes: None,
        finished: Callable[[int, JobResult], None] = lambda number, result: None,
    ) -> Found:
        """See Engine."""
        with one_blas_thread():
            return _ThreadedRun(plan, outputs, writer, finished).run(self.workers, progress)


OnBlock = Callable[[Plan, int, int, bool], None]
_on_block: ContextVar[tuple[OnBlock, ...]] = ContextVar("on_block", default=())


@contextlib.contextmanager
def on_block(call: OnBlock) -> Iterator[None]:
    """Call `call(plan, number, index, again)` before each block of the runs that begin in here.

    `number` is that of the job in `plan.jobs`, `index` that of its block; `again` says that the
    block is done once more, because a guess about it was wrong. It is called from the threads that
    work, of the engines threads and serial; what it raises stops the run as any error does. Of
    several the innermost is called first.
    """
    token = _on_block.set((call, *_on_block.get()))
    try:
        yield
    finally:
        _on_block.reset(token)


def measure(
    plan: Plan, number: int, engine: Engine, progress: Callable[[int], None] | None = None
) -> Plan:
    """Run pass `number` of the operators that have so many; return the plan with what they found.

    Counts are added up as they come, sums of floats in the order of blocks and jobs.
    """
    used = [mix for job in plan.jobs for mix in mixes_in(job.deltas)]
    # a scope of all tensors counts those that have no job as well, each once, in its own order
    wide = [mix for mix in plan.mixes if not mix.per_tensor]
    each = {(mix.scope, mix.spec.name): mix for mix in (*wide, *used)}
    mixes = [mix for mix in each.values() if mix.passes > number]
    if not mixes:
        return plan
    jobs = [MeasureJob(m.spec.name, m.spec.numel, deltas=(m,), number=number) for m in mixes]
    found = engine.run(replace(plan, jobs=jobs), progress=progress or (lambda done_nbytes: None))
    known: dict[str, Any] = {}
    totals = found.totals
    for mix, result in zip(mixes, found.results, strict=True):
        if mix.per_tensor:
            known[mix.scope] = result.found
        elif result.found is not None:
            total = totals.get(mix.scope)
            totals[mix.scope] = result.found if total is None else total + result.found
    for mix in mixes:
        if mix.scope in totals:
            known[mix.scope] = mix.settle(number, totals.pop(mix.scope))
    return plan.informed(known)


class _ThreadedRun:
    """One run of a plan by the threads of a process: what is to be done, and was found."""

    def __init__(
        self,
        plan: Plan,
        outputs: Sequence[OutputFile],
        writer: RowWriter | None,
        finished: Callable[[int, JobResult], None],
    ) -> None:
        self._plan, self._finished = plan, finished
        self._outputs, self._writer = outputs, writer
        self._common = Common(plan, outputs, writer)
        self._on_block = _on_block.get()
        self._readers = readers_of(plan.vectors)
        # of what views read, by role and tensor: digests, and where values are not finite
        self._seen: dict[str, dict[str, bytearray]] = {}
        self._holes: set[str] = set()
        self._gatherer = Gatherer(_most_turned(plan))
        self._states: dict[int, State] = {}
        self._results: list[JobResult | None] = [None] * len(plan.jobs)
        self._lock = self._common.lock
        self._tasks = self._all_tasks()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._done_nbytes = 0

    def run(self, workers: int, progress: Callable[[int], None]) -> Found:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            if not threads:
                self._work(progress)
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    progress(self._done_nbytes)
        finally:
            self._halt()
            for thread in threads:
                if thread.ident is not None:  # Ctrl-C may come while they are started
                    thread.join()
        if self._error is not None:
            raise self._error
        progress(self._done_nbytes)
        check_views(self._plan, self._readers, self._seen)
        results = [result for result in self._results if result is not None]
        return Found(results, self._common.totals)

    def _halt(self) -> None:
        self._stop.set()
        if self._writer is not None:
            self._writer.stop()

    def _all_tasks(self) -> Iterator[tuple[range, int]]:
        """Yield jobs with the block that is to be done; of a batch, whose blocks are all of it, 0.

        A batch are neighbours of few values: they are begun, written and said to be done together.
        """
        jobs, first = self._plan.jobs, 0
        while first < len(jobs):
            last, numel = first, 0
            while (
                last < min(len(jobs), first + BATCH_JOBS)
                and jobs[last].numel <= SMALL_NUMEL and numel <= BATCH_NUMEL
            ):  # fmt: skip
                numel += jobs[last].numel
                last += 1
            if last > first:
                yield range(first, last), 0
            else:
                last = first + 1
                self._states[first] = self._begin(jobs[first])
                for block in range(block_count(jobs[first].numel)):
                    yield range(first, last), block
            first = last

    def _begin(self, job: Job) -> State:
        blocks = block_count(job.numel)
        sums = np.zeros((blocks, job.width(self._plan.request)))
        return State(blocks, sums, np.zeros(len(COUNTS), np.int64), _casts_of(job))

    def _work(self, progress: Callable[[int], None] = lambda done_nbytes: None) -> None:
        try:
            with gathering(self._gatherer):
                self._work_off(progress)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._halt()

    def _work_off(self, progress: Callable[[int], None]) -> None:
        """Do one block after the other until there is none left, or the run is stopped."""
        workspace = Workspace()
        while not self._stop.is_set():
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            numbers, block = task
            state = self._states.get(numbers[0])
            if state is None:
                try:
                    self._run_batch(numbers, workspace)
                finally:
                    progress(self._done_nbytes)
                continue
            number = numbers[0]
            self.run_block(number, block, workspace, self._common, state)
            if self._stop.is_set():  # a stopped writer has taken nothing
                return
            progress(self._done_nbytes)
            with self._lock:
                state.remaining -= 1
                last = state.remaining == 0
            if last:
                self._note(number, self._finish(number, workspace, self._common, state))
                del self._states[number]

    def _run_batch(self, numbers: range, workspace: Workspace) -> None:
        """Do small tensors one after the other; write, and say that they are done, at the end."""
        writer = HeldRows(self._writer) if self._writer is not None else None
        files = HeldFiles(self._outputs)
        common = replace(self._common, outputs=files, writer=writer)
        done: list[JobResult] = []
        try:
            for number in numbers:
                state = self._begin(self._plan.jobs[number])
                if state.remaining:
                    self.run_block(number, 0, workspace, common, state)
                if self._stop.is_set():
                    return
                done.append(self._finish(number, workspace, common, state))
        finally:  # what was done before an error is done: a run that goes on takes it over
            if not self._stop.is_set():
                files.flush()
                if writer is not None:
                    writer.flush()
            if not self._stop.is_set():  # not while it waited for its turn either
                for number, result in zip(numbers, done, strict=False):
                    self._note(number, result)

    def _note(self, number: int, result: JobResult) -> None:
        self._results[number] = result
        self._finished(number, result)

    def run_block(
        self, number: int, index: int, workspace: Workspace, common: Common, state: State,
        exact_base: bool | None = None,
    ) -> None:  # fmt: skip
        """Do one block of one job; `exact_base` is set when it is known and was guessed wrong."""
        for call in self._on_block:
            call(self._plan, number, index, exact_base is not None)
        job = self._plan.jobs[number]
        block = Block(
            index, job.numel, workspace, self._readers, state.leaves,
            self._seen, self._holes, casts=state.casts,
        )  # fmt: skip
        tally = np.zeros(len(COUNTS), np.int64)
        job.run(Task(common, state, block, tally, exact_base))
        tally[OF_TUNED:OF_TARGET] = block.tuned_nonfinite, block.base_nonfinite
        tally[LOST_COUNT] = block.lost
        with self._lock:
            state.counts += tally
            if block.subtracted is not None:
                state.casts &= block.subtracted.casts
            if exact_base is None:
                self._done_nbytes += job.nbytes_read * block.size // job.numel

    def _finish(self, number: int, workspace: Workspace, common: Common, state: State) -> JobResult:
        """Settle a tensor whose blocks are all read: wrong guesses, sums, digests, checks."""
        job, leaves = self._plan.jobs[number], state.leaves
        digests = {role: fold_digest(held) for role, held in leaves.items()}
        sides = [digests.get(role, NO_DIGEST) for role in ("point", "base")]
        exact_base = job.is_exact_base(*sides)
        if state.assumed and exact_base != self._plan.expects_base:  # not as guessed: once more
            for block, counts in sorted(state.assumed.items()):
                state.counts -= counts
                state.sums[block] = 0
                state.first_mismatch.pop(block, None)
                self.run_block(number, block, workspace, common, state, exact_base)
            digests = {role: fold_digest(held) for role, held in leaves.items()}
        for role in job.roles:  # an empty tensor has no blocks, but a digest
            digests.setdefault(role, NO_DIGEST)
        check_digests(job.deltas, digests)
        return JobResult(
            job,
            digests,
            state.sums.sum(axis=0) if len(state.sums) != 1 else state.sums[0] + 0.0,
            **dict(zip(COUNTS, state.counts.tolist(), strict=True)),
            casts=state.casts,
            first_mismatch=min(state.first_mismatch.values()) if state.first_mismatch else None,
            exact_base=exact_base,
            found=job.settle(common, state),
        )


def _most_turned(plan: Plan) -> int:
    """Return how many groups of turned views may be kept: a few of each side of the widest job."""
    sides = (2 + 2 * sum(delta.merged or 1 for delta in job.deltas) for job in plan.jobs)
    return 2 * max(sides, default=0)


def _casts_of(job: Job) -> int:
    """Return the ways in which a job's pair could differ by rounding alone."""
    pair = job.deltas[0].pair if job.deltas else None
    return _possible_casts(pair.tuned.dtype, pair.base.dtype) if pair is not None else 0


_possible_casts = cache(arithmetic.possible_casts)


def check_views(
    plan: Plan, readers: Mapping[str, BlockReader], seen: dict[str, dict[str, bytearray]]
) -> None:
    """Refuse altered deltas that views read, of which one job may have read a part only.

    `seen` has the digests of what was read, by key; the rest is read here.
    """
    views = views_in(delta for job in plan.jobs for delta in job.deltas)
    parts = {part.key: part for view in views for part in view.parts}
    workspace = Workspace()
    for key, part in parts.items():
        stored = [(role, one.spec.numel) for role, one in stored_in([part]) if not one.is_zero]
        leaves = _joined(seen.get(key, {}))
        for index in range(block_count(part.spec.numel)):
            # those of factors are blocks of the stack: any block of the product may read them
            wanted = ((role, at) for role, n in stored for at in
                      ([index] if n == part.spec.numel else range(block_count(n))))  # fmt: skip
            if not all(any(leaves.get(role, b"")[16 * at : 16 * at + 16]) for role, at in wanted):
                part.read(Block(index, part.spec.numel, workspace, readers, leaves), "delta0")
        check_digests([part], {role: fold_digest(leaves.get(role, b"")) for role, _ in stored})


def _joined(seen: Mapping[str, bytearray]) -> dict[str, bytearray]:
    """Return the leaves of a delta's stored parts by role, whoever read them through a view."""
    leaves: dict[str, bytearray] = {}
    for role, held in seen.items():
        mine = leaves.setdefault(f"delta0{role.rpartition(VIEW)[2]}", bytearray(held))
        for at in range(0, len(held), 16):
            if not any(mine[at : at + 16]):
                mine[at : at + 16] = held[at : at + 16]
    return leaves
