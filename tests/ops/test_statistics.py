"""Sums of blocks by hand: groups, samples, redrawn and flipped signs."""

import numpy as np
import pytest

from skillvec.ops import statistics
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import narrow
from skillvec.ops.statistics import Request, block_sums, flipped_sums, layout, redraw_signs, sample

BLOCK = 1 << 20


@pytest.mark.parametrize(
    "numel,width",
    [(1, 1), (2047, 1), (2048, 2), (4095, 2), (4096, 4), (2**16, 64), (2**20 - 1, 512),
     (2**20, 1024), (2**30, 1024)],
)  # fmt: skip
def test_a_group_leaves_1024_of_them(numel: int, width: int) -> None:
    assert statistics.group_width(numel) == width
    assert numel < 1024 or numel // width >= 1024


def sums_of(values: list[np.ndarray], request: Request, weights: object = None) -> np.void:
    """Return the sums of whole fp32 tensors, block by block, as the engine adds them."""
    numel, total = values[0].size, np.zeros(layout(request).itemsize // 8)
    for begin in range(0, numel, BLOCK):
        deltas = [Delta(part[begin : begin + BLOCK].copy(), "F32") for part in values]
        size = deltas[0].values.size
        held = [None] * len(values)
        if weights is not None:
            held = [(sample(weights[begin : begin + BLOCK]), "BF16")] * len(values)
        masks = np.zeros(statistics.masks_nbytes(len(values), size), np.uint8)
        total += block_sums(deltas, held, request, "w", numel, begin, masks)
    return total.view(layout(request))[0]


@pytest.mark.parametrize(
    "numel", [5, 2**14, 2**14 + 3, BLOCK, 3 * BLOCK + 7, 4 * BLOCK + 1, 9 * BLOCK + 20_000]
)
def test_sampled_sums_stand_for_the_whole_tensor(numel: int) -> None:
    """Of a constant delta they are those of all values, however many blocks are looked at."""
    weights = np.full(numel, 0x3F80, np.uint16)  # 1.0 in bf16: a step is 2^-7
    a, b = np.full(numel, 2.0**-7, np.float32), np.full(numel, -(2.0**-9), np.float32)
    found = sums_of([a, b], Request((1.0, 1.0), ((0, 1),)), weights)
    one, other = found["vectors"]
    assert one["square"] == pytest.approx(numel * 2.0**-14, rel=1e-6)
    assert one["sampled"] == pytest.approx(numel * 2.0**-14, rel=1e-6)
    assert one["kept_dot"] == pytest.approx(one["sampled"], rel=1e-9)
    assert one["steps"] == pytest.approx([0, 0, 0, numel, 0, 0, 0, 0, 0], rel=1e-9)
    assert other["steps"] == pytest.approx([0, numel, 0, 0, 0, 0, 0, 0, 0], rel=1e-9)
    assert (one["absorbed"], other["absorbed"]) == (0, pytest.approx(numel))
    assert one["step_sq"] == pytest.approx(numel * 2.0**-14, rel=1e-9)
    (pair,) = found["pairs"]
    assert (pair["shared"], pair["agree"]) == (numel, 0)
    assert pair["clash_a"] == pair["met_a"] == pytest.approx(one["sampled"], rel=1e-9)
    assert one["support"] == numel


def test_a_sample_is_runs_at_equal_distances() -> None:
    values = np.arange(BLOCK, dtype=np.uint32)
    found = sample(values)
    assert found.size == 32 * 512
    assert found.reshape(32, 512)[:, 0].tolist() == list(range(0, BLOCK, BLOCK // 32))
    assert (np.diff(found.reshape(32, 512)) == 1).all()
    assert np.array_equal(sample(values[:16384]), values[:16384])


@pytest.mark.parametrize("size", [16384, 40_000, BLOCK])
def test_exceptions_stand_in_the_sample(size: int) -> None:
    at = np.array([0, 3, size // 32, size // 2 + 511, size // 2 + 513, size - 1], np.uint32)
    exact = np.arange(1, 7, dtype=np.float32)
    delta = Delta(np.zeros(size, np.uint16), "BF16", at, exact)
    whole = np.zeros(size, np.float32)
    whole[at] = exact
    assert np.array_equal(statistics._sampled(delta), sample(whole))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_redrawn_signs_keep_magnitudes(dtype: str) -> None:
    rng = np.random.default_rng(1)
    wide = rng.normal(size=5000).astype(np.float32)
    wide[::7] = 0
    at = np.array([1, 4], np.uint32)
    delta = Delta(narrow(wide, dtype), dtype, at, np.array([9.0, -8.0], np.float32))
    before = delta.wide(0, 5000).copy()
    after = redraw_signs(delta, "key", 0).wide(0, 5000)
    assert np.array_equal(np.abs(before), np.abs(after))
    turned = np.sign(before) != np.sign(after)
    assert abs(turned[before != 0].mean() - 0.5) < 0.05
    assert np.array_equal(redraw_signs(delta, "key", 0).wide(0, 5000), after)
    assert not np.array_equal(redraw_signs(delta, "other", 0).wide(0, 5000), after)
    assert np.array_equal(delta.wide(0, 5000), before)  # the input is not touched


def test_signs_go_on_from_block_to_block() -> None:
    ones = Delta(np.ones(2 * BLOCK, np.float32), "F32")
    whole = redraw_signs(ones, "k", 0).values
    half = ones._replace(values=ones.values[:BLOCK])
    assert np.array_equal(redraw_signs(half, "k", BLOCK).values, whole[BLOCK:])
    assert np.array_equal(redraw_signs(half, "k", 0).values, whole[:BLOCK])


def test_flipped_sums_have_the_variance_of_the_groups() -> None:
    groups = np.random.default_rng(2).normal(size=300)
    found = flipped_sums(groups, 4000, "key")
    spread = np.sqrt(groups @ groups)
    assert abs(found.mean()) < 4 * spread / np.sqrt(4000)
    assert found.std() == pytest.approx(spread, rel=0.05)
    assert np.array_equal(found[:700], flipped_sums(groups, 700, "key"))
    (one,) = flipped_sums(np.array([3.0]), 1, "key")
    assert abs(one) == 3.0


def test_a_factor_is_taken_before_anything_is_measured() -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.normal(size=3000).astype(np.float32) for _ in "ab")
    request = Request((-2.0, 0.5), ((0, 1),), ((0, 1, True),))
    found, plain = sums_of([a, b], request), sums_of([-2 * a, b / 2], request._replace(
        scales=(1.0, 1.0)))  # fmt: skip
    for group in ("vectors", "pairs", "controls"):
        for name in found[group].dtype.names:
            assert found[group][name] == pytest.approx(plain[group][name], rel=1e-4), name


def test_groups_by_hand() -> None:
    """3,000 values in 1,500 groups of 2: products 2, so 4 a group, and their squares."""
    a, b = np.full(3000, 2.0, np.float32), np.ones(3000, np.float32)
    b[1::2] = 0
    (pair,) = sums_of([a, b], Request((1.0, 1.0), ((0, 1),)))["pairs"]
    assert (pair["product"], pair["groups_sq"]) == (3000, 1500 * 4)
    assert (pair["shared"], pair["agree"]) == (1500, 1500)
    assert (pair["met_a"], pair["met_b"], pair["clash_a"]) == (1500 * 4, 1500, 0)
