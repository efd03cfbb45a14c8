"""The addition of `arithmetic.add` in torch, where the target lies: the same bits on any device.

Nothing is left to what two devices do otherwise: RN32(target + lam * delta) is an exact product and
a sum rounded to odd in fp64; what rounds to bf16, and what chooses a neighbour, works on bit
patterns. No operation is fused, or adds in an order of its own, so that the sums have the digits of
`lanes` too. The device needs fp64, which MPS lacks.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops import lanes
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import HALVES, STORAGE_DTYPE, Array
from skillvec.ops.moments import Moments
from skillvec.ops.special import INFINITY

if TYPE_CHECKING:
    from torch import Tensor

TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
CHECKSUM_NBYTES = 8
SPREAD = -0x61C8864680B583EB  # 2^64 over the golden ratio, as a signed number
SIGNED = {"BF16": "int16", "F16": "int16", "F32": "int32", "F64": "int64"}


class Added(NamedTuple):
    """What an addition wrote, beside the target on its device, and what that did."""

    out: "Tensor"
    moments: Moments


def add(
    target: "Tensor", dtype: str, delta: Delta, lam: float,
    random16: npt.NDArray[np.uint16] | None = None, measure: bool = True,
) -> Added:  # fmt: skip
    """Return round(RN32(target + lam * delta)) in the target's own dtype, as `arithmetic.add` does.

    `target` is 1-D, of the safetensors dtype `dtype`, and left as it is; `delta` and `random16` lie
    in the memory of the host.
    """
    import torch

    wide = target if dtype == "F64" else target.to(torch.float32)
    asked = _wide(delta, target.device)
    single = wide.dtype == asked.dtype == torch.float32
    lam = float(np.float32(lam)) if single else lam
    still = ((asked == 0) | (lam == 0)) & (wide == 0)
    total = _to_odd(wide, asked, lam) if single else asked.double() * lam + wide.double()
    if random16 is not None and dtype in HALVES:
        random = from_host(random16, target.device).to(torch.int32) & 0xFFFF
        out = _round_randomly(total.to(torch.float32), dtype, random)
    else:
        out = _narrow(total.to(torch.float32) if single else total, dtype)
    out = torch.where(still | ~torch.isfinite(wide), target, out)
    return Added(out, _moments(target, wide, asked, out, dtype, measure))


def as_floats(patterns: "Tensor", dtype: str) -> "Tensor":
    """Return signed integers as the floats of a dtype that have these bits."""
    return patterns.view(_torch_dtype(TORCH_NAMES[dtype]))


def to_host(values: "Tensor", dtype: str) -> Array:
    """Return floats of a dtype, or their bits, as numpy holds it."""
    found: Array = _bits(values, dtype).cpu().numpy()
    return found.view(STORAGE_DTYPE[dtype])


def from_host(values: Array, device: Any) -> "Tensor":
    """Return the bits of numpy's values as signed integers on a device."""
    import torch

    held = np.ascontiguousarray(values)
    return torch.from_numpy(held.view(f"<i{held.itemsize}")).to(device)


def checksum(patterns: "Tensor") -> bytes:
    """Return 8 bytes that another value anywhere changes, the same on every device.

    The sum of all patterns times odd numbers, mod 2^64: in whatever order it is added up.
    """
    import torch

    at = torch.arange(patterns.numel(), device=patterns.device)
    total = (patterns.to(torch.int64) * (at * SPREAD | 1)).sum()
    return int(total).to_bytes(CHECKSUM_NBYTES, "little", signed=True)


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _wide(delta: Delta, device: Any) -> "Tensor":
    """Return a delta on a device in fp32 (fp64 for F64), exceptions in place."""
    import torch

    values = as_floats(from_host(delta.values, device), delta.dtype)
    wide = values if delta.dtype == "F64" else values.to(torch.float32)
    if delta.positions.size:
        at = from_host(delta.positions.astype(np.int64), device)
        exact = as_floats(from_host(delta.exact, device), "F32")
        wide = wide.index_put((at,), exact.to(wide.dtype))
    return wide


def _bits(values: "Tensor", dtype: str) -> "Tensor":
    return values.view(_torch_dtype(SIGNED[dtype]))


def _to_odd(a: "Tensor", b: "Tensor", beta: float) -> "Tensor":
    """Return a + beta * b of fp32 in fp64, rounded to odd: rounding it to fp32 is a fused add."""
    a, product = a.double(), b.double() * beta  # exact
    total = a + product
    part = total - product  # two-sum: the exact error of the addition (Knuth)
    error = (product - (total - part)) + (a - part)
    return _away_from_even(total, error, "F64")


