"""Running a plan's jobs: one plain thread a core, each reading, computing and writing its blocks.

Begin with `_Run.run_block`: read a block -> decode the delta -> fp32 operator, one rounding ->
write at the planned address (or compare) -> sums and digests. When the last block of a tensor is
done its numbers become a `JobResult`. Results depend on the plan alone: sums are kept by block and
added in block order, digests are trees, output addresses are planned.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from skillvec import operators
from skillvec.blocks import NO_RECORDS, VIEW, Block, Workspace
from skillvec.codecs import encode_block
from skillvec.deltas import ComputedDelta, MixDelta, PairDelta, key_of, views_in
from skillvec.errors import FormatError, IncompatibleError
from skillvec.kernels import FLOATS, Array, narrow, widen
from skillvec.measures import block_sums, is_sampled, layout, masks_nbytes, sample
from skillvec.operators import Delta
from skillvec.patch import POSITIONS, positions_dtype
from skillvec.plan import Job, Plan
from skillvec.sources import Gatherer, gathering
from skillvec.storage import OutputFile, RowWriter, fold_digest
from skillvec.vectorfile import (
    BLOCK_NUMEL,
    EXCEPTION,
    NO_DIGEST,
    BlockReader,
    StoredDelta,
    block_count,
    block_digest,
    readers_of,
)

COUNTS = (
    "changed", "unrestored", "exceptions", "replacements", "mismatches", "tuned_nonfinite",
    "base_nonfinite", "target_nonfinite", "output_nonfinite", "lost",
)  # fmt: skip
CHANGED, MISMATCHES, OF_TUNED, OF_TARGET, LOST_COUNT = map(
    COUNTS.index, ("changed", "mismatches", "tuned_nonfinite", "target_nonfinite", "lost")
)


@dataclass
class JobResult:
    """What happened to one tensor.

    `digests` by role (point, tuned, base, delta0.., output); `sums` are written^2,
    written * delta and delta^2 for add, delta^2 for store, those of measures.layout for compare.
    `found` is what an operator measured. NaN and infinities are counted a side; `lost` are values
    that only they can explain: without a finite delta, or not finite in the output and so neither
    in the target nor left alone. `casts` are the bits of operators.CASTS that hold for a pair.
    """

    job: Job
    digests: dict[str, str]
    sums: npt.NDArray[np.float64]
    changed: int = 0
    unrestored: int = 0
    exceptions: int = 0
    replacements: int = 0
    mismatches: int = 0
    tuned_nonfinite: int = 0
    base_nonfinite: int = 0
    target_nonfinite: int = 0
    output_nonfinite: int = 0
    lost: int = 0
    casts: int = 0
    first_mismatch: int | None = None
    exact_base: bool = False
    found: Any = None


KEPT = (*COUNTS, "casts", "first_mismatch", "exact_base")


def to_line(result: JobResult) -> dict[str, Any]:
    """Return what a journal keeps of a result."""
    line = {key: getattr(result, key) for key in KEPT}
    return line | {"digests": result.digests, "sums": result.sums.tolist()}


def from_line(job: Job, line: Mapping[str, Any]) -> JobResult:
    """Return the result of a job of which a journal has a line."""
    kept = {key: line[key] for key in (*KEPT, "digests")}
    return JobResult(job, sums=np.array(line["sums"]), **kept)


@dataclass
class _State:
    """What is known so far of one tensor."""

    remaining: int
    sums: npt.NDArray[np.float64]  # a row for each block, added up in order at the end
    counts: npt.NDArray[np.int64]  # in the order of COUNTS
    casts: int = 0
    leaves: dict[str, bytearray] = field(default_factory=dict)
    assumed: dict[int, Array] = field(default_factory=dict)  # blocks that a guess decided: counts
    first_mismatch: dict[int, int] = field(default_factory=dict)  # by block
    measured: dict[int, Array] = field(default_factory=dict)  # by block


def random_bits(seed: int, name: str, block: int, numel: int) -> npt.NDArray[np.uint16]:
    """Return the uint16 that decide stochastic rounding, addressed by seed, tensor and block.

    Philox 4x64 (Salmon et al. 2011) keyed by seed and name, its counter set to the block's
    place, so that neither the worker count nor the order of blocks can change a bit.
    """
    key = np.frombuffer(xxh3_128_digest(f"{seed}:{name}".encode()), "<u8")
    generator = np.random.Philox(key=key, counter=block * (BLOCK_NUMEL // 16))
    return generator.random_raw(-(-numel // 4)).astype("<u8").view("<u2")[:numel]


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
        return _Run(plan, outputs, writer, finished).run(self.workers, progress)


def measure(
    plan: Plan, number: int, engine: Engine, progress: Callable[[int], None] | None = None
) -> Plan:
    """Run pass `number` of the operators that have so many; return the plan with what they found.

    Counts are added up as they come, sums of floats in the order of blocks and jobs.
    """
    used = [m for job in plan.jobs for m in job.deltas if isinstance(m, MixDelta)]
    # a scope of all tensors counts those that have no job as well, each once, in its own order
    wide = [mix for mix in plan.mixes if not mix.per_tensor]
    each = {(mix.scope, mix.spec.name): mix for mix in (*wide, *used)}
    mixes = [m for m in each.values() if m.operator.passes(m.parameters) > number]
    if not mixes:
        return plan
    jobs = [
        Job(m.spec.name, "measure", m.spec.numel, deltas=(m,), first_block=number) for m in mixes
    ]
    found = engine.run(replace(plan, jobs=jobs), progress=progress or (lambda done_nbytes: None))
    known: dict[str, Any] = {}
    totals = found.totals
    for result in found.results:
        mix = result.job.deltas[0]
        assert isinstance(mix, MixDelta)
        if mix.per_tensor:
            known[mix.scope] = result.found
        elif result.found is not None:
            total = totals.get(mix.scope)
            totals[mix.scope] = result.found if total is None else total + result.found
    for mix in mixes:
        if mix.scope in totals:
            total = totals.pop(mix.scope)
            known[mix.scope] = mix.operator.settle(
                number, total, mix.weights, mix.parameters, mix.known
            )

    def informed(delta: Any) -> Any:
        if not isinstance(delta, MixDelta):
            return delta
        return delta._replace(known=known.get(delta.scope, delta.known))

    jobs = [replace(job, deltas=tuple(map(informed, job.deltas))) for job in plan.jobs]
    return replace(plan, jobs=jobs, mixes=list(map(informed, plan.mixes)))


class _Run:
    def __init__(
        self,
        plan: Plan,
        outputs: Sequence[OutputFile],
        writer: RowWriter | None,
        finished: Callable[[int, JobResult], None],
    ) -> None:
        self._plan, self._outputs, self._writer = plan, outputs, writer
        self._finished = finished
        self._readers = readers_of(plan.vectors)
        self.totals: dict[str, Array] = {}  # counts of measuring passes by scope
        # of what views read, by role and tensor: digests, and where values are not finite
        self._seen: dict[str, dict[str, bytearray]] = {}
        self._holes: set[str] = set()
        self._gatherer = Gatherer(_most_turned(plan))
        self._states: dict[int, _State] = {}
        self._results: list[JobResult | None] = [None] * len(plan.jobs)
        self._lock = threading.Lock()
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
        return Found([result for result in self._results if result is not None], self.totals)

    def _halt(self) -> None:
        self._stop.set()
        if self._writer is not None:
            self._writer.stop()

    def _all_tasks(self) -> Iterator[tuple[int, int]]:
        for number, job in enumerate(self._plan.jobs):
            blocks = block_count(job.numel)
            width = {"add": 3, "store": 1}.get(job.operator, 0)
            if job.operator == "compare" and self._plan.request is not None:
                width = layout(self._plan.request).itemsize // 8
            counts = np.zeros(len(COUNTS), np.int64)
            casts = _casts_of(job)
            self._states[number] = _State(blocks, np.zeros((blocks, width)), counts, casts)
            if not blocks:
                self._finish(number, Workspace())
            for block in range(blocks):
                yield number, block

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
            number, block = task
            self.run_block(number, block, workspace)
            if self._stop.is_set():  # a stopped writer has taken nothing
                return
            progress(self._done_nbytes)
            state = self._states[number]
            with self._lock:
                state.remaining -= 1
                last = state.remaining == 0
            if last:
                self._finish(number, workspace)

    def run_block(
        self, number: int, index: int, workspace: Workspace, exact_base: bool | None = None
    ) -> None:
        """Do one block of one job; `exact_base` is set when it is known and was guessed wrong."""
        job, state = self._plan.jobs[number], self._states[number]
        block = Block(
            index, job.numel, workspace, self._readers, state.leaves, job.operator == "store",
            self._seen, self._holes, casts=state.casts,
        )  # fmt: skip
        tally = np.zeros(len(COUNTS), np.int64)
        if job.operator == "measure":
            self._measure(job, state, block)
        elif job.operator == "compare":
            state.sums[index] = self._compared(job, block)
        elif job.operator == "same":
            deltas = [block.delta(delta, f"delta{i}")[0] for i, delta in enumerate(job.deltas)]
            one, other = (_narrowed(delta, deltas[1].dtype, job.name) for delta in deltas)
            self._compare(state, block, one, other, tally)
        elif job.operator == "store":
            self._store(job, state, block, tally)
        elif job.operator == "list":
            self._list(job, block, tally)
        else:
            self._write(job, state, block, tally, exact_base)
        tally[OF_TUNED:OF_TARGET] = block.tuned_nonfinite, block.base_nonfinite
        tally[LOST_COUNT] = block.lost
        with self._lock:
            state.counts += tally
            if block.subtracted is not None:
                state.casts &= block.subtracted.casts
            if exact_base is None:
                self._done_nbytes += job.nbytes_read * block.size // job.numel

    def _write(
        self,
        job: Job,
        state: _State,
        block: Block,
        tally: npt.NDArray[np.int64],
        exact_base: bool | None,
    ) -> None:
        """Add or copy one block of the target and write it, or compare it with what is there.

        Whether the target is the exact base is known when its digest is, at the end of the tensor;
        until then it is guessed, and blocks to which that makes a difference are noted.
        """
        assert job.point is not None
        is_base = self._plan.expects_base if exact_base is None else exact_base
        added = [block.delta(delta, "delta0") for delta in job.deltas]  # one, or none for a copy
        delta, replaced = added[0] if added else (None, NO_RECORDS)
        out = point = block.read("point", job.point)
        block.digest("point", point)
        restores = replaced.size > 0 and self._may_restore(job)
        if restores and exact_base is None:
            state.assumed[block.index] = tally
        restores &= is_base
        if delta is not None and (
            restores or not delta.is_zero or job.out_dtype != job.point.dtype
        ):
            out = block.array("out", job.out_dtype)
            self._add(job, block, point, delta, out)
            if restores:
                _restore(job, out, replaced)
            if job.expected is None:
                sums = operators.moments(point, job.point.dtype, delta, out, job.out_dtype)
                tally[CHANGED] = sums.changed
                state.sums[block.index] = sums[1:]
        if job.point.dtype in FLOATS:
            self._count_nonfinite(job, block, point, delta, out, tally, restores)
        if job.expected is not None:
            expected = block.read("expected", job.expected)
            if job.expected_digest is not None:
                block.digest("expected", expected)
            self._compare(state, block, out, expected, tally)
        elif job.output is not None:
            file, start = job.output
            self._outputs[file].write(start + block.begin * out.itemsize, out.view(np.uint8).data)
            block.digest("output", out)

    def _compared(self, job: Job, block: Block) -> Array:
        """Return the sums of one block of several deltas."""
        assert self._plan.request is not None
        deltas: list[Delta] = []
        weights: list[tuple[Array, str] | None] = []
        sampled, point = is_sampled(block.begin), None
        if job.point is not None and sampled:
            point = sample(block.read("point", job.point)), job.point.dtype
        for i, source in enumerate(job.deltas):
            deltas.append(block.delta(source, f"delta{i}")[0])
            if job.point is not None:
                weights.append(point)
            elif (
                isinstance(source, PairDelta) and sampled
            ):  # copied: the next pair reads into the same buffer
                dtype = source.base.dtype
                weights.append((sample(block.array("base", dtype)).copy(), dtype))
            else:
                weights.append(None)
        masks = block.workspace.array("masks", "U8", masks_nbytes(len(deltas), block.size))
        return block_sums(
            deltas, weights, self._plan.request, job.name, job.numel, block.begin, masks
        )

    def _measure(self, job: Job, state: _State, block: Block) -> None:
        """Add one block to what an operator measures: counts to its scope, floats by block."""
        mix = job.deltas[0]
        assert isinstance(mix, MixDelta)
        total: Array | None = None
        for place, wide in block.pieces(mix, "delta0"):
            found = mix.operator.measure(
                job.first_block, wide, mix.weights, mix.parameters, place, mix.known
            )
            total = found if total is None else total + found
        assert total is not None
        with self._lock:
            if total.dtype.kind == "f":
                state.measured[block.index] = total
            else:
                held = self.totals.get(mix.scope)
                self.totals[mix.scope] = total if held is None else held + total

    def _store(self, job: Job, state: _State, block: Block, tally: npt.NDArray[np.int64]) -> None:
        """Encode one block and give it to the writer in its turn."""
        assert self._writer is not None
        delta, replaced = block.delta(job.deltas[0], "delta0")
        found = block.subtracted
        if found is not None:
            counts = found.changed, found.unrestored, delta.positions.size, replaced.size
            tally[: len(counts)] = counts
            state.sums[block.index] = found.delta_sq
        elif isinstance(job.deltas[0], MixDelta | ComputedDelta):
            tally[CHANGED] = np.count_nonzero(delta.values)
            state.sums[block.index] = operators.squared(delta)
        values = delta.values
        if delta.dtype != job.out_dtype:
            values = _narrowed(delta, job.out_dtype, job.name)
        encoded = encode_block(values, job.codec)
        records = _exceptions(delta).view(np.uint8), replaced.view(np.uint8)
        row = job.first_block + block.index
        self._writer.add(row, (encoded.payload, encoded.bitmap, *records))
        block.stamp("output", block_digest(encoded))

    def _list(self, job: Job, block: Block, tally: npt.NDArray[np.int64]) -> None:
        """List what base + delta changes; that it is the exact base shows when it is whole."""
        assert job.point is not None and self._writer is not None
        delta, replaced = block.delta(job.deltas[0], "delta0")
        point = block.read("point", job.point)
        block.digest("point", point)
        out = block.array("out", job.out_dtype)
        operators.add(point, job.point.dtype, delta, 1.0, job.out_dtype, out)
        _restore(job, out, replaced)
        self._count_nonfinite(job, block, point, delta, out, tally, replaced.size > 0)
        changed = np.flatnonzero(operators.bit_pattern(out) != operators.bit_pattern(point))
        positions = (changed + block.begin).astype(POSITIONS[positions_dtype(job.numel)])
        pieces = positions.view(np.uint8), out[changed].view(np.uint8)
        self._writer.add(job.first_block + block.index, pieces)

    def _count_nonfinite(
        self, job: Job, block: Block, point: Array, delta: Delta | None, out: Array,
        tally: npt.NDArray[np.int64], restored: bool,
    ) -> None:  # fmt: skip
        """Count NaN and infinities of target and output; note those that the delta brought."""
        assert job.point is not None
        lam = self._plan.lam
        found = operators.nonfinite_of(
            point, job.point.dtype, delta, lam, out, job.out_dtype, restored
        )
        tally[OF_TARGET:LOST_COUNT] = found.target, found.output
        if found.lost.size:
            block.lose(found.lost)

    def _add(self, job: Job, block: Block, point: Array, delta: Delta, out: Array) -> None:
        assert job.point is not None
        random16 = None
        if self._plan.rounding == "stochastic":
            random16 = random_bits(self._plan.seed, job.name, block.index, point.size)
        operators.add(point, job.point.dtype, delta, self._plan.lam, job.out_dtype, out, random16)

    def _may_restore(self, job: Job) -> bool:
        """Return whether replacements hold here, if the target turns out to be the exact base."""
        return self._plan.lam == 1.0 and job.out_dtype == job.tuned_dtype

    def _compare(
        self,
        state: _State,
        block: Block,
        out: Array,
        expected: Array,
        tally: npt.NDArray[np.int64],
    ) -> None:
        differs = operators.bit_pattern(out) != operators.bit_pattern(expected)
        count = int(np.count_nonzero(differs))
        if count:
            tally[MISMATCHES] = count
            state.first_mismatch[block.index] = block.begin + int(np.argmax(differs))

    def _finish(self, number: int, workspace: Workspace) -> None:
        """Settle a tensor whose blocks are all read: wrong guesses, sums, digests, checks."""
        job, state = self._plan.jobs[number], self._states[number]
        roles: dict[str, Any] = {"point": job.point, "output": job.output}
        if job.operator == "store":
            roles["output"] = True
            if isinstance(job.deltas[0], PairDelta):
                roles |= {"tuned": True, "base": True}
        point, base = (fold_digest(state.leaves.get(role, b"")) for role in ("point", "base"))
        pair = bool(job.deltas) and isinstance(job.deltas[0], PairDelta)
        exact_base = job.operator in ("add", "list") and point == (
            base if pair else job.base_digest
        )
        if exact_base != self._plan.expects_base:  # not as guessed: these blocks once more
            for block, counts in sorted(state.assumed.items()):
                state.counts -= counts
                state.sums[block] = 0
                state.first_mismatch.pop(block, None)
                self.run_block(number, block, workspace, exact_base)
        digests = {role: fold_digest(leaves) for role, leaves in state.leaves.items()}
        for role, present in roles.items():
            if present:  # an empty tensor has no blocks, but a digest
                digests.setdefault(role, fold_digest(b""))
        _check_digests(job, digests)
        found = self._measured(job, state) if job.operator == "measure" else None
        self._results[number] = result = JobResult(
            job,
            digests,
            state.sums.sum(axis=0),
            **{key: int(count) for key, count in zip(COUNTS, state.counts, strict=True)},
            casts=state.casts,
            first_mismatch=min(state.first_mismatch.values(), default=None),
            exact_base=exact_base,
            found=found,
        )
        del self._states[number]
        self._finished(number, result)

    def _measured(self, job: Job, state: _State) -> Any:
        """Return a tensor's sums; settled, where the tensor is the scope."""
        mix = job.deltas[0]
        assert isinstance(mix, MixDelta)
        total = None
        for block in sorted(state.measured):
            total = state.measured[block] if total is None else total + state.measured[block]
        if not mix.per_tensor:
            return total
        if total is None:  # pop is atomic; empty tensors come here with the lock held
            total = self.totals.pop(mix.scope, None)
        if total is None:  # an empty tensor
            return None
        return mix.operator.settle(job.first_block, total, mix.weights, mix.parameters, mix.known)


