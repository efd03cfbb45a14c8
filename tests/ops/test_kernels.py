"""The arithmetic under everything: one fused multiply-add, one rounding, whoever computes it."""

from fractions import Fraction
from math import floor, sqrt

import numpy as np
import oracle
import pytest
import torch
from families import TORCH_DTYPE, bits, from_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skillvec.ops import kernels, lanes

UINT16 = np.arange(1 << 16, dtype=np.uint16)
FINITE_F32 = st.integers(0, 0xFFFFFFFF).filter(lambda bits: bits & 0x7F800000 != 0x7F800000)


def finite_patterns(rng: np.random.Generator, dtype: str, numel: int) -> np.ndarray:
    """Return uniform bit patterns without NaN and infinities, one in eight subnormal or zero."""
    unsigned, mantissa = (np.uint16, 7) if dtype == "BF16" else (np.uint32, 23)
    drawn = rng.integers(0, 1 << (8 * unsigned().itemsize), numel, dtype=np.uint64)
    exponent = 0xFF << mantissa
    drawn[(drawn & exponent) == exponent] ^= 1 << mantissa
    small = rng.random(numel) < 0.125
    drawn[small] &= np.uint64(~exponent & (1 << 8 * unsigned().itemsize) - 1)
    patterns = drawn.astype(unsigned)
    return patterns if dtype == "BF16" else patterns.view(np.float32)


# ------------------------------------------------------------------------- fused multiply-add


