"""Running a plan's jobs: one plain thread a core, each reading, computing and writing its blocks.

Begin with `_Run.run_block`: read a block -> decode the delta -> fp32 operator, one rounding ->
write at the planned address (or compare) -> sums and digests. When the last block of a tensor is
done its numbers become a `JobResult`. Results depend on the plan alone: sums are kept by block and
added in block order, digests are trees, output addresses are planned.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from skillvec import operators
from skillvec.errors import FormatError
from skillvec.kernels import STORAGE_DTYPE, Array
from skillvec.operators import Delta
from skillvec.plan import Job, Plan
from skillvec.storage import (
    ITEMSIZE,
    LEAF_NBYTES,
    OutputFile,
    TensorSpec,
    allocate,
    fold_digest,
    leaf_digests,
    read_into,
)
from skillvec.vector import (
    BLOCK_NUMEL,
    EXCEPTION,
    REPLACEMENT,
    PairDelta,
    SideTable,
    SideWriter,
    StoredDelta,
    block_count,
)


@dataclass
class JobResult:
    """What happened to one tensor.

    `digests` by role (point, tuned, base, delta0.., output); `sums` are written^2,
    written * delta and delta^2 for add, delta^2 for subtract, the Gram matrix for gram.
    """

    job: Job
    digests: dict[str, str]
    sums: npt.NDArray[np.float64]
    changed: int = 0
    unrestored: int = 0
    exceptions: int = 0
    replacements: int = 0
    mismatches: int = 0
    first_mismatch: int | None = None
    exact_base: bool = False


class _Workspace:
    """The buffers of one worker, reused for every block."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, slot: str, dtype: str, numel: int) -> Array:
        """Return uninitialised room for `numel` values of a safetensors dtype."""
        nbytes = numel * ITEMSIZE[dtype]
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.size < nbytes:
            buffer = np.frombuffer(allocate(max(nbytes, 2 * BLOCK_NUMEL)), np.uint8)
            self._buffers[slot] = buffer
        return buffer[:nbytes].view(STORAGE_DTYPE[dtype])

    def read(self, slot: str, spec: TensorSpec, block: int) -> Array:
        """Return one block of a tensor, read into the slot's buffer."""
        begin = block * BLOCK_NUMEL
        numel = min(BLOCK_NUMEL, spec.numel - begin)
        values = self.array(slot, spec.dtype, numel)
        read_into(spec.path, spec.start + begin * ITEMSIZE[spec.dtype], values.view(np.uint8).data)
        return values


@dataclass
class _State:
    """What is known so far of one tensor."""

    remaining: int
    sums: npt.NDArray[np.float64]  # a row for each block, added up in order at the end
    counts: npt.NDArray[np.int64]  # in the order of COUNTS
    leaves: dict[str, bytearray] = field(default_factory=dict)
    postponed: list[int] = field(default_factory=list)
    first_mismatch: int | None = None


COUNTS = ("changed", "unrestored", "exceptions", "replacements", "mismatches")
CHANGED, MISMATCHES = 0, 4


