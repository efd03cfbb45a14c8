"""The operators on one block: small examples by hand, then the laws over every bit pattern."""

import numpy as np
import oracle
import pytest
from families import bits, from_bits
from hypothesis import assume, example, given
from hypothesis import strategies as st

from skillvec.ops import arithmetic, lanes, moments
from skillvec.ops.delta import STEP, Delta, squared
from skillvec.ops.kernels import STORAGE_DTYPE, narrow, widen

# bit patterns that go wrong first: zeros, subnormals, normal limits, infinities, NaNs, ones
EDGES_BF16 = np.array(
    [0x0000, 0x0001, 0x0002, 0x007F, 0x0080, 0x0081, 0x00FF, 0x3B80, 0x3F7F, 0x3F80, 0x3F81, 0x3FFF,
     0x4000, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF], np.uint16,
)  # fmt: skip
EDGES_F16 = np.array(
    [0x0000, 0x0001, 0x0002, 0x03FF, 0x0400, 0x0401, 0x07FF, 0x3BFF, 0x3C00, 0x3C01, 0x3FFF, 0x4000,
     0x7BFE, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7FFF], np.uint16,
)  # fmt: skip
EDGES = {
    dtype: np.concatenate((edges, edges | 0x8000))
    for dtype, edges in (("BF16", EDGES_BF16), ("F16", EDGES_F16))
}


