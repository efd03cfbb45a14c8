"""What adding a delta did to a block: moments of a sample, values that are not finite."""

from typing import NamedTuple

import numpy as np

from skillvec.ops import kernels
from skillvec.ops.delta import NO_POSITIONS, Delta, U32Array
from skillvec.ops.kernels import Array, widen
from skillvec.ops.special import are_nonfinite, bit_pattern, count_nonfinite, differ

SAMPLE = 30 << 10  # values a block that moments looks at; fp32 arrays below malloc's mmap threshold


class Nonfinite(NamedTuple):
    """How many NaN and infinities the target's block holds, and what was written.

    `lost` are positions that are not finite in the output although the target's values are, or
    although the delta wanted to change them.
    """

    target: int = 0
    output: int = 0
    lost: U32Array = NO_POSITIONS


def nonfinite_of(
    target: Array, target_dtype: str, delta: Delta | None, lam: float, out: Array, out_dtype: str,
    restored: bool = False,
) -> Nonfinite:  # fmt: skip
    """Count what is not finite before and after lam * delta was added; None is a copy.

    A target's NaN stays one, unless `restored` says that values were replaced: so a finite output
    tells of the target too.
    """
    after = count_nonfinite(out, out_dtype)
    if out is target:
        return Nonfinite(after, after)
    if not after and not restored:
        return Nonfinite()
    before = count_nonfinite(target, target_dtype)
    if not after:
        return Nonfinite(before)
    wrong = are_nonfinite(out, out_dtype)
    if before and delta is not None:
        moved = delta.wide(0, out.size)
        factor = lam if "F64" in (target_dtype, delta.dtype) else np.float32(lam)
        asked = (moved != 0) & (factor != 0)
        wrong &= differ(widen(target, target_dtype), widen(out, out_dtype)) | asked
    return Nonfinite(before, after, np.flatnonzero(wrong).astype(np.uint32))


class Moments(NamedTuple):
    """Sums over a block of what was written (out - target) and asked (delta)."""

    changed: int
    written_sq: float
    written_dot_delta: float
    delta_sq: float


@np.errstate(over="ignore", invalid="ignore")  # squares of fp64 that leave it
def moments(
    target: Array,
    target_dtype: str,
    delta: Delta,
    out: Array,
    out_dtype: str,
) -> Moments:
    """Measure how much of the delta arrived, on the first 30 Ki values of a block.

    The sums are scaled to the whole block. What is not finite counts as changed, where it is, but
    not as moved.
    """
    sample = min(SAMPLE, out.size)
    scale = out.size / sample
    same_dtype = target_dtype == out_dtype
    if same_dtype:
        bits = bit_pattern(out[:sample]) != bit_pattern(target[:sample])
    if same_dtype and delta.dtype == out_dtype == "BF16":
        written, values = np.empty(sample, np.uint16), delta.values[:sample]
        kernels.blend(out[:sample], target[:sample], "BF16", -1.0, written)
        sums = np.array(
            (kernels.dot(written, written), kernels.dot(written, values),
             kernels.dot(values, values))
        )  # fmt: skip
        at = delta.positions[: np.searchsorted(delta.positions, sample)]
        if at.size:  # neither side of an exception is a bf16
            moved = widen(out[at], "BF16").astype(np.float64) - widen(target[at], "BF16")
            exact = delta.exact[: at.size].astype(np.float64)
            rounded = [widen(side[at], "BF16").astype(np.float64) for side in (written, values)]
            sums += (moved @ moved, moved @ exact, exact @ exact)
            sums -= (rounded[0] @ rounded[0], rounded[0] @ rounded[1], rounded[1] @ rounded[1])
        if np.isfinite(sums).all():
            return Moments(round(scale * int(np.count_nonzero(bits))), *(scale * sums).tolist())
    wide = delta.wide(0, sample)
    before = widen(target[:sample], target_dtype)
    after = widen(out[:sample], out_dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        moved = after - before
    if not same_dtype:
        bits = differ(after, before)
    changed = int(np.count_nonzero(bits))
    moved[~np.isfinite(moved)] = 0
    wide = wide.astype(moved.dtype, copy=False)
    return Moments(
        round(scale * changed),
        scale * kernels.dot(moved, moved),
        scale * kernels.dot(moved, wide),
        scale * kernels.dot(wide, wide),
    )