def _most_turned(plan: Plan) -> int:
    """Return how many groups of turned views may be kept: a few of each side of the widest job."""
    sides = (
        2 + 2 * sum(len(getattr(delta, "sources", (delta,))) for delta in job.deltas)
        for job in plan.jobs
    )
    return 2 * max(sides, default=0)


def _casts_of(job: Job) -> int:
    """Return the ways in which a job's pair could differ by rounding alone."""
    pair = job.deltas[0] if job.deltas else None
    if not isinstance(pair, PairDelta):
        return 0
    return operators.possible_casts(pair.tuned.dtype, pair.base.dtype)


def _check_digests(job: Job, digests: dict[str, str]) -> None:
    """Refuse stored deltas whose bytes are not those that the manifest speaks of."""
    for role, source in _stored_parts(job):
        if digests.get(role, NO_DIGEST) != source.digest:
            raise FormatError(
                f"{source.spec.path}: {source.spec.name} differs from its digest in the"
                " manifest: the file was altered"
            )


def check_views(
    plan: Plan, readers: Mapping[str, BlockReader], seen: dict[str, dict[str, bytearray]]
) -> None:
    """Refuse altered deltas that views read, of which one job may have read a part only.

    `seen` has the digests of what was read, by key; the rest is read here.
    """
    views = views_in(delta for job in plan.jobs for delta in job.deltas)
    parts = {key_of(part): part for view in views for part in view.view.sources}
    workspace = Workspace()
    for key, part in parts.items():
        job = Job(part.spec.name, "view", part.spec.numel, deltas=(part,))
        stored = [role for role, delta in _stored_parts(job) if delta.codec != "zero"]
        leaves = _joined(seen.get(key, {}))
        for index in range(block_count(job.numel)):
            at = slice(16 * index, 16 * index + 16)
            if not all(any(leaves.get(role, b"")[at]) for role in stored):  # no view needed it
                block = Block(index, job.numel, workspace, readers, leaves)
                block.delta(part, "delta0")
        _check_digests(job, {role: fold_digest(leaves.get(role, b"")) for role in stored})


