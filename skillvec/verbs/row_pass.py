"""A second pass over tensors: whole rows of all deltas, chunk by chunk, one tensor a worker.

What needs the axes of a tensor sees its rows in order, put together from blocks; the run before it
saw blocks of values that know no axes. No more of a tensor is held than a chunk. A measurer gets
the same chunks whatever the worker count. Values without a finite delta are 0, as in that run.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from math import frexp, isfinite, sqrt
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from skillvec.analysis.spreads import BUCKETS, Seen
from skillvec.engine.matrix_workers import in_turn
from skillvec.engine.plan import Job, JobResult, Plan
from skillvec.files.file import forget_open_files
from skillvec.files.gather import Gatherer, gathering
from skillvec.ops.block import BLOCK_NUMEL, block_count
from skillvec.ops.delta import STEP, Delta
from skillvec.ops.kernels import Array, widen
from skillvec.ops.statistics import Request, layout
from skillvec.report import Watcher
from skillvec.vectors.block_reader import Block, Workspace
from skillvec.vectors.reader import BlockReader, readers_of

CHUNK = 1 << 18  # values of whole rows that are looked at together
AHEAD = 16  # tensors whose sums may wait for their turn, a worker


class Measurer(Protocol):
    """What looks at the rows of one tensor."""

    @property
    def wants_weights(self) -> bool: ...

    def add(self, first: int, deltas: Sequence[Array], weights: Sequence[Array] | None) -> None:
        """Take the rows from `first` on: of each delta, times its scale and its factor.

        Arrays are rows x columns, fp32 or fp64, and are used again when this returns. `weights` are
        what each delta is a change of, in fp32: None unless they are wanted and known.
        """


Measured = TypeVar("Measured", bound=Measurer)


class Tensor(NamedTuple):
    """A tensor of the run, how its rows lie, and the power of two that each delta is times.

    With its factor a delta has a norm between 1/2 and 1, so that products fit into fp32.
    """

    job: Job
    seen: Seen
    factors: tuple[float, ...]


def view_tensor(result: JobResult, request: Request, seen: Seen) -> Tensor:
    """Return a tensor of the run's results as this pass reads it."""
    squares = np.frombuffer(result.sums.tobytes(), layout(request))["vectors"]["square"][0]
    return Tensor(result.job, seen, tuple(map(_factor, squares.tolist())))


def _factor(square: float) -> float:
    exponent = frexp(sqrt(square))[1] if isfinite(square) and square > 0 else 0
    return 2.0 ** -max(-120, min(120, exponent))


def measure_rows(
    tensors: Sequence[Tensor], plan: Plan, make: Callable[[Tensor], Measured], at_once: int,
    watcher: Watcher | None,
) -> Generator[Measured, None, None]:  # fmt: skip
    """Yield what `make` makes of each tensor, in their order, when it has seen all rows.

    `at_once` tensors are at work; `watcher` is told of what is read.
    """
    assert plan.request is not None
    request, readers = plan.request, readers_of(plan.vectors)
    total, done = sum(tensor.job.nbytes_read for tensor in tensors), 0

    rooms: deque[Workspace] = deque()  # of workers that are between two tensors

    def measure(tensor: Tensor) -> Measured:
        measurer, room = make(tensor), rooms.pop() if rooms else Workspace()
        source = _Source(tensor.job, readers, room, measurer.wants_weights)
        with np.errstate(over="ignore", invalid="ignore"):  # what leaves fp64 is None in the end
            for chunk in _read_chunks(tensor, request, source):
                measurer.add(*chunk)
        rooms.append(room)
        return measurer

    def nbytes_of(tensor: Tensor) -> int:
        return held_nbytes(tensor.seen, arrays_held(request))

    try:
        with closing(in_turn(measure, tensors, nbytes_of, at_once, nullcontext, AHEAD)) as found:
            for tensor, measurer in zip(tensors, found, strict=True):
                yield measurer
                done += tensor.job.nbytes_read
                if watcher:
                    watcher.advanced(done, total)
    finally:
        forget_open_files()


def arrays_held(request: Request) -> int:
    """Return how many arrays stand side by side: deltas, and their weights if a pair asks."""
    return len(request.scales) * (2 if request.by_weight else 1)


def held_nbytes(seen: Seen, arrays: int) -> int:
    """Return what a worker holds of a tensor of this form, over `matrix_workers.COPIES`."""
    chunk = max(seen.columns, CHUNK)
    across = 0 if seen.axes[0].is_last and len(seen.axes) == 1 else seen.columns * BUCKETS
    return 4 * arrays * (BLOCK_NUMEL + chunk + across) // 2


class _Source(NamedTuple):
    """What a tensor is read from, and into."""

    job: Job
    readers: dict[str, BlockReader]
    room: Workspace
    wants_weights: bool


def _read_chunks(
    tensor: Tensor, request: Request, source: _Source
) -> Iterator[tuple[int, list[Array], list[Array] | None]]:
    """Yield the first row of each chunk, its deltas, and the weights if they are wanted."""
    job, columns = tensor.job, tensor.seen.columns
    numel = min(max(1, CHUNK // columns), tensor.seen.rows) * columns
    first = filled = 0
    factors = [scale * own for scale, own in zip(request.scales, tensor.factors, strict=True)]
    held = [np.empty(numel, np.float64 if s.dtype == "F64" else np.float32) for s in job.deltas]

    def chunk(size: int) -> tuple[int, list[Array], list[Array] | None]:
        rows = [side[:size].reshape(-1, columns) for side in held]
        return first, rows[: len(factors)], rows[len(factors) :] or None

    for block, deltas, weights in _read_blocks(source):
        while len(held) < len(deltas) + len(weights):
            held.append(np.empty(numel, np.float32))
        begin = 0
        while begin < block.size:
            end = min(block.size, begin + STEP, begin + numel - filled)
            place = slice(filled, filled + end - begin)
            for side, delta, factor in zip(held, deltas, factors, strict=False):
                np.multiply(delta.wide(begin, end), factor, out=side[place])
            for side, point in zip(held[len(deltas) :], weights, strict=True):
                side[place] = point[begin:end]
            filled, begin = place.stop, end
            if filled == numel:
                yield chunk(filled)
                first, filled = first + numel // columns, 0
    whole = -(-filled // columns) * columns
    for side in held:
        side[filled:whole] = 0  # behind what is flat
    if whole:
        yield chunk(whole)


def _read_blocks(source: _Source) -> Iterator[tuple[Block, list[Delta], list[Array]]]:
    """Yield each block with its deltas, and with the weights of all of them if they are known."""
    job, gatherer = source.job, Gatherer()
    for index in range(block_count(job.numel)):
        block = Block(index, job.numel, source.room, source.readers, {})
        deltas, weights = [], []
        with gathering(gatherer):
            point = job.point if source.wants_weights else None
            held = widen(block.read("point", point), point.dtype) if point else None
            for i, delta in enumerate(job.deltas):
                deltas.append(delta.read(block, f"delta{i}")[0])
                if source.wants_weights and held is None and delta.pair is not None:
                    dtype = delta.pair.base.dtype
                    weights.append(widen(block.array("base", dtype), dtype).copy())
        if held is not None:
            weights = [held] * len(deltas)
        yield block, deltas, weights if len(weights) == len(deltas) else []