def exactly_rounded(value: Fraction, precision: int, least: int, largest: Fraction) -> float:
    """Round a rational number to a binary format: nearest, ties to even, gradual underflow."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, least) - precision + 1)
    steps = size / quantum
    whole = floor(steps)
    rest = steps - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2):
        whole += 1
    result = whole * quantum
    sign = -1 if value < 0 else 1
    return sign * (float("inf") if result > largest else float(result))


LARGEST = (2 - Fraction(1, 2**23)) * 2**127


def f32(pattern: int) -> np.ndarray:
    return np.array([pattern], np.uint32).view(np.float32)


@settings(max_examples=400)
@given(FINITE_F32, FINITE_F32, st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(0x3F800000, 0x33800000, 1.0)  # 1 + 2^-24: a tie, goes to the even 1
@example(0x3F800001, 0x33800000, 1.0)  # odd mantissa: the same tie goes up
@example(0x3F800000, 0x33800001, 1.0)  # just above the tie
@example(0x3F800000, 0xB3000000, 1.0)  # a tie below a power of two
@example(0x00000001, 0x00000001, 0.5)  # 1.5 of the least subnormal: a tie
@example(0x00000001, 0x80000001, 0.5)  # half of it
@example(0x00800000, 0x80000001, 0.5)  # between the least normal and the largest subnormal
@example(0x7F7FFFFF, 0x7F7FFFFF, 2.0**-25)  # half a step below overflow: a tie that overflows
@example(0x7F7FFFFF, 0x7F7FFFFE, 2.0**-25)  # just below it
@example(0x3F800000, 0x0D000001, 1.0)  # far below: sticks only to the last bit of a double
@example(0x3F800001, 0x33FFFFFF, 0.50000006)  # double rounding through fp64 would err
def test_fma_is_exact_rational_arithmetic_rounded_once(a, b, beta) -> None:
    x, y = f32(a), f32(b)
    exact = Fraction(float(x[0])) + Fraction(beta) * Fraction(float(y[0]))
    found = float(kernels.fma(x, y, beta)[0])
    assert found == exactly_rounded(exact, 24, -126, LARGEST)


@given(FINITE_F32, st.integers(-64, 64), st.integers(-30, 30))
def test_fma_is_right_around_halfway_cases(a, offset, fine) -> None:
    """b is half a unit in the last place of a, or a 2^-30th part more or less."""
    x = f32(a & 0x7FFFFFFF)
    with np.errstate(over="ignore"):
        half = np.spacing(x) / 2
    y = np.array([np.float32(float(half[0]) * (1 + fine * 2.0**-23))])
    beta = 1.0 + offset * 2.0**-23
    if not np.isfinite(y[0]):
        return
    exact = Fraction(float(x[0])) + Fraction(float(np.float32(beta))) * Fraction(float(y[0]))
    assert float(kernels.fma(x, y, beta)[0]) == exactly_rounded(exact, 24, -126, LARGEST)


def test_beta_is_rounded_to_fp32() -> None:
    one = np.ones(1, np.float32)
    assert kernels.fma(0 * one, one, 0.1)[0] == np.float32(0.1)


# --------------------------------------------------------------------------- widen and narrow


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widen_is_torchs_conversion_on_every_pattern(dtype: str) -> None:
    held = UINT16 if dtype == "BF16" else UINT16.view(np.float16)
    found = kernels.widen(held, dtype)
    expected = from_bits(UINT16, dtype).float().numpy()
    nan = np.isnan(expected)
    assert found.dtype == np.float32
    assert np.array_equal(bits(found)[~nan], bits(expected)[~nan])
    assert np.isnan(found[nan]).all()


def test_widen_of_bf16_keeps_nan_payloads() -> None:
    assert np.array_equal(bits(kernels.widen(UINT16, "BF16")) >> 16, UINT16)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_undoes_widen_on_every_pattern(dtype: str) -> None:
    """Bit for bit; of a signalling NaN only its being quiet may change."""
    held = UINT16 if dtype == "BF16" else UINT16.view(np.float16)
    quiet, exponent = (0x40, 0x7F80) if dtype == "BF16" else (0x200, 0x7C00)
    found = bits(kernels.narrow(kernels.widen(held, dtype), dtype))
    nan = ((UINT16 & exponent) == exponent) & ((UINT16 & ~np.uint16(0x8000 | exponent)) != 0)
    assert np.array_equal(found[~nan], UINT16[~nan])
    assert np.array_equal(found[nan] | quiet, UINT16[nan] | quiet)


def near_grid(dtype: str) -> np.ndarray:
    """Return float64 values at, half-way between and a whisker beside the numbers of a format."""
    grid = from_bits(UINT16, dtype).double().numpy()
    grid = np.sort(grid[np.isfinite(grid)])
    middle = (grid[1:] + grid[:-1]) / 2
    step = np.diff(grid)
    parts = [grid, middle]
    for whisker in (2.0**-11, 2.0**-17, 2.0**-26, 2.0**-40):
        parts += [middle + step * whisker, middle - step * whisker]
    parts.append(np.nextafter(middle, np.inf))
    parts.append(np.nextafter(middle, -np.inf))
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float64_is_rounded_once_even_a_whisker_off_the_middle(dtype: str) -> None:
    """Through float32 a value a 2^-40th off the middle becomes the tie, and errs."""
    values = near_grid(dtype)
    found, expected = kernels.narrow(values, dtype), oracle.round_to(values, dtype)
    assert np.array_equal(bits(found), bits(expected))
    with np.errstate(over="ignore"):
        twice = kernels.narrow(values.astype(np.float32), dtype)
    assert not np.array_equal(bits(twice), bits(expected))  # the trap is in the data


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float32_is_rounded_as_torch_and_the_oracle_do(dtype: str) -> None:
    rng = np.random.default_rng(1)
    with np.errstate(over="ignore"):
        values = np.concatenate(
            (near_grid(dtype).astype(np.float32), finite_patterns(rng, "F32", 200_000))
        )
    values = np.concatenate((values, np.array([0, -0.0, np.inf, -np.inf], np.float32)))
    found = bits(kernels.narrow(values, dtype))
    assert np.array_equal(found, bits(oracle.round_to(values.astype(np.float64), dtype)))
    assert np.array_equal(found, bits(torch.from_numpy(values).to(TORCH_DTYPE[dtype])))


def test_float64_to_float32_is_the_oracles() -> None:
    rng = np.random.default_rng(2)
    values = finite_patterns(rng, "F32", 50_000).astype(np.float64)
    values *= 1 + rng.integers(-4, 5, values.size) * 2.0**-25
    found = kernels.narrow(values, "F32")
    assert np.array_equal(bits(found), bits(oracle.round_to(values, "F32")))


@pytest.mark.parametrize("source", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_nan_stays_nan_with_its_sign_and_infinity_stays(source: type, dtype: str) -> None:
    if source == np.float32:
        patterns = np.array([0x7F800001, 0x7FC00000, 0xFF800001, 0x7FFFFFFF], np.uint32)
    else:  # the first two hold a payload that a float32 or bf16 has no room for
        patterns = np.array(
            [0x7FF0000000000001, 0x7FF8000000000000, 0xFFF0000000000001, 0x7FF0000020000000],
            np.uint64,
        )
    values = np.concatenate((patterns.view(source), np.array([np.inf, -np.inf], source)))
    found = kernels.widen(kernels.narrow(values, dtype), dtype)
    assert np.isnan(found[:4]).all()
    assert np.signbit(found[:4]).tolist() == [False, False, True, False]
    assert found[4:].tolist() == [np.inf, -np.inf]


# --------------------------------------------------------------------------------------- dot


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("numel", [0, 1, 63, 1000, 1024, 1025, 65536, 3 * 65536 + 17])
def test_dot_is_the_float64_sum_to_3e_7_of_the_norms(numel: int, dtype: str) -> None:
    """The stated error, against the product of the norms: no bound is relative to a sum near 0."""
    rng = np.random.default_rng(numel)
    held = [kernels.narrow(values, dtype) for values in rng.normal(size=(2, numel)) * 1e-3]
    wide = [values.astype(np.float64) for values in held]
    norms = sqrt(wide[0] @ wide[0]) * sqrt(wide[1] @ wide[1])
    for i, j in ((0, 0), (0, 1), (1, 1)):
        error = abs(lanes.dot(held[i], held[j]) - wide[i] @ wide[j])
        assert error <= 3e-7 * norms


def test_dot_goes_to_fp64_where_squares_leave_fp32() -> None:
    huge = np.full(3000, 2.0**100, np.float32)
    assert lanes.dot(huge, huge) == 3000 * 2.0**200
    tiny = np.full(3000, 2.0**-100, np.float32)
    assert lanes.dot(tiny, tiny) == 3000 * 2.0**-200


# -------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("random", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_values_that_a_dtype_holds_never_move(dtype: str, random: int) -> None:
    """All 65536 patterns, -0 and subnormals among them, whatever is drawn; infinities and NaN."""
    values = from_bits(UINT16, dtype).float().numpy()
    drawn = np.full(values.size, random, np.uint16)
    found = kernels.stochastic_narrow(values, dtype, drawn)
    nan = np.isnan(values)
    assert np.array_equal(bits(found)[~nan], UINT16[~nan])
    assert np.isnan(kernels.widen(found[nan], dtype)).all()


def neighbours(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest number of the format not above, the smallest not below each value."""
    grid = from_bits(UINT16, dtype).double().numpy()
    grid = np.unique(grid[~np.isnan(grid)])
    wide = values.astype(np.float64)
    below = grid[np.searchsorted(grid, wide, side="right") - 1]
    return below, grid[np.searchsorted(grid, wide, side="left")]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_stochastic_rounding_goes_to_one_of_the_two_neighbours(dtype: str) -> None:
    rng = np.random.default_rng(3)
    values = finite_patterns(rng, "F32", 100_000)
    if dtype == "F16":  # mostly values in its range, normal and subnormal
        values[1000:] = (rng.normal(size=99_000) * 10.0 ** rng.integers(-9, 4, 99_000)).astype("f4")
    drawn = rng.integers(0, 1 << 16, values.size, dtype=np.uint16)
    found = kernels.widen(kernels.stochastic_narrow(values, dtype, drawn), dtype)
    below, above = neighbours(values, dtype)
    assert ((found == below) | (found == above)).all()
    inside = (below != above) & np.isfinite(above) & np.isfinite(below)
    went_up = (found == above)[inside].mean()
    assert 0.3 < went_up < 0.7  # both occur


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("point", [0x3F80, 0xBC01, 0x0003])
def test_stochastic_rounding_goes_up_as_often_as_keeps_the_mean(dtype, fraction, point) -> None:
    """n draws go up k times: mean n p, variance n p (1 - p); five sigmas plus the stated 2^-16."""
    n = 200_000
    low, high = from_bits(np.array([point, point + 1], np.uint16), dtype).double().tolist()
    value = np.float32(low + (high - low) * fraction)
    p = (float(value) - low) / (high - low)  # of the value as float32 holds it
    drawn = np.random.default_rng(point).integers(0, 1 << 16, n, dtype=np.uint16)
    found = kernels.widen(kernels.stochastic_narrow(np.full(n, value), dtype, drawn), dtype).astype(
        np.float64
    )
    assert set(np.unique(found)) <= {low, high}
    share = float((found == high).mean())
    assert abs(share - p) <= 5 * sqrt(p * (1 - p) / n) + 2.0**-16


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_draw_counts_once(dtype: str) -> None:
    """Over all 65536 draws the number that goes up is the fraction itself, to one draw."""
    low, high = from_bits(np.array([0x3C00, 0x3C01], np.uint16), dtype).double().tolist()
    for sixteenths in range(17):
        value = np.float32(low + (high - low) * sixteenths / 16)
        found = kernels.stochastic_narrow(np.full(1 << 16, value), dtype, UINT16)
        ups = int((kernels.widen(found, dtype) == np.float32(high)).sum())
        assert abs(ups - sixteenths * 4096) <= 1


def test_from_bytes_is_writable_and_typed() -> None:
    values = kernels.from_bytes(bytearray(b"\x80\x3f\x00\x00"), "BF16")
    values[1] = 1
    assert values.tolist() == [0x3F80, 1]
