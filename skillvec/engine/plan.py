"""What a plan is made of: jobs, files, lines of the ledger; and what comes of a job.

A plan is plain picklable data: addresses, names and numbers, no tensors and no closures. It can be
printed (`--dry-run`), handed to any engine, and holds the ledger of every tensor that needs no job.
All that is done to one tensor is a job. A kind of job is a class below `Job` that says how wide its
sums are, which digests it gives, what a block of it does and what a ledger calls it; an engine asks
nothing else, so that a new kind is a new class.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from skillvec.files.file import file_nbytes
from skillvec.files.held import HeldFiles, HeldRows
from skillvec.files.output_file import OutputFile
from skillvec.files.rows import RowWriter
from skillvec.files.tensors import Source, files_of
from skillvec.ops import moments, special
from skillvec.ops.block import block_count
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import Array
from skillvec.ops.statistics import Request
from skillvec.report import Line
from skillvec.vectors.block_reader import Block
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.deltas.mix import MixDelta
from skillvec.vectors.displacement import ledger_line
from skillvec.vectors.reader import VectorFile

COUNTS = (
    "changed", "unrestored", "exceptions", "replacements", "mismatches", "tuned_nonfinite",
    "base_nonfinite", "target_nonfinite", "output_nonfinite", "lost", "ranked",
)  # fmt: skip
CHANGED, MISMATCHES, OF_TUNED, OF_TARGET, LOST_COUNT, RANKED = map(
    COUNTS.index, ("changed", "mismatches", "tuned_nonfinite", "target_nonfinite", "lost", "ranked")
)


@dataclass(frozen=True, eq=False, repr=False)
class Job(ABC):
    """All the work on one tensor: what it reads, and where the result belongs.

    `point` is a tensor of the target, `output` a file number and an absolute offset; `expected` is
    what the result has to be, where it is compared and not written.
    """

    status: ClassVar[str] = ""  # what a ledger says of the tensor
    has_rows: ClassVar[bool] = False  # whether its blocks are rows, which a writer places in order

    name: str
    numel: int
    _: KW_ONLY
    out_dtype: str = ""
    point: Source | None = None
    deltas: tuple[DeltaSource, ...] = ()
    output: tuple[int, int] | None = None
    expected: Source | None = None
    expected_digest: str | None = None  # where differing values are announced
    base_digest: str | None = None  # of the tensor the stored delta was taken from
    note: str = ""

    @abstractmethod
    def run(self, task: "Task") -> None:
        """Do one block: read, compute, write or compare; note sums and counts in the task."""

    def width(self, request: Request | None) -> int:
        """Return how many sums a block of it gives."""
        return 0

    @property
    def roles(self) -> tuple[str, ...]:
        """What it gives digests of even where the tensor is empty."""
        return ("point",) * (self.point is not None) + ("output",) * (self.output is not None)

    @property
    def rows(self) -> range:
        """The rows of a writer that are its blocks."""
        return range(0)

    @property
    def knows_base(self) -> bool:
        """Whether digests will tell if `point` is the tensor that the delta was taken from."""
        return False

    def is_exact_base(self, point: str, base: str) -> bool:
        """Return whether `point` is that tensor; `base` is the digest of a pair's base."""
        return False

    def settle(self, common: "Common", state: "State") -> Any:
        """Return what it has found besides sums and counts, when all its blocks are done."""
        return None

    @property
    def nbytes_read(self) -> int:
        total = 0
        for side in (self.point, self.expected, *self.deltas):
            total += 0 if side is None else side.nbytes
        return total

    def files(self) -> Iterator[str]:
        """Yield the files that its tensors lie in, perhaps one more than once; no vector files."""
        for side in (self.point, self.expected):
            if side is not None:
                yield from files_of(side)
        for delta in self.deltas:
            yield from delta.files()


@dataclass(frozen=True, eq=False, repr=False)
class RowJob(Job):
    """A job whose result goes to a writer, block by block; its first row there is `first_block`."""

    has_rows: ClassVar[bool] = True

    first_block: int = field(default=0, kw_only=True)

    @property
    def rows(self) -> range:
        return range(self.first_block, self.first_block + block_count(self.numel))


