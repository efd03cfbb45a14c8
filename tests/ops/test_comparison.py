"""Sums of pairs, and of deltas on weights: numpy against an oracle, kernels against numpy."""

from fractions import Fraction

import numpy as np
import pytest
from builds import BUILDS
from xxhash import xxh3_64_hexdigest

from skillvec.ops import comparison, lanes
from skillvec.ops.comparison import (
    PAIR,
    VECTOR,
    call_pair,
    call_weights,
    numpy_pair,
    numpy_weights,
)
from skillvec.ops.delta import NO_POSITIONS, NO_VALUES, Delta
from skillvec.ops.kernels import STORAGE_DTYPE, narrow, widen

DTYPES = ("BF16", "F16", "F32")
SIZES = (0, 1, 15, 16, 17, 1023, 1024, 1025, 2047, 5000)


def delta_of(
    rng: np.random.Generator, dtype: str, size: int, density: float, odd: int = 0
) -> Delta:
    """Return a delta of values of many magnitudes with exceptions, begun at an odd address."""
    wide = (rng.normal(size=size) * 2.0 ** rng.integers(-12, 3, size)).astype(np.float32)
    wide[rng.random(size) >= density] = 0
    wide[rng.random(size) < 0.01] = -0.0
    room = np.zeros(size * STORAGE_DTYPE[dtype].itemsize + odd, np.uint8)
    values = room[odd:].view(STORAGE_DTYPE[dtype])
    values[:] = narrow(wide, dtype)
    at = np.flatnonzero(rng.random(size) < 0.01).astype(np.uint32)
    exact = rng.normal(size=at.size).astype(np.float32)
    exact[::5] = 0
    return Delta(values, dtype, at, exact)