def random_bits(seed: int, name: str, block: int, numel: int) -> npt.NDArray[np.uint16]:
    """Return the uint16 that decide stochastic rounding, addressed by seed, tensor and block.

    Philox 4x64 (Salmon et al. 2011) keyed by seed and name, its counter set to the block's
    place, so that neither the worker count nor the order of blocks can change a bit.
    """
    key = np.frombuffer(xxh3_128_digest(f"{seed}:{name}".encode()), "<u8")
    generator = np.random.Philox(key=key, counter=block * (BLOCK_NUMEL // 16))
    return generator.random_raw(-(-numel // 4)).astype("<u8").view("<u2")[:numel]


def run(
    plan: Plan,
    outputs: list[OutputFile],
    *,
    side: SideWriter | None = None,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> list[JobResult]:
    """Run every job of the plan and return their results in the plan's order.

    `progress` is called on the calling thread with the bytes read so far, about ten times a
    second. The first error of a worker stops the others and is raised here, as is Ctrl-C.
    """
    return _Run(plan, outputs, side).run(workers, progress)


class _Run:
    def __init__(self, plan: Plan, outputs: list[OutputFile], side: SideWriter | None) -> None:
        self._plan, self._outputs, self._side = plan, outputs, side
        self._tables = {
            path: SideTable(vector.stored, vector.manifest)
            for path, vector in plan.vectors.items()
            if vector.stored is not None
        }
        self._states: dict[int, _State] = {}
        self._results: list[JobResult | None] = [None] * len(plan.jobs)
        self._lock = threading.Lock()
        self._tasks = self._all_tasks()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._done_nbytes = 0

    def run(self, workers: int, progress: Callable[[int], None] | None) -> list[JobResult]:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    if progress:
                        progress(self._done_nbytes)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error
        return [result for result in self._results if result is not None]

    def _all_tasks(self) -> Iterator[tuple[int, int]]:
        for number, job in enumerate(self._plan.jobs):
            blocks = block_count(job.numel)
            width = {"add": 3, "subtract": 1, "copy": 0, "gram": len(job.deltas) ** 2}
            self._states[number] = _State(
                blocks, np.zeros((blocks, width[job.operator])), np.zeros(5, np.int64)
            )
            if not blocks:
                self._finish(number, _Workspace())
            for block in range(blocks):
                yield number, block

    def _work(self) -> None:
        workspace = _Workspace()
        try:
            while not self._stop.is_set():
                with self._lock:
                    task = next(self._tasks, None)
                if task is None:
                    return
                number, block = task
                self.run_block(number, block, workspace)
                state = self._states[number]
                with self._lock:
                    state.remaining -= 1
                    last = state.remaining == 0
                if last:
                    self._finish(number, workspace)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def run_block(
        self, number: int, block: int, workspace: _Workspace, exact_base: bool | None = None
    ) -> None:
        """Do one block of one job; `exact_base` is set when a postponed block has its turn."""
        job, state = self._plan.jobs[number], self._states[number]
        tally = np.zeros(5, np.int64)
        deltas: list[Delta] = []
        replaced: npt.NDArray[Any] = np.zeros(0, REPLACEMENT)
        for i, source in enumerate(job.deltas):
            delta, replaced = self._delta(job, state, i, source, block, workspace, tally)
            deltas.append(delta)
        out: Array | None = None
        if job.operator == "gram":
            state.sums[block] = operators.gram(deltas).ravel()
        elif job.operator == "subtract":
            out = deltas[0].values
            if self._side is not None:
                self._side.add(job.first_block + block, _exceptions(deltas[0]), replaced)
        else:
            assert job.point is not None
            out = point = workspace.read("point", job.point, block)
            self._digest(state, "point", job.numel, block, point)
            if job.operator == "add":
                if replaced.size and exact_base is None and self._may_restore(job):
                    with self._lock:  # the tensor's digest, known at its end, decides
                        state.postponed.append(block)
                    return
                out = workspace.array("out", job.out_dtype, point.size)
                self._add(job, block, point, deltas[0], out)
                if exact_base:
                    if replaced.size and int(replaced["bits"].max()) >> 8 * out.itemsize:
                        raise FormatError(f"{job.name}: a replacement wider than {job.out_dtype}")
                    pattern = operators.bit_pattern(out)
                    pattern[replaced["position"]] = replaced["bits"].astype(pattern.dtype)
                if job.expected is None:
                    sums = operators.moments(point, job.point.dtype, deltas[0], out, job.out_dtype)
                    tally[CHANGED] = sums.changed
                    state.sums[block] = sums[1:]
        if out is not None and job.expected is not None:
            expected = workspace.read("expected", job.expected, block)
            self._compare(state, block, out, expected, tally)
        elif out is not None and job.output is not None:
            file, start = job.output
            offset = start + block * BLOCK_NUMEL * out.itemsize
            self._outputs[file].write(offset, out.view(np.uint8).data)
            self._digest(state, "output", job.numel, block, out)
        with self._lock:
            state.counts += tally
            self._done_nbytes += job.nbytes_read * min(BLOCK_NUMEL, job.numel) // job.numel

    def _delta(
        self,
        job: Job,
        state: _State,
        i: int,
        source: StoredDelta | PairDelta,
        block: int,
        workspace: _Workspace,
        tally: npt.NDArray[np.int64],
    ) -> tuple[Delta, npt.NDArray[Any]]:
        """Return one block of a delta, and the replacements that go with it."""
        if isinstance(source, StoredDelta):
            values = workspace.read(f"delta{i}", source.spec, block)
            self._digest(state, f"delta{i}", job.numel, block, values)
            table = self._tables[source.spec.path]
            row = source.first_block + block
            exceptions = table.exceptions(row, values.size)
            delta = Delta(
                values,
                source.spec.dtype,
                np.ascontiguousarray(exceptions["position"]),
                np.ascontiguousarray(exceptions["value"]),
            )
            return delta, table.replacements(row, values.size)
        tuned = workspace.read("tuned", source.tuned, block)
        base = workspace.read("base", source.base, block)
        self._digest(state, "tuned", job.numel, block, tuned)
        self._digest(state, "base", job.numel, block, base)
        found = operators.subtract(
            tuned,
            source.tuned.dtype,
            base,
            source.base.dtype,
            source.dtype,
            source.exact,
            workspace.array(f"delta{i}", source.dtype, tuned.size),
            workspace.array("scratch", "U16", tuned.size),
            job.operator == "subtract",
        )
        if job.operator == "subtract":
            counts = found.changed, found.unrestored, found.delta.positions.size
            tally[:4] = (*counts, found.replaced.size)
            state.sums[block] = found.delta_sq
        records = np.zeros(found.replaced.size, REPLACEMENT)
        records["position"], records["bits"] = found.replaced, found.bits
        return found.delta, records

    def _add(self, job: Job, block: int, point: Array, delta: Delta, out: Array) -> None:
        assert job.point is not None
        random16 = None
        if self._plan.rounding == "stochastic":
            random16 = random_bits(self._plan.seed, job.name, block, point.size)
        operators.add(point, job.point.dtype, delta, self._plan.lam, job.out_dtype, out, random16)

    def _may_restore(self, job: Job) -> bool:
        """Return whether replacements hold here, if the target turns out to be the exact base."""
        return self._plan.lam == 1.0 and job.out_dtype == job.tuned_dtype

    def _compare(
        self, state: _State, block: int, out: Array, expected: Array, tally: npt.NDArray[np.int64]
    ) -> None:
        differs = operators.bit_pattern(out) != operators.bit_pattern(expected)
        count = int(np.count_nonzero(differs))
        if count:
            tally[MISMATCHES] = count
            at = block * BLOCK_NUMEL + int(np.argmax(differs))
            with self._lock:
                first = state.first_mismatch
                state.first_mismatch = at if first is None else min(first, at)

    def _digest(self, state: _State, role: str, numel: int, block: int, values: Array) -> None:
        per_block = -(-BLOCK_NUMEL * values.itemsize // LEAF_NBYTES) * 16
        leaves = state.leaves.get(role)
        if leaves is None:  # setdefault is atomic, a lock here would be taken thrice a block
            total = -(-numel * values.itemsize // LEAF_NBYTES) * 16
            leaves = state.leaves.setdefault(role, bytearray(total))
        digests = leaf_digests(values.view(np.uint8).data)
        leaves[block * per_block : block * per_block + len(digests)] = digests

    def _finish(self, number: int, workspace: _Workspace) -> None:
        """Settle a tensor whose blocks are all read: postponed blocks, sums, digests, checks."""
        job, state = self._plan.jobs[number], self._states[number]
        roles: dict[str, Any] = {"point": job.point, "output": job.output}
        roles |= {"tuned": job.deltas, "base": job.deltas} if job.operator == "subtract" else {}
        point, base = (fold_digest(state.leaves.get(role, b"")) for role in ("point", "base"))
        stored = bool(job.deltas) and isinstance(job.deltas[0], StoredDelta)
        exact_base = job.operator == "add" and point == (job.base_digest if stored else base)
        for block in sorted(state.postponed):
            self.run_block(number, block, workspace, exact_base)
        digests = {role: fold_digest(leaves) for role, leaves in state.leaves.items()}
        for role, present in roles.items():
            if present:  # an empty tensor has no blocks, but a digest
                digests.setdefault(role, fold_digest(b""))
        for i, expected in enumerate(job.delta_digests):
            if expected is not None and digests.get(f"delta{i}", fold_digest(b"")) != expected:
                raise FormatError(
                    f"{job.deltas[i].spec.path}: {job.deltas[i].spec.name} differs from its digest"
                    " in the manifest: the file was altered"
                )
        self._results[number] = JobResult(
            job,
            digests,
            state.sums.sum(axis=0),
            **{key: int(count) for key, count in zip(COUNTS, state.counts, strict=True)},
            first_mismatch=state.first_mismatch,
            exact_base=exact_base,
        )
        del self._states[number]


def _exceptions(delta: Delta) -> npt.NDArray[Any]:
    records = np.zeros(delta.positions.size, EXCEPTION)
    records["position"], records["value"] = delta.positions, delta.exact
    return records