@dataclass(frozen=True, eq=False, repr=False)
class OutputPlan:
    """A file to write: its name inside the output, size in bytes and (for models) header."""

    name: str
    nbytes: int
    header: bytes = b""


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Jobs in the order of their output, files, and lines of the ledger that need no work."""

    verb: str
    jobs: Sequence[Job]
    outputs: list[OutputPlan] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)  # side files: source, name
    ledger: list[dict[str, Any]] = field(default_factory=list)
    vectors: list[VectorFile] = field(default_factory=list)  # read from
    mixes: list[MixDelta] = field(default_factory=list)  # of whole combinations
    lam: float = 1.0
    rounding: str = "nearest"
    seed: int = 0
    verdict: str = ""
    warnings: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # files to write: index, changed config
    left_behind: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    layout: Mapping[str, str] = field(default_factory=dict)  # how tensors of another layout fit
    bound_nbytes: int = 0  # the most that a vector takes
    sure_nbytes: int = 0  # of them, what it takes whatever its values are
    request: Request | None = None  # what compare measures

    @property
    def expects_base(self) -> bool:
        """Whether the target is likely to be the vector's exact base; its digests decide."""
        return self.verdict in ("", "exact base")  # verify proves a vector on its base

    @property
    def nbytes_read(self) -> int:
        return sum(job.nbytes_read for job in self.jobs) + sum(
            file_nbytes(source) for source, _ in self.copies
        )

    @property
    def nbytes_written(self) -> int:
        """The most that is written."""
        outputs = self.bound_nbytes + sum(output.nbytes for output in self.outputs)
        outputs += sum(len(text.encode()) for text in self.texts.values())
        return outputs + sum(file_nbytes(source) for source, _ in self.copies)

    @property
    def least_nbytes(self) -> int:
        """The least that is written."""
        return self.nbytes_written - self.bound_nbytes + self.sure_nbytes

    def informed(self, known: Mapping[Any, Any]) -> "Plan":
        """Return it with what measuring passes have found by now."""
        told = [
            replace(job, deltas=tuple(delta.informed(known) for delta in job.deltas))
            for job in self.jobs
        ]
        return replace(self, jobs=told, mixes=[mix.informed(known) for mix in self.mixes])

    def files(self) -> list[str]:
        """Return every file that is read, each once: vectors, tensors, side files."""
        held = [file for vector in self.vectors for file in vector.files]
        held += [file for job in self.jobs for file in job.files()]
        held += [file for mix in self.mixes for file in mix.files()]
        return list(dict.fromkeys(held + [source for source, _ in self.copies]))


# ------------------------------------------------------------------------------ while a plan runs


@dataclass(eq=False, repr=False)
class Common:
    """What the jobs of one run have in common; `totals` are counts of measuring passes by scope."""

    plan: Plan
    outputs: Sequence[OutputFile] | HeldFiles
    writer: RowWriter | HeldRows | None
    totals: dict[str, Array] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True, eq=False, repr=False)
class State:
    """What is known so far of one tensor."""

    remaining: int  # blocks
    sums: npt.NDArray[np.float64]  # a row for each block, added up in order at the end
    counts: npt.NDArray[np.int64]  # in the order of COUNTS
    casts: int = 0
    leaves: dict[str, bytearray] = field(default_factory=dict)
    assumed: dict[int, Array] = field(default_factory=dict)  # blocks that a guess decided: counts
    first_mismatch: dict[int, int] = field(default_factory=dict)  # by block
    measured: dict[int, Array] = field(default_factory=dict)  # by block, or by pair


@dataclass(slots=True, eq=False, repr=False)
class Task:
    """One block of a job, and what it counts: `tally` is in the order of COUNTS.

    Whether the target is the exact base is known when its digest is, at the end of the tensor.
    Until then `exact_base` is None, and where a guess decides a block its tally goes to
    `state.assumed`: a wrong guess is done again, with what is known.
    """

    common: Common
    state: State
    block: Block
    tally: npt.NDArray[np.int64]
    exact_base: bool | None = None

    def compare(self, out: Array, expected: Array) -> None:
        """Count the values that differ bit for bit, and note the first."""
        differs = special.bit_pattern(out) != special.bit_pattern(expected)
        count = int(np.count_nonzero(differs))
        if count:
            block = self.block
            self.tally[MISMATCHES] = count
            self.state.first_mismatch[block.index] = block.begin + int(np.argmax(differs))

    def count_nonfinite(
        self, job: Job, point: Array, delta: Delta | None, out: Array, restored: bool = False
    ) -> None:
        """Count NaN and infinities of target and output; note those that the delta brought."""
        assert job.point is not None
        dtype = job.point.dtype
        found = moments.nonfinite_of(
            point, dtype, delta, self.common.plan.lam, out, job.out_dtype or dtype, restored
        )
        self.tally[OF_TARGET:LOST_COUNT] = found.target, found.output
        if found.lost.size:
            self.block.lose(found.lost)


@dataclass(slots=True, eq=False, repr=False)
class JobResult:
    """What happened to one tensor.

    `digests` by role (point, tuned, base, delta0.., output); `sums` are written^2,
    written * delta and delta^2 for add, delta^2 for store, those of statistics.layout for compare.
    `found` is what an operator measured. NaN and infinities are counted a side; `lost` are values
    that only they can explain: without a finite delta, or not finite in the output and so neither
    in the target nor left alone. `ranked` are blocks in a form of schema 2. `casts`
    are the bits of arithmetic.CASTS that hold for a pair.
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
    ranked: int = 0
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


def job_line(job: Job, status: str) -> Line:
    """Return the ledger line of a tensor that has a job."""
    side = job.point or job.deltas[0].spec
    line = ledger_line(side, status, job.note)
    return line | {"name": job.name, "dtype": job.out_dtype or side.dtype}