def same(found: object, wanted: object) -> None:
    """Fail where two arrays, or tuples of them, have other bytes."""
    for one, other in zip(np.atleast_2d(found), np.atleast_2d(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), (one, other)


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("b", DTYPES)
def test_kernels_compare_pairs_as_numpy(isa: str, a: str, b: str) -> None:
    rng = np.random.default_rng(1)
    for n, size in enumerate(SIZES):
        x = delta_of(rng, a, size, (0.01, 0.3, 1.0)[n % 3], odd=n % 4)
        y = delta_of(rng, b, size, (1.0, 0.2)[n % 2], odd=n % 3)
        for width in (1, 8, 16, 64, 1024):
            found = call_pair(BUILDS[isa]["pair_sums"], x, y, width)
            wanted = numpy_pair(x, y, width)
            assert found.groups.tobytes() == wanted.groups.tobytes(), (size, width)
            assert found.sums.tobytes() == wanted.sums.tobytes(), (size, width)


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_measure_weights_as_numpy(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    for n, size in enumerate(SIZES):
        x = delta_of(rng, DTYPES[n % 3], size, (0.001, 0.3, 1.0)[n % 3], odd=n % 4)
        wide = delta_of(rng, "F32", size, 0.95).wide(0, size) * np.float32(16)
        for weights in ((narrow(wide, dtype), dtype), None):
            found = call_weights(BUILDS[isa]["vector_sums"], x, weights)
            assert found.tobytes() == numpy_weights(x, weights).tobytes(), (size, found)


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_of_16_bits(isa: str, dtype: str) -> None:
    """As a delta where it is finite, against chosen others; as a weight always."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    weights = bits.view(STORAGE_DTYPE[dtype])
    kernel, measure = (BUILDS[isa][name] for name in ("pair_sums", "vector_sums"))
    small = narrow(np.float32([0, 1e-3, -1e-7, 2.5, 3e4]), dtype)
    for other in small:
        y = Delta(np.full(1 << 16, other, weights.dtype), dtype)
        same(call_weights(measure, y, (weights, dtype)), numpy_weights(y, (weights, dtype)))
        finite = weights.copy()
        finite[~np.isfinite(widen(weights, dtype))] = 0
        x = Delta(finite, dtype)
        found, wanted = call_pair(kernel, x, y, 64), numpy_pair(x, y, 64)
        assert found.groups.tobytes() == wanted.groups.tobytes()
        assert found.sums.tobytes() == wanted.sums.tobytes()
        held = np.full(1 << 16, other, weights.dtype), dtype
        same(call_weights(measure, x, held), numpy_weights(x, held))


@pytest.mark.parametrize("isa", BUILDS)
def test_fp32_weights_of_every_kind(isa: str) -> None:
    """NaN payloads, infinities, subnormals, ties of bf16, the largest numbers."""
    bits = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 1, 0x80000001,
                      0x007FFFFF, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF7FFFFF, 0x80000000, 0,
                      0x3F7FFFFF, 0x00800000, 0x04000000])  # fmt: skip
    weights = np.repeat(bits.view(np.float32), 40), "F32"
    sizes = np.float32([0, 1e-45, -1e-40, 3.4e38, -3.4e38, 2.0**-9, 2.0**-8, -(2.0**-7), 1, -1e20])
    x = Delta(np.tile(sizes, 68), "F32")
    found, wanted = call_weights(BUILDS[isa]["vector_sums"], x, weights), numpy_weights(x, weights)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e19, 3e38])
def test_kernels_beyond_sums_of_fp32(isa: str, size: float) -> None:
    rng = np.random.default_rng(3)
    a, b = (np.float32(size) * rng.uniform(-1, 1, 3000).astype(np.float32) for _ in "ab")
    b[rng.random(3000) < 0.5] = 0
    x, y = Delta(a, "F32"), Delta(b, "F32")
    for width in (2, 1024):
        found, wanted = call_pair(BUILDS[isa]["pair_sums"], x, y, width), numpy_pair(x, y, width)
        assert found.sums.tobytes() == wanted.sums.tobytes()
    held = narrow(a, "BF16"), "BF16"
    found, wanted = call_weights(BUILDS[isa]["vector_sums"], y, held), numpy_weights(y, held)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("isa", BUILDS)
def test_squares_beyond_fp32_that_nothing_meets(isa: str) -> None:
    """They are in no sum of what is met, which fp32 settles."""
    a, b = np.random.default_rng(7).normal(size=(2, 3000)).astype(np.float32)
    b[::5] = -a[::5]
    a[::7], b[::7] = 1e30, 0
    x, y = Delta(a, "F32"), Delta(b, "F32")
    found, wanted = call_pair(BUILDS[isa]["pair_sums"], x, y, 1024), numpy_pair(x, y, 1024)
    assert found.sums.tobytes() == wanted.sums.tobytes()


def test_squares_beyond_fp64_that_nothing_meets() -> None:
    a, b = np.ones((2, 3000))
    a[::7], b[::7] = 1e200, 0
    found = numpy_pair(Delta(a, "F64"), Delta(b, "F64"), 1024)
    sums = dict(zip(PAIR, found.sums.tolist(), strict=True))
    assert sums["square_a"] == np.inf
    assert sums["met_a"] == sums["met_b"] == sums["square_b"] == 3000 - 429


@pytest.mark.parametrize("isa", BUILDS)
def test_what_does_not_fit_is_refused(isa: str) -> None:
    pair, vector = (BUILDS[isa][f"{n}_sums"] for n in ("pair", "vector"))
    x = Delta(np.ones(2000, np.float32), "F32")
    three = np.uint32([5, 1999, 7]), np.ones(3, np.float32)
    for wrong in (
        x._replace(values=x.values[:-1]), x._replace(positions=three[0], exact=three[1]),
        x._replace(positions=np.uint32([2000]), exact=three[1][:1]),
        x._replace(positions=np.uint32([3]), exact=NO_VALUES),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call_pair(pair, x, wrong, 1024)
        if wrong.values.size == 2000:
            with pytest.raises(ValueError):
                call_weights(vector, wrong, None)
    for width in (0, -1, 3, 2048):
        with pytest.raises(ValueError):
            pair(x.values, 2, NO_POSITIONS, NO_VALUES, x.values, 2, NO_POSITIONS, NO_VALUES,
                 width, np.empty(-(-2000 // max(width, 1))), np.empty(12))  # fmt: skip
    with pytest.raises(ValueError):
        call_weights(vector, x, (np.zeros(1999, np.uint16), "BF16"))


def test_digests_of_the_self_checks() -> None:
    found = comparison.sample_pairs(numpy_pair), comparison.sample_weights(numpy_weights)
    assert tuple(map(xxh3_64_hexdigest, found)) == comparison.SELF_CHECKS


# ------------------------------------------------------------------------------ numpy by the book


@pytest.mark.parametrize("dtypes", [("BF16", "F16"), ("F32", "F64"), ("F64", "F64")])
def test_numpy_against_exact_sums(dtypes: tuple[str, str]) -> None:
    """Two deltas of 70,001 values, more than a piece, and 40 in rational numbers."""
    rng = np.random.default_rng(4)
    for size in (40, 70_001):
        x, y = (delta_of(rng, dtype, size, 0.6) for dtype in dtypes)
        a, b = (side.wide(0, size).astype(np.float64) for side in (x, y))
        met, clash = (a != 0) & (b != 0), a * b < 0
        found = dict(zip(PAIR, numpy_pair(x, y, 16).sums.tolist(), strict=True))
        groups = np.array([(a[i : i + 16] * b[i : i + 16]).sum() for i in range(0, size, 16)])
        scale = np.sqrt((a @ a) * (b @ b))
        assert found["product"] == pytest.approx(a @ b, abs=1e-6 * scale)
        assert found["groups_sq"] == pytest.approx(groups @ groups, rel=1e-4)
        for side, values in (("a", a), ("b", b)):
            wanted = [(values[at] ** 2).sum() for at in (values != 0, met, clash)]
            names = [f"{name}_{side}" for name in ("square", "met", "clash")]
            assert [found[name] for name in names] == pytest.approx(wanted, rel=1e-6)
        counts = [np.count_nonzero(where) for where in (a, b, met, clash)]
        assert [found[name] for name in PAIR[8:]] == counts
        if size == 40:
            exact = sum(Fraction(p) * Fraction(q) for p, q in zip(a, b, strict=True))
            assert found["product"] == pytest.approx(float(exact), abs=1e-6 * scale)


def test_a_vector_has_one_square_whatever_it_is_compared_with() -> None:
    rng = np.random.default_rng(5)
    x, y, z = (delta_of(rng, dtype, 3000, 0.5) for dtype in ("BF16", "F16", "F64"))
    squares = {numpy_pair(x, other, width).sums[2] for other in (y, z) for width in (2, 1024)}
    alone = numpy_weights(x, None)
    assert squares == {alone[0]} == {lanes.dot(x.wide(0, 3000), x.wide(0, 3000))}
    assert dict(zip(VECTOR, alone, strict=False))["support"] == np.count_nonzero(x.wide(0, 3000))


def test_fp64_goes_to_numpy() -> None:
    rng = np.random.default_rng(8)
    x, y = (delta_of(rng, dtype, 3000, 0.5) for dtype in ("BF16", "F64"))
    held = rng.normal(size=3000), "F64"
    for delta, weights in ((y, None), (y, held), (x, held)):
        same(comparison.compare_weights(delta, weights), numpy_weights(delta, weights))
    for one, other in ((x, y), (y, x), (y, y)):
        found, wanted = comparison.compare_pair(one, other, 2), numpy_pair(one, other, 2)
        assert found.sums.tobytes() == wanted.sums.tobytes()


def test_groups_of_zeros_are_zero() -> None:
    """A sum of nothing is no sum that fp32 failed to hold."""
    x = Delta(np.zeros(5000, np.uint16), "BF16")
    y = Delta(np.full(5000, 0x3F80, np.uint16), "BF16")
    for one, other in ((x, y), (y, x), (x, x)):
        found = numpy_pair(one, other, 1024)
        assert not found.groups.any() and not found.sums[4:8].any()
