"""The kinds of jobs: what is done to one tensor, block by block.

Begin with `AddJob.run`: read a block of the delta and of the target, one operator with one
rounding, write at the planned address, or compare with what is there.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from skillvec import operators
from skillvec.blocks import EXCEPTION
from skillvec.codecs import encode_block
from skillvec.deltas import MixDelta
from skillvec.errors import FormatError, IncompatibleError
from skillvec.job import CHANGED, Common, Job, RowJob, State, Task
from skillvec.kernels import FLOATS, Array, narrow, widen
from skillvec.measures import Request, block_sums, is_sampled, layout, masks_nbytes, sample
from skillvec.operators import Delta
from skillvec.patch import POSITIONS, positions_dtype
from skillvec.philox import draw_uint16
from skillvec.sources import Source
from skillvec.vectorfile import block_digest


class PointJob(Job):
    """A job that writes a tensor of a target, or compares what it would write with `expected`."""

    point: Source

    def put(self, task: Task, out: Array) -> None:
        """Write a block, or compare it with what is there."""
        block = task.block
        if self.expected is not None:
            expected = block.read("expected", self.expected)
            if self.expected_digest is not None:
                block.digest("expected", expected)
            task.compare(out, expected)
        elif self.output is not None:
            file, start = self.output
            at = start + block.begin * out.itemsize
            task.common.outputs[file].write(at, out.view(np.uint8).data)
            block.digest("output", out)


class CopyJob(PointJob):
    """Leave a tensor as it is; with a `base_digest`, for the proof that it is the base's."""

    status: ClassVar[str] = "passed through"

    def run(self, task: Task) -> None:
        point = task.block.read("point", self.point)
        task.block.digest("point", point)
        if self.point.dtype in FLOATS:
            task.count_nonfinite(self, point, None, point)
        self.put(task, point)


@dataclass(frozen=True, kw_only=True)
class AddJob(PointJob):
    """point + lam * deltas[0]; `tuned_dtype` is the one in which replacements hold."""

    status: ClassVar[str] = "applied"

    point: Source
    tuned_dtype: str = ""

    def width(self, request: Request | None) -> int:
        return len(operators.Moments._fields) - 1

    @property
    def knows_base(self) -> bool:
        return self.base_digest is not None or self.deltas[0].pair is not None

    def is_exact_base(self, point: str, base: str) -> bool:
        return point == (self.base_digest if self.deltas[0].pair is None else base)

    def run(self, task: Task) -> None:
        block, plan = task.block, task.common.plan
        delta, replaced = self.deltas[0].read(block, "delta0")
        out = point = block.read("point", self.point)
        block.digest("point", point)
        restores = replaced.size > 0 and plan.lam == 1.0 and self.out_dtype == self.tuned_dtype
        if restores and task.exact_base is None:
            task.state.assumed[block.index] = task.tally
        restores &= plan.expects_base if task.exact_base is None else task.exact_base
        if restores or not delta.is_zero or self.out_dtype != self.point.dtype:
            out = block.array("out", self.out_dtype)
            random16 = None
            if plan.rounding == "stochastic":
                random16 = draw_uint16(f"{plan.seed}:{self.name}", block.begin, point.size)
            operators.add(point, self.point.dtype, delta, plan.lam, self.out_dtype, out, random16)
            if restores:
                restore(self, out, replaced)
            if self.expected is None:
                sums = operators.moments(point, self.point.dtype, delta, out, self.out_dtype)
                task.tally[CHANGED] = sums.changed
                task.state.sums[block.index] = sums[1:]
        if self.point.dtype in FLOATS:
            task.count_nonfinite(self, point, delta, out, restores)
        self.put(task, out)


@dataclass(frozen=True, kw_only=True)
class StoreJob(RowJob):
    """deltas[0] into a vector file, in a codec."""

    status: ClassVar[str] = "delta"
    wants_norm: ClassVar[bool] = True

    codec: str

    def width(self, request: Request | None) -> int:
        return 1

    @property
    def roles(self) -> tuple[str, ...]:
        return ("output",) if self.deltas[0].pair is None else ("output", "tuned", "base")

    def run(self, task: Task) -> None:
        """Encode one block and give it to the writer in its turn."""
        block, source = task.block, self.deltas[0]
        assert task.common.writer is not None
        delta, replaced = source.read(block, "delta0")
        found = block.subtracted
        if found is not None:
            counts = found.changed, found.unrestored, delta.positions.size, replaced.size
            task.tally[: len(counts)] = counts
            task.state.sums[block.index] = found.delta_sq
        elif not source.is_stored:  # of a stored one the manifest knows
            task.tally[CHANGED] = np.count_nonzero(delta.values)
            task.state.sums[block.index] = operators.squared(delta)
        values = delta.values
        if delta.dtype != self.out_dtype:
            values = narrowed(delta, self.out_dtype, self.name)
        encoded = encode_block(values, self.codec)
        records = _exceptions(delta).view(np.uint8), replaced.view(np.uint8)
        row = self.first_block + block.index
        task.common.writer.add(row, (encoded.payload, encoded.bitmap, *records))
        block.stamp("output", block_digest(encoded))