def _joined(seen: Mapping[str, bytearray]) -> dict[str, bytearray]:
    """Return the leaves of a delta's stored parts by role, whoever read them through a view."""
    leaves: dict[str, bytearray] = {}
    for role, held in seen.items():
        mine = leaves.setdefault(f"delta0{role.rpartition(VIEW)[2]}", bytearray(held))
        for at in range(0, len(held), 16):
            if not any(mine[at : at + 16]):
                mine[at : at + 16] = held[at : at + 16]
    return leaves


def _stored_parts(job: Job) -> Iterator[tuple[str, StoredDelta]]:
    """Yield the stored deltas of a job with their roles."""
    for i, delta in enumerate(job.deltas):
        parts = {f"delta{i}": delta}
        if isinstance(delta, MixDelta):
            parts = {f"delta{i}.{n}": part for n, part in enumerate(delta.sources)}
        yield from ((role, part) for role, part in parts.items() if isinstance(part, StoredDelta))


def _restore(job: Job, out: Array, replaced: npt.NDArray[Any]) -> None:
    """Set the values that no difference restores."""
    if replaced.size and int(replaced["bits"].max()) >> 8 * out.itemsize:
        raise FormatError(f"{job.name}: a replacement wider than {job.out_dtype}")
    pattern = operators.bit_pattern(out)
    pattern[replaced["position"]] = replaced["bits"].astype(pattern.dtype)


def _narrowed(delta: Delta, dtype: str, name: str) -> Array:
    """Round to a storage dtype; its zeros are positive, and what it cannot hold is refused."""
    rounded = narrow(delta.wide(0, delta.values.size), dtype)
    wide = widen(rounded, dtype)
    if not np.isfinite(wide).all():
        raise IncompatibleError(f"{name}: values beyond the range of {dtype}")
    rounded[wide == 0] = 0
    return rounded


def _exceptions(delta: Delta) -> npt.NDArray[Any]:
    records = np.zeros(delta.positions.size, EXCEPTION)
    records["position"], records["value"] = delta.positions, delta.exact
    return records