def held(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """Return bit patterns as an array of the storage dtype."""
    return np.ascontiguousarray(patterns).view(STORAGE_DTYPE[dtype])


def subtract(
    tuned: np.ndarray, base: np.ndarray, dtype: str, value: str | None = None, exact: bool = True
) -> arithmetic.Subtraction:
    value = value or dtype
    out = np.empty(tuned.size, STORAGE_DTYPE[value])
    exactness = arithmetic.Exactness.WHOLE if exact else arithmetic.Exactness.ROUNDED
    return arithmetic.subtract(tuned, dtype, base, dtype, value, exactness, out)


def add(
    target: np.ndarray, dtype: str, delta: Delta, lam: float = 1.0, out_dtype: str | None = None
) -> np.ndarray:
    out = np.empty(target.size, STORAGE_DTYPE[out_dtype or dtype])
    arithmetic.add(target, dtype, delta, lam, out_dtype or dtype, out)
    return out


def restore(base: np.ndarray, dtype: str, found: arithmetic.Subtraction) -> np.ndarray:
    """Return bits of base + 1 * delta with the replacements put in, as apply does on its base."""
    restored = bits(add(base, dtype, found.delta))
    restored[found.replaced] = found.bits
    return restored


def general(tuned: np.ndarray, base: np.ndarray, dtype: str) -> tuple[np.ndarray, ...]:
    """Return values, exceptions and replacements of the path that knows no shortcut."""
    piece = arithmetic._subtract_piece(tuned, dtype, base, dtype, dtype, arithmetic.Exactness.WHOLE)
    at, replaced = np.flatnonzero(piece.inexact), np.flatnonzero(piece.replace)
    return (
        bits(piece.values), at, piece.difference[at].astype(np.float32),
        replaced, bits(tuned)[replaced],
    )  # fmt: skip


# ------------------------------------------------------------------------ examples by hand


def test_subtract_by_hand() -> None:
    """bf16 has 8 bits of significand: 1.5 - 1 fits, 1 - 2^-9 does not, 3 -> -0 has no difference.

    0x3F80 is 1, 0x3FC0 1.5, 0x3B00 2^-9, 0x4040 3, 0x8000 -0, 0x7F80 infinity.
    """
    base = np.array([0x3F80, 0x3F80, 0x3B00, 0x4040, 0x8000, 0x3F80, 0x7F80], np.uint16)
    tuned = np.array([0x3FC0, 0x3F80, 0x3F80, 0x8000, 0x0000, 0x7F80, 0x7F80], np.uint16)
    found = subtract(tuned, base, "BF16")
    # 1 - 2^-9 = .998046875 is held as 1 (0x3F80); 3 -> -0 gives -3 (0xC040), which restores +0
    assert found.delta.values.tolist() == [0x3F00, 0, 0x3F80, 0xC040, 0, 0, 0]
    assert found.delta.positions.tolist() == [2]
    assert found.delta.exact.tolist() == [0.998046875]
    assert found.replaced.tolist() == [3, 4, 5]
    assert found.bits.tolist() == [0x8000, 0x0000, 0x7F80]
    assert (found.changed, found.unrestored) == (5, 0)
    assert found.delta_sq == 0.5**2 + 0.998046875**2 + 3**2


def test_add_by_hand() -> None:
    """1 + .5 * .5 = 1.25; 1 + .5 * 2^-8 is a quarter step, gone; -0 stays; 4 + .5 * exception."""
    target = np.array([0x3F80, 0x3F80, 0x8000, 0x4080, 0x7FC1, 0xFF80], np.uint16)
    values = np.array([0x3F00, 0x3B80, 0x0000, 0x3F80, 0x3F80, 0x3F80], np.uint16)
    delta = Delta(values, "BF16", np.array([3], np.uint32), np.array([1.0625], np.float32))
    found = add(target, "BF16", delta, 0.5)
    # 4 + .53125 = 4.53125 = 0x4091: the exception counts, not the 1.0 that stands for it
    assert found.tolist() == [0x3FA0, 0x3F80, 0x8000, 0x4091, 0x7FC1, 0xFF80]
    wide = add(target, "BF16", delta, 0.5, "F32")
    assert wide[:4].tolist() == [1.25, 1.001953125, 0.0, 4.53125]
    assert np.signbit(wide[2])


def test_add_by_hand_to_fp16_and_to_fp64() -> None:
    """fp16 steps are 2^-10 at 1; fp64 rounds product and sum once each and takes lam as it is."""
    target = np.array([1.0, 65504.0, -0.0], np.float16)
    delta = Delta(np.array([2.0**-11, 32.0, 0.0], np.float16), "F16")
    assert bits(add(target, "F16", delta)).tolist() == [0x3C00, 0x7C00, 0x8000]  # tie, overflow
    assert bits(add(target, "F16", delta, 1.5)).tolist() == [0x3C01, 0x7C00, 0x8000]
    wide = np.array([1.0, 2.0])
    found = add(wide, "F64", Delta(np.array([1.0, 1e-16]), "F64"), 0.1)
    assert found.tolist() == [1.1, 2.0]


def test_moments_by_hand() -> None:
    """Written: .5, 0, -.5; asked: .5, .25, -1."""
    target = np.array([1.0, 1.0, 1.0], np.float32)
    out = np.array([1.5, 1.0, 0.5], np.float32)
    delta = Delta(np.array([0.5, 0.25, -1.0], np.float32), "F32")
    expected = moments.Moments(2, 0.5, 0.75, 1.3125)
    assert moments.moments(target, "F32", delta, out, "F32") == expected
    sides = [narrow(x, "BF16") for x in (target, out, delta.values)]
    delta = Delta(sides[2], "BF16")
    assert moments.moments(sides[0], "BF16", delta, sides[1], "BF16") == expected


def test_moments_leave_out_what_is_not_finite() -> None:
    target = narrow(np.array([1.0, np.nan, np.inf], np.float32), "BF16")
    out = narrow(np.array([1.5, np.nan, np.inf], np.float32), "BF16")
    delta = Delta(narrow(np.array([0.5, 1.0, 1.0], np.float32), "BF16"), "BF16")
    found = moments.moments(target, "BF16", delta, out, "BF16")
    assert found == moments.Moments(1, 0.25, 0.25, 2.25, 2, 2)


def gram(deltas: list[Delta]) -> np.ndarray:
    wide = [delta.wide(0, delta.values.size) for delta in deltas]
    same = np.result_type(*wide)
    for delta, values in zip(deltas, wide, strict=True):
        assert squared(delta) == lanes.dot(values, values)
    return np.array([[lanes.dot(x.astype(same), y.astype(same)) for y in wide] for x in wide])


def test_gram_by_hand() -> None:
    """x = (1, 2, 3) with the 3 standing for an exact 3.5, y = (1, 0, -1)."""
    x = narrow(np.array([1, 2, 3], np.float32), "BF16")
    y = narrow(np.array([1, 0, -1], np.float32), "BF16")
    exception = Delta(x, "BF16", np.array([2], np.uint32), np.array([3.5], np.float32))
    found = gram([Delta(x, "BF16"), exception, Delta(y, "BF16")])
    assert found.tolist() == [[14, 15.5, -2], [15.5, 17.25, -2.5], [-2, -2.5, 2]]
    mixed = gram([exception, Delta(np.array([1.0, 0, -1]), "F64")])
    assert mixed.tolist() == [[17.25, -2.5], [-2.5, 2]]


def test_negative_subnormal_that_became_minus_zero() -> None:
    """-2^-133 and -0 share sign and exponent, but -2^-133 + 2^-133 is +0: a replacement."""
    base, tuned = np.array([0x8001], np.uint16), np.array([0x8000], np.uint16)
    found = subtract(tuned, base, "BF16")
    assert found.delta.values.tolist() == [1]
    assert (found.replaced.tolist(), found.bits.tolist()) == ([0], [0x8000])
    assert restore(base, "BF16", found).tolist() == [0x8000]


# ------------------------------------------------------------------------------- the laws


def patterns(dtype: str) -> st.SearchStrategy:
    element = st.integers(0, 0xFFFF) | st.sampled_from(EDGES[dtype].tolist())
    pair = st.tuples(element, element) | st.tuples(element, st.integers(-200, 200)).map(
        lambda drawn: (drawn[0], max(0, min(0xFFFF, drawn[0] + drawn[1])))  # close neighbours
    )
    return st.lists(pair, min_size=1, max_size=60).map(lambda p: np.array(p, np.uint16).T.copy())


def all_edges(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return every pair of edge patterns, as two arrays."""
    tuned, base = np.meshgrid(EDGES[dtype], EDGES[dtype])
    return held(tuned.ravel(), dtype), held(base.ravel(), dtype)


def random_pairs(dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs over all patterns: unrelated, neighbours, equal; with NaN, inf, -0."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 1 << 16, 60_000, dtype=np.uint16)
    near = (base.astype(np.int32) + rng.integers(-40, 41, base.size)).clip(0, 0xFFFF)
    tuned = np.where(rng.random(base.size) < 0.3, rng.permutation(base), near.astype(np.uint16))
    return held(tuned, dtype), held(base, dtype)


def check_restores(tuned: np.ndarray, base: np.ndarray, dtype: str) -> None:
    found = subtract(tuned, base, dtype)
    assert np.array_equal(restore(base, dtype, found), bits(tuned))
    assert found.unrestored == 0
    assert found.changed == np.count_nonzero(bits(tuned) != bits(base))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_base_plus_delta_is_tuned_for_every_pair_of_edges(dtype: str) -> None:
    check_restores(*all_edges(dtype), dtype)
    for tuned, base in zip(*all_edges(dtype), strict=True):  # alone: no neighbour forces a path
        check_restores(np.array([tuned]), np.array([base]), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("seed", range(3))
def test_base_plus_delta_is_tuned_for_random_patterns(dtype: str, seed: int) -> None:
    check_restores(*random_pairs(dtype, seed), dtype)


@given(patterns("BF16"))
@example(np.array([[0x8000], [0x8001]], np.uint16))
def test_base_plus_delta_is_tuned_for_any_bf16(pair: np.ndarray) -> None:
    check_restores(pair[0], pair[1], "BF16")


@given(patterns("F16"))
def test_base_plus_delta_is_tuned_for_any_fp16(pair: np.ndarray) -> None:
    check_restores(held(pair[0], "F16"), held(pair[1], "F16"), "F16")


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_delta_kept_in_fp32_restores_as_well(dtype: str) -> None:
    """The form that diff chooses where exceptions would take more room."""
    for tuned, base in (all_edges(dtype), random_pairs(dtype, 5)):
        found = subtract(tuned, base, dtype, "F32")
        assert np.array_equal(restore(base, dtype, found), bits(tuned))
        assert found.delta.positions.size == 0


def check_paths_agree(tuned: np.ndarray, base: np.ndarray) -> None:
    found = subtract(tuned, base, "BF16")
    values, at, exact, replaced, patterns = general(tuned, base, "BF16")
    assert np.array_equal(found.delta.values, values)
    assert np.array_equal(found.delta.positions, at)
    assert np.array_equal(bits(found.delta.exact), bits(exact))
    assert np.array_equal(found.replaced, replaced)
    assert np.array_equal(found.bits, patterns)


@given(patterns("BF16"))
@example(np.array([[0x8000], [0x8001]], np.uint16))
def test_fast_subtraction_finds_what_the_general_path_finds(pair: np.ndarray) -> None:
    check_paths_agree(pair[0], pair[1])


@pytest.mark.parametrize("seed", range(3))
def test_fast_subtraction_finds_the_same_on_random_patterns(seed: int) -> None:
    tuned, base = random_pairs("BF16", seed)
    check_paths_agree(tuned, base)
    finite = np.isfinite(widen(tuned, "BF16")) & np.isfinite(widen(base, "BF16"))
    check_paths_agree(tuned[finite], base[finite])  # without NaN, the shortcut really runs


@pytest.mark.parametrize("lam", [1.0, -1.0, 0.5, 0.3, 3.7, 1e-3])
def test_fast_addition_writes_what_the_general_path_writes(lam: float) -> None:
    for seed in range(3):
        tuned, base = random_pairs("BF16", seed)
        delta = subtract(tuned, base, "BF16").delta
        target = np.random.default_rng(seed).permutation(base)
        wide = delta.wide(0, base.size)
        expected = arithmetic._add_piece(target, "BF16", wide, lam, "BF16", None)
        assert np.array_equal(add(target, "BF16", delta, lam), expected)
        finite = np.isfinite(widen(target, "BF16")) & (target != 0x8000)
        at = np.flatnonzero(finite)  # without special targets, the shortcut really runs
        kept = finite[delta.positions]
        moved = (np.cumsum(finite) - 1)[delta.positions[kept]].astype(np.uint32)
        part = Delta(delta.values[at].copy(), "BF16", moved, delta.exact[kept])
        assert np.array_equal(add(target[at].copy(), "BF16", part, lam), expected[at])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("lam", [1.0, -1.0, 0.0, 0.3, 1e30, -1e-42])
def test_zero_delta_leaves_every_pattern_alone(dtype: str, lam: float) -> None:
    """-0, NaN payloads, signalling NaNs and infinities among them, alone and in company."""
    every = held(np.arange(1 << 16, dtype=np.uint16), dtype)
    zero = Delta(np.zeros(every.size, STORAGE_DTYPE[dtype]), dtype)
    assert np.array_equal(bits(add(every, dtype, zero, lam)), bits(every))
    plain = held(np.arange(0x100, 0x7000, dtype=np.uint16), dtype)
    zero = Delta(np.zeros(plain.size, STORAGE_DTYPE[dtype]), dtype)
    assert np.array_equal(bits(add(plain, dtype, zero, lam)), bits(plain))
    wide = np.array([0, -0.0, 1, np.inf], np.float32)
    zero = Delta(np.zeros(4, np.float32), "F32")
    assert np.array_equal(bits(add(wide, "F32", zero, lam)), bits(wide))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_no_delta_moves_a_nan_or_an_infinity(dtype: str) -> None:
    exponent = 0x7F80 if dtype == "BF16" else 0x7C00
    every = np.arange(1 << 16, dtype=np.uint16)
    special = held(every[(every & exponent) == exponent], dtype)
    delta = Delta(narrow(np.full(special.size, 3.0, np.float32), dtype), dtype)
    assert np.array_equal(bits(add(special, dtype, delta, -0.7)), bits(special))


@pytest.mark.parametrize("seed", range(2))
def test_exceptions_are_exactly_where_bf16_cannot_hold_the_difference(seed: int) -> None:
    tuned, base = random_pairs("BF16", seed)
    found = subtract(tuned, base, "BF16")
    wide = oracle.delta(from_bits(tuned, "BF16"), from_bits(base, "BF16"))
    # the fp32 difference is what is kept; overflow beyond fp32 is a replacement, not an exception
    single = oracle.round_to(wide, "F32").double().numpy()
    single = np.where(np.isfinite(single), single, 0)
    rounded = oracle.round_to(single, "BF16").double().numpy()
    assert np.array_equal(found.delta.positions, np.flatnonzero(rounded != single))
    assert np.array_equal(found.delta.exact, single[found.delta.positions].astype(np.float32))
    whole = found.delta.wide(0, tuned.size)
    assert np.array_equal(whole, single.astype(np.float32))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("value", [None, "F32"])
def test_deltas_are_finite_and_their_zeros_positive(dtype: str, value: str | None) -> None:
    for tuned, base in (all_edges(dtype), random_pairs(dtype, 6)):
        delta = subtract(tuned, base, dtype, value).delta
        values = widen(delta.values, delta.dtype)
        assert np.isfinite(values).all()
        assert not np.signbit(values[values == 0]).any()
        assert np.isfinite(delta.exact).all()


def test_rounded_deltas_have_positive_zeros_too() -> None:
    """-1e-30 rounds to zero in fp16: that zero is stored as every other."""
    tuned = narrow(np.array([-1e-30, 1e-30, 2.0], np.float32), "BF16")
    base = narrow(np.array([0.0, 0.0, 1.0], np.float32), "BF16")
    delta = subtract(tuned, base, "BF16", "F16", exact=False).delta
    assert bits(delta.values).tolist() == [0, 0, 0x3C00]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("lam", [1.0, 0.5, -1.3, 0.1])
def test_addition_is_the_oracles_except_where_fp32_meets_a_tie(dtype: str, lam: float) -> None:
    """fp32 first, then 16 bits: a sum next to the middle of two outputs may become the middle.

    With lam 0.1 and a delta of 5 steps that is common (0.1 in fp32 is 1.5e-9 too large, which fp32
    sums do not see): 4 % of values at lam 0.1 and -1.3. Every difference from the sum rounded once
    is one step, and stands where fp32 holds exactly a tie; nowhere else may there be one.
    """
    rng = np.random.default_rng(11)
    n = 60_000
    base = narrow(rng.normal(size=n) * 0.02, dtype)
    tuned = narrow(widen(base, dtype) + rng.normal(size=n) * 1e-3, dtype)
    target = narrow(widen(base, dtype) + rng.normal(size=n) * 2e-3, dtype)
    delta = subtract(tuned, base, dtype).delta
    point, left, right = (from_bits(bits(x), dtype) for x in (target, tuned, base))
    difference = oracle.delta(left, right)
    single = oracle.apply(point, difference, lam, "F32")
    assert np.array_equal(bits(add(target, dtype, delta, lam, "F32")), bits(single))
    found = from_bits(bits(add(target, dtype, delta, lam)), dtype)
    twice = oracle.round_to(oracle.wide(single), dtype)
    assert np.array_equal(bits(found), bits(twice))
    steps = oracle.ulps(found, oracle.apply(point, difference, lam))
    assert steps.max() <= 1
    off = np.flatnonzero(steps)
    gap = np.abs(oracle.wide(oracle.apply(point, difference, lam)) - oracle.wide(found))[off]
    assert np.array_equal(np.abs(oracle.wide(single) - oracle.wide(found))[off], gap / 2)
    assert off.size <= 0.06 * n
    if lam in (1.0, 0.5):  # a power of two: the fp32 sum is exact, so one rounding is left
        assert not off.size


@given(patterns("BF16"), st.sampled_from([1.0, -1.0, 0.25, 1.7]))
def test_there_and_back_again(pair: np.ndarray, lam: float) -> None:
    """In fp32 output nothing is lost where target and delta share their exponents closely."""
    base, tuned = (widen(side, "BF16") for side in (pair[1], pair[0]))
    assume(np.isfinite(base).all() and np.isfinite(tuned).all())
    delta = subtract(pair[0], pair[1], "BF16").delta
    once = add(pair[1], "BF16", delta, lam, "F32")
    total = base.astype(np.float64) + np.float64(np.float32(lam)) * delta.wide(0, base.size)
    expected = oracle.round_to(np.where(delta.wide(0, base.size) == 0, base, total), "F32")
    assert np.array_equal(bits(once), bits(expected))


def test_long_blocks_take_their_exceptions_and_draws_in_every_step() -> None:
    """The general path works in steps of 2^16: what belongs to a position must follow it."""
    n = 2 * STEP + 5
    rng = np.random.default_rng(12)
    tuned, base = (rng.integers(0, 1 << 16, n, dtype=np.uint16).view(np.float16) for _ in range(2))
    check_restores(tuned, base, "F16")
    at = np.array([0, STEP - 1, STEP, n - 1], np.uint32)
    delta = Delta(np.zeros(n, np.uint16), "BF16", at, np.float32([1, 2, 3, 4]))
    out = add(np.zeros(n, np.float32), "F32", delta)
    assert out[at].tolist() == [1, 2, 3, 4]
    assert np.count_nonzero(out) == 4
    random16 = np.zeros(n, np.uint16)
    random16[-1] = 0xFFFF  # rounds up at the end only
    ones, out = np.ones(n, np.float32), np.empty(n, np.uint16)
    step = Delta(np.full(n, 0.001, np.float32), "F32")
    arithmetic.add(ones, "F32", step, 1.0, "BF16", out, random16)
    assert (out[:-1] == 0x3F80).all()
    assert out[-1] == 0x3F81


def test_gram_is_the_float64_sum_over_exact_values() -> None:
    """Where bf16 holds 1 for 1 - 2^-9, the sums must count 1 - 2^-9: .2 % less, not 1e-6."""
    tuned, base = (np.full(1000, pattern, np.uint16) for pattern in (0x3F80, 0x3B00))
    delta = subtract(tuned, base, "BF16").delta
    exact = 0.998046875
    assert gram([delta])[0, 0] == pytest.approx(1000 * exact**2, rel=1e-6)
    half = Delta(delta.values, "BF16", delta.positions[::2].copy(), delta.exact[::2].copy())
    assert gram([delta, half])[0, 1] == pytest.approx(500 * exact * (1 + exact), rel=1e-6)
    assert subtract(tuned, base, "BF16").delta_sq == pytest.approx(1000 * exact**2, rel=1e-5)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_gram_is_the_float64_matrix_to_1e_6_of_the_norms(dtype: str) -> None:
    """Symmetric to the last digit, over more than one piece; norms are shown in six digits."""
    rng = np.random.default_rng(13)
    values = rng.normal(size=(3, 150_001)) * np.array([[1e-3], [1.0], [1e-5]])
    deltas = [Delta(narrow(row, dtype), dtype) for row in values]
    wide = np.array([widen(delta.values, dtype) for delta in deltas], np.float64)
    expected = wide @ wide.T
    norms = np.sqrt(np.diag(expected))
    found = gram(deltas)
    assert (np.abs(found - expected) <= 1e-6 * np.outer(norms, norms)).all()
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("size", [1e25, 1e-30])
def test_squares_beyond_fp32_still_have_a_norm(size: float) -> None:
    """1e25 squared is past fp32, 1e-30 squared below it; the fp64 sums know both."""
    delta = Delta(narrow(np.full(100, size), "BF16"), "BF16")
    value = float(widen(delta.values, "BF16")[0])
    assert gram([delta])[0, 0] == pytest.approx(100 * value**2, rel=1e-6)


@pytest.mark.parametrize("lam", [0.0, -0.0, 1e-60])
@pytest.mark.parametrize("out_dtype", ["BF16", "F32"])
def test_lam_zero_leaves_the_target_alone(lam: float, out_dtype: str) -> None:
    """Also -0, also where the delta is an exception."""
    target = np.array([0x8000, 0x8000, 0x3F80, 0x7FC1, 0x8001], np.uint16)
    at = np.array([0, 2], np.uint32)
    delta = Delta(np.full(5, 0x3F80, np.uint16), "BF16", at, np.float32([1.001, 1.001]))
    found = add(target, "BF16", delta, lam, out_dtype)
    expected = target if out_dtype == "BF16" else widen(target, "BF16")
    assert np.array_equal(bits(found), bits(expected))
