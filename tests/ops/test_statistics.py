"""Sums of blocks by hand: groups, steps, controls."""

import numpy as np
import pytest

from skillvec.ops import statistics
from skillvec.ops.delta import Delta
from skillvec.ops.statistics import Request, block_sums, layout

BLOCK = 1 << 20


@pytest.mark.parametrize(
    "numel,width",
    [(1, 1), (2047, 1), (2048, 2), (4095, 2), (4096, 4), (2**16, 64), (2**20 - 1, 512),
     (2**20, 1024), (2**30, 1024)],
)  # fmt: skip
def test_a_group_leaves_1024_of_them(numel: int, width: int) -> None:
    assert statistics.group_width(numel) == width
    assert numel < 1024 or numel // width >= 1024


def sums_of(
    values: list[np.ndarray], request: Request, weights: np.ndarray | None = None
) -> np.void:
    """Return the sums of whole fp32 tensors, block by block, as the engine adds them."""
    numel, total = values[0].size, np.zeros(layout(request).itemsize // 8)
    for begin in range(0, numel, BLOCK):
        at = slice(begin, begin + BLOCK)
        held = None if weights is None else (weights[at].copy(), "BF16")
        sides = [(Delta(part[at].copy(), "F32"), held) for part in values]
        total += block_sums(sides, request, numel)
    return total.view(layout(request))[0]


@pytest.mark.parametrize("numel", [5, 2**14 + 3, 2 * BLOCK + 7])
def test_sums_of_a_constant(numel: int) -> None:
    weights = np.full(numel, 0x3F80, np.uint16)  # 1.0 in bf16: a step is 2^-7
    a, b = np.full(numel, 2.0**-7, np.float32), np.full(numel, -(2.0**-9), np.float32)
    found = sums_of([a, b], Request((1.0, 1.0), ((0, 1),)), weights)
    one, other = found["vectors"]
    square = numel * 2.0**-14
    assert one["square"] == one["kept_dot"] == one["kept_sq"] == one["step_sq"] == square
    assert one["steps"].tolist() == [0, 0, 0, numel, 0, 0, 0, 0, 0]
    assert other["steps"].tolist() == [0, numel, 0, 0, 0, 0, 0, 0, 0]
    assert (one["absorbed"], other["absorbed"], one["support"], one["moved"]) == (0, *[numel] * 3)
    (pair,) = found["pairs"]
    assert (pair["shared"], pair["agree"], pair["product"]) == (numel, 0, -square / 4)
    assert pair["clash_a"] == pair["met_a"] == square
    assert pair["clash_b"] == pair["met_b"] == square / 16


def test_weights_are_looked_at_before_the_next_delta_is_taken() -> None:
    """Two deltas of pairs, whose bases are read into one buffer."""
    buffer, request = np.zeros(8, np.uint16), Request((1.0, 1.0), ((0, 1),))
    delta = Delta(np.full(8, 2.0**-7, np.float32), "F32")

    def sides():
        for pattern in (0x3F80, 0x4000):  # 1.0 and 2.0
            buffer[:] = pattern
            yield delta, (buffer, "BF16")

    one, other = block_sums(sides(), request, 8).view(layout(request))[0]["vectors"]
    assert one["steps"].tolist() == [0, 0, 0, 8, 0, 0, 0, 0, 0]
    assert other["steps"].tolist() == [0, 0, 8, 0, 0, 0, 0, 0, 0]


def test_a_vector_alone_and_a_control_have_their_squares_too() -> None:
    """Neither is in a pair; weights that are not known leave what is kept at 0."""
    deltas = [Delta(np.full(6, size, np.float32), "F32") for size in (1, 2, 3)]
    request = Request((1.0,) * 3, ((0, 1),), ((2, 1),))
    found = block_sums([(d, None) for d in deltas], request, 6).view(layout(request))[0]
    assert found["vectors"]["square"].tolist() == [6, 24, 54]
    assert found["vectors"]["support"].tolist() == [6] * 3
    assert not found["vectors"]["moved"].any()
    assert found["controls"]["product"].tolist() == [36]


def test_a_factor_is_taken_before_anything_is_measured() -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.normal(size=3000).astype(np.float32) for _ in "ab")
    request = Request((-2.0, 0.5), ((0, 1),), ((0, 1),))
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
