"""What the blocks of several deltas tell of each other: sums that add up over blocks and tensors.

Pure functions on numpy blocks, no paths, no threads. Inner products, supports and signs are taken
over every value; shares of energy and rounding on a sample, which stands at the same positions
in every input. docs/orthogonality.md says what becomes of the sums.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.delta import Delta, group_products, squared
from skillvec.ops.kernels import HALVES, Array, F32Array, narrow, widen
from skillvec.ops.philox import draw_uint32

Sums = npt.NDArray[np.float64]
GROUP = 1024  # neighbours whose products have one sign in the sign-flip null
SAMPLED = 4 * BLOCK_NUMEL  # one block in so many values is sampled: small steps cost as much
RUNS, RUN = 32, 512  # of the sample of a block: its arrays stay below malloc's mmap threshold
STEP_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # of |delta| in steps of the 16-bit grid
VECTOR = ("square", "support", "sampled", "moved", "kept_dot", "kept_sq", "absorbed", "step_sq")
PAIR = ("product", "groups_sq", "shared", "agree", "met_a", "met_b", "clash_a", "clash_b")
CONTROL = ("product", "groups_sq")
# numbers of docs/orthogonality.md that come of the sampled sums
ESTIMATED = (
    "steps", "below_half_step", "kept_gain", "kept_cosine", "absorbed", "on_support", "conflict",
)  # fmt: skip


class Request(NamedTuple):
    """What is measured in one pass over deltas, each taken times its factor in `scales`.

    `pairs` are compared in everything; `controls` (i, j, redrawn), none or one for each pair, in
    their angle alone, where `redrawn` means that the signs of i are drawn anew. `sign_flips` is the
    number of draws.
    """

    scales: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    controls: tuple[tuple[int, int, bool], ...] = ()
    seed: int = 0
    sign_flips: int = 0


@cache
def layout(request: Request) -> np.dtype[np.void]:
    """Return the structured dtype of the sums, all float64: counts are exact to 2^53."""
    vector = [(name, "f8") for name in VECTOR]
    return np.dtype(
        [
            ("vectors", [*vector, ("steps", "f8", len(STEP_EDGES) + 1)], (len(request.scales),)),
            ("pairs", [(name, "f8") for name in PAIR], (len(request.pairs),)),
            ("controls", [(name, "f8") for name in CONTROL], (len(request.controls),)),
            ("flips", "f8", (len(request.pairs), request.sign_flips)),
        ]
    )


def group_width(numel: int) -> int:
    """Return how many neighbours make a group: a power of two, 1,024 groups or more if it can."""
    return 1 if numel < 2 * GROUP else min(GROUP, 1 << (numel // GROUP).bit_length() - 1)


def masks_nbytes(deltas: int, numel: int) -> int:
    """Return the scratch bytes that `block_sums` wants for a block of `numel` values."""
    return 2 * (deltas + 1) * numel


@np.errstate(over="ignore", invalid="ignore")  # sums that leave fp64 are None in the end
def block_sums(
    deltas: Sequence[Delta],
    weights: Sequence[tuple[Array, str] | None],
    request: Request,
    name: str,
    numel: int,
    begin: int,
    masks: Array,
) -> Sums:
    """Return the sums of `layout` over one block of a tensor of `numel` values, flat.

    All deltas are of one length and stand at `begin` in their tensor. `weights` are the sampled
    weights that each is a change of, in a storage dtype, or None where they are not known; `masks`
    is room for `masks_nbytes`.
    """
    record = np.zeros(1, layout(request))
    vectors, pairs, controls = (record[key][0] for key in ("vectors", "pairs", "controls"))
    width = group_width(numel)
    deltas = [_scaled(delta, by) for delta, by in zip(deltas, request.scales, strict=True)]
    for i, delta in enumerate(deltas):
        vectors["square"][i] = squared(delta)
    for n, (i, j) in enumerate(request.pairs):
        groups = group_products(deltas[i], deltas[j], width)
        pairs["product"][n], pairs["groups_sq"][n] = groups.sum(), groups @ groups
        if request.sign_flips:
            key = f"{request.seed}:flips:{name}:{begin}"
            record["flips"][0, n] = flipped_sums(groups, request.sign_flips, key)
    for n, (i, j, redrawn) in enumerate(request.controls):
        key = f"{request.seed}:control:{name}"
        other = redraw_signs(deltas[i], key, begin) if redrawn else deltas[i]
        groups = group_products(other, deltas[j], width)
        controls["product"][n], controls["groups_sq"][n] = groups.sum(), groups @ groups
    _count_supports(deltas, request, vectors, pairs, masks)
    if is_sampled(begin):
        _measure_sample(deltas, weights, request, numel, begin, vectors, pairs)
    return record.view(np.float64)


def _measure_sample(
    deltas: Sequence[Delta], weights: Sequence[tuple[Array, str] | None], request: Request,
    numel: int, begin: int, vectors: Array, pairs: Array,
) -> None:  # fmt: skip
    """Take the sums of the sampled values, scaled to the whole tensor."""
    seen = [_sampled(delta) for delta in deltas]
    last = (numel - 1) // SAMPLED * SAMPLED  # where the last sampled block begins
    looked_at = last // SAMPLED * BLOCK_NUMEL + min(BLOCK_NUMEL, numel - last)
    scale = deltas[0].values.size / seen[0].size * numel / looked_at
    for i, values in enumerate(seen):
        vectors["sampled"][i] = scale * _dot(values, values)
        held = weights[i]
        if held is not None:
            _measure_rounding(values, *held, scale, vectors[i : i + 1])
    for n, (i, j) in enumerate(request.pairs):
        _measure_meeting(seen[i], seen[j], scale, pairs[n : n + 1])


def _scaled(delta: Delta, factor: float) -> Delta:
    if factor == 1:
        return delta
    values = delta.wide(0, delta.values.size) * np.float64(factor)
    return Delta(values, "F64")


def flipped_sums(groups: Sums, draws: int, key: str) -> Sums:
    """Return the sum of `groups` with the sign of each drawn anew, `draws` times.

    The null of a randomisation test (Fisher 1935): addressed by `key`, so it is the same whatever
    runs beside it.
    """
    sums = np.empty(draws)
    rows = -(-groups.size // 32)  # words of 32 signs a draw
    for first in range(0, draws, 256):  # bounds the matrix of signs
        count = min(256, draws - first)
        words = draw_uint32(key, first * rows, count * rows).view(np.uint8)
        signs = np.unpackbits(words).reshape(count, 32 * rows)[:, : groups.size]
        sums[first : first + count] = 2.0 * np.vecdot(signs, groups) - groups.sum()
    return sums


def redraw_signs(delta: Delta, key: str, begin: int) -> Delta:
    """Return a delta with the same magnitudes, hence support and norm, and random signs."""
    size = delta.values.size
    words = draw_uint32(key, begin // 32, -(-size // 32)).view(np.uint8)
    negative = np.unpackbits(words, count=size)
    if delta.dtype == "BF16":
        values = delta.values ^ (negative.astype(np.uint16) << 15)
    else:
        values = np.where(negative, -delta.values, delta.values)
    exact = np.where(negative[delta.positions], -delta.exact, delta.exact)
    return delta._replace(values=values, exact=exact)


def _count_supports(
    deltas: Sequence[Delta], request: Request, vectors: Array, pairs: Array, masks: Array
) -> None:
    """Count values that are not 0, that two deltas share, and that agree in sign there.

    In few calls over whole blocks: between two calls the workers wait for each other.
    """
    rows = masks.view(np.bool_).reshape(-1, deltas[0].values.size)
    shared, opposed = rows[-2:]
    for i, delta in enumerate(deltas):
        signed = delta.values.view(np.int16) if delta.dtype == "BF16" else delta.values
        np.not_equal(signed, 0, out=rows[2 * i])
        np.less(signed, 0, out=rows[2 * i + 1])
        if delta.positions.size:  # beyond the range of the dtype the value beside is 0
            rows[2 * i][delta.positions] = delta.exact != 0
            rows[2 * i + 1][delta.positions] = delta.exact < 0
        vectors["support"][i] = np.count_nonzero(rows[2 * i])
    for n, (i, j) in enumerate(request.pairs):
        np.logical_and(rows[2 * i], rows[2 * j], out=shared)
        np.not_equal(rows[2 * i + 1], rows[2 * j + 1], out=opposed)
        np.logical_and(shared, opposed, out=opposed)
        pairs["shared"][n] = count = np.count_nonzero(shared)
        pairs["agree"][n] = count - np.count_nonzero(opposed)


def is_estimated(numel: int) -> bool:
    """Return whether a tensor of so many values is larger than its sample."""
    return numel > RUNS * RUN


def is_sampled(begin: int) -> bool:
    """Return whether the block that begins there is one of those that are sampled."""
    return begin % SAMPLED == 0


def sample(values: Array) -> Array:
    """Return 32 runs of 512 values at equal distances in a block, or all of a short one."""
    if not is_estimated(values.size):
        return values
    width = values.size // RUNS
    return values[: RUNS * width].reshape(RUNS, width)[:, :RUN].ravel()


def _dot(a: Array, b: Array) -> float:
    """Return an inner product, summed by runs and then in fp64 (np.dot has threads of its own)."""
    whole = a.size // RUN * RUN
    runs = np.vecdot(a[:whole].reshape(-1, RUN), b[:whole].reshape(-1, RUN))
    return float(runs.sum(dtype=np.float64)) + float(np.dot(a[whole:], b[whole:]))


def _sampled(delta: Delta) -> Array:
    """Return the sample of a delta, exceptions in place; in fp64 where squares leave fp32."""
    values = widen(sample(delta.values), delta.dtype)
    if delta.positions.size:
        values = values.copy()
        at, exact = delta.positions.astype(np.int64), delta.exact
        if delta.values.size > values.size:
            run, offset = np.divmod(at, delta.values.size // RUNS)
            seen = (run < RUNS) & (offset < RUN)
            at, exact = (run * RUN + offset)[seen], exact[seen]
        values[at] = exact
    most = float(np.abs(values).max())
    return values if 1e-12 < most < 1e12 or not most else values.astype(np.float64)


def _measure_meeting(a: Array, b: Array, scale: float, pair: Array) -> None:
    """Add up the energy of two deltas where the other is not 0, and where signs differ."""
    met = ((a != 0) & (b != 0)).astype(a.dtype)
    clash = met * ((a < 0) != (b < 0))
    for name, values in (("a", a), ("b", b)):
        squares = values * values
        pair[f"met_{name}"] = scale * _dot(squares, met)
        pair[f"clash_{name}"] = scale * _dot(squares, clash)


def _measure_rounding(
    values: Sums, weights: Array, dtype: str, scale: float, vector: Array
) -> None:
    """Measure a delta in steps of the 16-bit grid at its weights, and what that grid keeps of it.

    The grid is that of the weights' dtype where it has 16 bits, else BF16's.
    """
    grid = dtype if dtype in HALVES else "BF16"
    changed = values != 0
    with np.errstate(all="ignore"):
        wide, single = widen(weights, dtype).astype(np.float32), values.astype(np.float32)
        held = narrow(wide, grid)
        written = widen(narrow(wide + single, grid), grid) - widen(held, grid)
        kept = (written * changed).astype(np.float64)
    kept[~np.isfinite(kept)] = 0
    fraction, smallest = (7, 1) if grid == "BF16" else (10, 113)  # bits; biased exponent
    step = np.maximum(_exponent(widen(held, grid)), smallest) - fraction  # biased, may be below 0
    bins = np.clip(_exponent(single) - step + 3, 0, len(STEP_EDGES)) * changed
    moved = np.count_nonzero(changed)
    steps = np.bincount(bins, minlength=len(STEP_EDGES) + 1)
    steps[0] -= values.size - moved
    vector["steps"] = scale * steps
    vector["moved"] = scale * moved
    vector["kept_dot"] = scale * _dot(kept, values)
    vector["kept_sq"] = scale * _dot(kept, kept)
    vector["absorbed"] = scale * (moved - np.count_nonzero(kept))
    squares = (2 * step.astype(np.int64) + (1023 - 2 * 127) << 52).view(np.float64)
    vector["step_sq"] = scale * float((squares * (changed & np.isfinite(wide))).sum())


def _exponent(values: F32Array) -> npt.NDArray[np.int32]:
    """Return the biased exponents of fp32 values."""
    bits: npt.NDArray[np.int32] = np.ascontiguousarray(values, np.float32).view(np.int32)
    return bits >> 23 & 0xFF