def _away_from_even(rounded: "Tensor", remainder: "Tensor", dtype: str) -> "Tensor":
    """Turn nearest rounding into rounding to odd, given the sign of exact minus rounded."""
    bits = _bits(rounded, dtype)
    inexact = (remainder != 0) & rounded.isfinite() & ((bits & 1) == 0)
    up = (remainder > 0) != (bits < 0)  # away from zero
    return (bits + inexact * (2 * up.to(bits.dtype) - 1)).view(rounded.dtype)


def _narrow(values: "Tensor", dtype: str) -> "Tensor":
    """Round fp32 or fp64 to a dtype, nearest, ties to even."""
    import torch

    if dtype in HALVES and values.dtype == torch.float64:
        single = values.to(torch.float32)  # to odd, so that a second rounding is harmless
        values = _away_from_even(single, values - single.double(), "F32")
    if dtype != "BF16":
        return values.to(_torch_dtype(TORCH_NAMES[dtype]))
    bits = _bits(values, "F32")
    return _upper_half(bits + 0x7FFF + (bits >> 16 & 1))


def _upper_half(bits: "Tensor") -> "Tensor":
    import torch

    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _round_randomly(values: "Tensor", dtype: str, random: "Tensor") -> "Tensor":
    """Round fp32 as `kernels.numpy_stochastic_narrow` does, by numbers from 0 to 65535."""
    import torch

    if dtype == "BF16":
        return _upper_half(_bits(values, "F32") + random)
    near = values.to(torch.float16)
    error = values - near.to(torch.float32)
    bits = near.view(torch.int16)
    step = 2 * ((error > 0) != (bits < 0)).to(torch.int16) - 1
    other = (bits + step).view(torch.float16)  # a zero has the sign of its error
    gap = other.to(torch.float32) - near.to(torch.float32)
    away = (error != 0) & (random < 65536 * (error / gap))
    return torch.where(away, other, near)


# ------------------------------------------------------------------------------------- the sums


def _moments(
    target: "Tensor", before: "Tensor", asked: "Tensor", out: "Tensor", dtype: str, measure: bool
) -> Moments:
    """Return what `moments.moments` does; groups of 1,024 are added up here, as it adds them."""
    import torch

    least = INFINITY[dtype]
    wild = [torch.count_nonzero((_bits(side, dtype) & least) == least) for side in (target, out)]
    counts = torch.stack([torch.count_nonzero(_bits(target, dtype) != _bits(out, dtype)), *wild])
    changed, target_nonfinite, output_nonfinite = counts.tolist()
    if not measure:
        return Moments(0, 0.0, 0.0, 0.0, target_nonfinite, output_nonfinite)
    moved = out.to(before.dtype) - before
    moved = torch.where(moved.isfinite(), moved, 0)
    kind = torch.promote_types(moved.dtype, asked.dtype)
    moved, asked = (_by_rows(side.to(kind)) for side in (moved, asked))
    pairs = torch.cat((moved, moved, asked), 1), torch.cat((moved, asked, asked), 1)
    squared, product, asked_sq = map(lanes.in_order, np.split(_row_products(*pairs), 3))
    return Moments(changed, squared, product, asked_sq, target_nonfinite, output_nonfinite)


def _by_rows(values: "Tensor") -> "Tensor":
    """Return values in the order in which they are added, (rows, groups, lanes), zeros behind."""
    import torch

    short = -values.numel() % lanes.GROUP
    padded = torch.nn.functional.pad(values, (0, short))
    return padded.view(-1, lanes.GROUP // lanes.ROW, lanes.ROW).transpose(0, 1)


def _row_products(a: "Tensor", b: "Tensor") -> Array:
    """Return the inner products of groups: `lanes.row_products`, on the device."""
    import torch

    sums = _sum_rows(a * b)
    if a.dtype == torch.float32:
        size = sums.abs()
        again = torch.nonzero(~((size >= 1e-30) & (size <= 3e38))).flatten()
        if again.numel():
            one, other = a[:, again].double(), b[:, again].double()
            sums[again] = _sum_rows(one * other)
    found: Array = sums.cpu().numpy()
    return found


def _sum_rows(terms: "Tensor") -> "Tensor":
    import torch

    held = torch.zeros_like(terms[0])
    for row in terms:
        held = held + row
    held = held.double()
    while held.shape[1] > 1:
        half = held.shape[1] // 2
        held = held[:, :half] + held[:, half:]
    return held[:, 0]