class ListJob(RowJob):
    """What point + deltas[0] changes, into a patch; that it is the exact base shows at the end."""

    status: ClassVar[str] = "listed"

    point: Source

    def is_exact_base(self, point: str, base: str) -> bool:
        return point == (self.base_digest if self.deltas[0].pair is None else base)

    def run(self, task: Task) -> None:
        block = task.block
        assert task.common.writer is not None
        delta, replaced = self.deltas[0].read(block, "delta0")
        point = block.read("point", self.point)
        block.digest("point", point)
        out = block.array("out", self.out_dtype)
        operators.add(point, self.point.dtype, delta, 1.0, self.out_dtype, out)
        restore(self, out, replaced)
        task.count_nonfinite(self, point, delta, out, replaced.size > 0)
        changed = np.flatnonzero(operators.bit_pattern(out) != operators.bit_pattern(point))
        positions = (changed + block.begin).astype(POSITIONS[positions_dtype(self.numel)])
        pieces = positions.view(np.uint8), out[changed].view(np.uint8)
        task.common.writer.add(self.first_block + block.index, pieces)


class SameJob(Job):
    """Whether deltas[0] is deltas[1], rounded to its dtype."""

    status: ClassVar[str] = "compared"

    def run(self, task: Task) -> None:
        held = [delta.read(task.block, f"delta{i}")[0] for i, delta in enumerate(self.deltas)]
        one, other = (narrowed(delta, held[1].dtype, self.name) for delta in held)
        task.compare(one, other)


class CompareJob(Job):
    """Deltas with each other, and with the weights `point`, as the plan's request says."""

    status: ClassVar[str] = "compared"

    def width(self, request: Request | None) -> int:
        return 0 if request is None else layout(request).itemsize // 8

    def run(self, task: Task) -> None:
        block, request = task.block, task.common.plan.request
        assert request is not None
        deltas: list[Delta] = []
        weights: list[tuple[Array, str] | None] = []
        sampled, point = is_sampled(block.begin), None
        if self.point is not None and sampled:
            point = sample(block.read("point", self.point)), self.point.dtype
        for i, source in enumerate(self.deltas):
            deltas.append(source.read(block, f"delta{i}")[0])
            if self.point is not None:
                weights.append(point)
            elif sampled and source.pair is not None:
                dtype = source.pair.base.dtype  # copied: the next pair reads into the same buffer
                weights.append((sample(block.array("base", dtype)).copy(), dtype))
            else:
                weights.append(None)
        masks = block.workspace.array("masks", "U8", masks_nbytes(len(deltas), block.size))
        task.state.sums[block.index] = block_sums(
            deltas, weights, request, self.name, self.numel, block.begin, masks
        )


@dataclass(frozen=True, kw_only=True)
class MeasureJob(Job):
    """What the operator of deltas[0] needs to know: pass `number` over it."""

    deltas: tuple[MixDelta]
    number: int

    def run(self, task: Task) -> None:
        """Add one block to what is measured: counts to its scope, floats by block."""
        (mix,), common = self.deltas, task.common
        total = mix.measure(task.block, "delta0", self.number)
        with common.lock:
            if total.dtype.kind == "f":
                task.state.measured[task.block.index] = total
            else:
                held = common.totals.get(mix.scope)
                common.totals[mix.scope] = total if held is None else held + total

    def settle(self, common: Common, state: State) -> Any:
        """Return the tensor's sums; settled, where the tensor is the scope."""
        (mix,), total = self.deltas, None
        for block in sorted(state.measured):
            total = state.measured[block] if total is None else total + state.measured[block]
        if not mix.per_tensor:
            return total
        if total is None:  # pop is atomic; empty tensors come here with the lock held
            total = common.totals.pop(mix.scope, None)
        return None if total is None else mix.settle(self.number, total)  # None: an empty tensor


def restore(job: Job, out: Array, replaced: npt.NDArray[Any]) -> None:
    """Set the values that no difference restores."""
    if replaced.size and int(replaced["bits"].max()) >> 8 * out.itemsize:
        raise FormatError(f"{job.name}: a replacement wider than {job.out_dtype}")
    pattern = operators.bit_pattern(out)
    pattern[replaced["position"]] = replaced["bits"].astype(pattern.dtype)


def narrowed(delta: Delta, dtype: str, name: str) -> Array:
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
