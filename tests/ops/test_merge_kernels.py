"""Merge kernels, random numbers and stochastic rounding: every build gives the bytes of numpy."""

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builds import BUILDS
from xxhash import xxh3_64_hexdigest

from skillvec.ops import kernels, merge_kernels, merge_methods, philox
from skillvec.ops.delta import Delta
from skillvec.ops.merge_counts import count_lower, count_upper, exact_total, gram, sum_squares
from skillvec.ops.merge_methods import METHODS, OPERATORS, Position

SIZES = (1, 15, 16, 17, 511, 512, 513, 1100)
NAN, INF = float("nan"), float("inf")


def delta_of(rng: np.random.Generator, dtype: str, size: int, kind: str = "steps") -> Delta:
    """Return a delta that starts at an odd address: a third zeros, few distinct or wild values."""
    if kind == "steps":  # whose sums cancel and tie
        values = rng.integers(-4, 5, size) * 2.0**-9
    elif kind == "wild":  # from subnormals to the largest
        exponents = rng.integers(-140, 120, size) if dtype != "F16" else rng.integers(-24, 15, size)
        values = rng.choice([-1, 1, 1.5, 1.9921875], size) * 2.0**exponents
    else:
        values = rng.standard_normal(size)
    values[rng.random(size) < 0.3] = 0
    stored = kernels.narrow(values.astype(np.float32) + np.float32(0), dtype)
    raw = np.zeros(stored.nbytes + 1, np.uint8)
    raw[1:] = stored.view(np.uint8)
    at = np.flatnonzero(rng.random(size) < 0.01).astype(np.uint32)
    exact = np.abs(rng.standard_normal(at.size)).astype(np.float32)
    return Delta(raw[1:].view(stored.dtype), dtype, at, exact)


def widened(parts: list[Delta]) -> list[np.ndarray]:
    return [part.wide(0, part.values.size) for part in parts]


def known_of(name: str, parts: list[Delta]) -> Any:
    """Return what numpy measures of the parts for a method with its defaults."""
    method, known = OPERATORS[name], None
    given = [dict(method.defaults)] * len(parts)
    for number in range(method.passes(given)):
        place = Position("w", 0, 5, ("a",) * len(parts))
        total = method.measure(number, widened(parts), [1.0] * len(parts), given, place, known)
        known = method.settle(number, total, [1.0] * len(parts), given, known)
    return known


def check_merge(
    isa: str, name: str, parts: list[Delta], weights: list[float],
    parameters: list[dict[str, Any]] | None = None, begin: int = 1 << 21,
) -> None:  # fmt: skip
    method = OPERATORS[name]
    given = parameters or [dict(method.defaults)] * len(parts)
    place = Position("w", begin, 7, tuple("abcdef"[: len(parts)]))
    known = known_of(name, parts)
    expected = method.combine(widened(parts), weights, given, place, known)
    out = np.full(expected.size + 2, 7, np.float32)  # what lies around is left alone
    run = BUILDS[isa]["merge"]
    assert merge_kernels._combine(run, method, parts, weights, given, place, known, out[1:-1])
    assert out[1:-1].tobytes() == expected.tobytes(), (name, isa)
    assert out[0] == out[-1] == 7


# -------------------------------------------------------------------------------------- merging


NUMPY_ALONE = ("fisher", "coarsen")  # operators that no kernel has


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in NUMPY_ALONE])
def test_every_method_gives_numpys_bytes(name: str, isa: str):
    rng, most = np.random.default_rng(len(name)), OPERATORS[name].count
    pairs = [("BF16", "BF16"), ("F16", "BF16"), ("F32", "F16"), ("F32", "F32", "BF16")]
    for size, kind in zip((*SIZES, 513, 1100), ("steps", "normal") * 5, strict=True):
        for dtypes in pairs:
            parts = [delta_of(rng, dtype, size, kind) for dtype in dtypes][:most]
            check_merge(isa, name, parts, [0.7, -1.1, 3.0][: len(parts)])
    parts = [delta_of(rng, "BF16", 1100, "steps") for _ in range(2)]
    check_merge(isa, name, parts, [1.0, 1.0])  # sums of exactly 0
    for count in (1, 4, 6) if most is None else (most,):
        parts = [delta_of(rng, "BF16", 600, "wild") for _ in range(count)]
        check_merge(isa, name, parts, [1.0, 1.0, -0.3, 0.0, 1e-3, 2.0][:count])


@pytest.mark.parametrize("isa", BUILDS)
def test_dense_vectors_among_others_keep_all(isa: str):
    rng = np.random.default_rng(1)
    for name, more in (("ties", {}), ("dare_ties", {}), ("della", {"epsilon": 0.05})):
        for normalize in (True, False):
            given = [OPERATORS[name].defaults | {"normalize": normalize, "density": d} | more
                     for d in (0.3, 1, 0.8)]  # fmt: skip
            parts = [delta_of(rng, "BF16", 1100) for _ in given]
            check_merge(isa, name, parts, [0.7, -0.3, 0.2], given)


@pytest.mark.parametrize("isa", BUILDS)
def test_a_draw_that_is_the_limit(isa: str):
    drawn = philox.draw_uint32("7:a:w", 0, 40)
    parts = [Delta(np.full(40, 0x3F80, np.uint16), "BF16")]
    for draw in drawn[:3].tolist():
        for limit in (draw, draw + 1):  # kept is what is below it
            check_merge(isa, "dare_linear", parts, [1.0], [{"density": limit / 2**32}], begin=0)


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("threshold", [0.0, 1e-5, 1e-3, 0.1, 3e-46, 1e-40, 1.0, 1e300, 1e-300])
def test_what_is_no_change_is_the_same_for_both(isa: str, threshold: float):
    """Around the threshold: the fp32 below, at and above it, some of them exceptions."""
    near = np.abs(np.float32(threshold)) if threshold < 1e38 else np.float32(3e38)
    bits = int(near.view(np.uint32)) + np.arange(-3, 4)
    values = np.maximum(bits, 0).astype(np.uint32).view(np.float32)
    parts = [
        Delta(values, "F32"),
        Delta(-values[::-1].copy(), "F32"),
        Delta(np.zeros(7, np.uint16), "BF16", np.arange(7, dtype=np.uint32), values),
    ]
    given = [{"threshold": threshold}, {"threshold": 0.0}, {"threshold": threshold}]
    for weights in ([0.7, -1.1, 1.0], [1.0, 1.0, 1.0]):
        check_merge(isa, "ram", parts, weights, given)


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_is_merged(isa: str, dtype: str):
    patterns = np.arange(1 << 16, dtype=np.uint16).view(kernels.STORAGE_DTYPE[dtype])
    # all that can be divided by a small probability; a delta's zeros are positive
    held = np.abs(kernels.widen(patterns, dtype)) < 1e36
    finite = patterns[held & (patterns.view(np.uint16) != 0x8000)]
    parts = [Delta(finite, dtype), Delta(np.roll(finite, 1021), dtype)]
    for name in ("linear", "dare_linear", "ram", "ties"):
        weights = [0.3, -0.6]
        check_merge(isa, name, parts, weights)
    chosen = OPERATORS["della"].defaults | {"density": 0.3, "epsilon": 0.3 - 1e-9}
    check_merge(isa, "della", parts, weights, [chosen] * 2, begin=2**60)


@pytest.mark.parametrize("isa", BUILDS)
def test_quotients_are_rounded_once(isa: str):
    # sums of 53 bits, divided by sums of weights of 53 bits, to fp32: compared through wide sums
    rng = np.random.default_rng(2)
    for _ in range(4):
        weights = rng.uniform(0.1, 2, 3).tolist()
        parts = [delta_of(rng, "F32", 20_000, "normal") for _ in weights]
        given = [OPERATORS["dare_ties"].defaults | {"density": float(d)}
                 for d in rng.uniform(0.1, 0.9, 3)]  # fmt: skip
        check_merge(isa, "dare_ties", parts, weights, given)
        check_merge(isa, "ram", parts, weights)


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["values", "exact"])
def test_what_is_not_finite_is_left_to_numpy(isa: str, value: float, where: str):
    rng = np.random.default_rng(3)
    for name in ("linear", "ties", "dare_ties"):
        parts = [delta_of(rng, "F32", 1100, "normal") for _ in range(2)]
        known = known_of(name, parts)
        getattr(parts[1], where)[-1] = value
        given, place = [OPERATORS[name].defaults] * 2, Position("w", 0, 7, ("a", "b"))
        run, out = BUILDS[isa]["merge"], np.empty(1100, np.float32)
        weights = [1.0, 1.0]
        assert not merge_kernels._combine(
            run, OPERATORS[name], parts, weights, given, place, known, out
        )
    sums = BUILDS[isa]["sum_products"]
    assert merge_kernels._measure(sums, gram, parts, None) is None
    huge = [Delta(np.full(5, 3e38, np.float32), "F32")] * 2
    none = [{}, {}]
    assert not merge_kernels._combine(
        run, OPERATORS["linear"], huge, [1.0, 1.0], none, place, None, out[:5]
    )


def test_who_does_what_no_kernel_knows():
    rng = np.random.default_rng(4)
    out, place = np.empty(40, np.float32), Position("w", 0, 7, tuple("abcdefg"))
    parts = [delta_of(rng, "BF16", 40) for _ in range(7)]
    wide = Delta(np.ones(40), "F64")

    def done(operator: Any, deltas: list[Delta], weight: float = 1.0, **more: Any) -> bool:
        given = [operator.defaults | more] * len(deltas)
        weights = [weight] * len(deltas)
        return merge_kernels.combine(operator, deltas, weights, given, place, None, out)

    linear, dare = OPERATORS["linear"], OPERATORS["dare_linear"]
    assert done(linear, parts[:6]) == bool(BUILDS)
    assert not done(linear, parts)  # seven
    assert not done(linear, [wide, parts[0]])
    assert not done(linear, parts[:2], 1e200) and not done(linear, parts[:2], 1e-200)
    assert not done(dare, parts[:2], density=1e-200)
    assert not done(SimpleNamespace(defaults={}), parts[:2])  # another's operator
    assert not any(done(OPERATORS[name], parts[:4]) for name in NUMPY_ALONE)
    other = merge_methods.Method("mine", "", "", "", sparsify=lambda *given: given[0])
    assert not done(other, parts[:2])
    assert merge_kernels.measure(other, 0, parts, None) is None
    assert merge_kernels.measure(SimpleNamespace(), 0, parts[:2], None) is None
    unaligned = place._replace(begin=4)
    assert not merge_kernels.combine(dare, parts[:1], [1.0], [dare.defaults], unaligned, None, out)


# ------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("isa", BUILDS)
def test_measures_are_those_of_numpy(isa: str):
    rng = np.random.default_rng(6)
    builds = BUILDS[isa]
    for size in SIZES:
        for kind in ("steps", "normal", "wild"):
            parts = [delta_of(rng, dtype, size, kind) for dtype in ("BF16", "F32", "F16")]
            wide = widened(parts)
            counts = merge_kernels._measure(builds["count_magnitudes"], count_upper, parts, None)
            assert (counts == [count_upper(x, {}, None) for x in wide]).all()
            known = [[[0, 1], [0x3B00, 1]]] * 3
            counts = merge_kernels._measure(builds["count_within"], count_lower, parts, known)
            assert (counts == [count_lower(x, {}, known[0]) for x in wide]).all()
            limits = [[0x3B000000], [0x3B000000, 0x3F800000], [0]]
            found = merge_kernels._measure(builds["sum_products"], sum_squares, parts, limits)
            pairs = zip(wide, limits, strict=True)
            expected = np.stack([sum_squares(x, {}, known) for x, known in pairs])
            assert totals(found) == totals(expected)
            found = merge_kernels._measure(builds["sum_products"], gram, parts, None)
            assert totals(found) == totals(gram(wide))


def totals(sums: Any) -> list[int]:
    return [exact_total(pair) for pair in sums.reshape(-1, 2, 2048)]


@pytest.mark.parametrize("isa", BUILDS)
def test_sums_are_exact_whatever_their_exponents(isa: str):
    rng = np.random.default_rng(7)
    tiny, huge = float(np.float32(1e-45)), float(np.finfo(np.float32).max)
    for values in (
        [tiny, huge, -huge, tiny], [huge] * 512, [-1.0, 1.0] * 300,
        np.ldexp(1 + rng.random(2000), rng.integers(-149, 127, 2000)) * rng.choice([-1, 1], 2000),
    ):  # fmt: skip
        x = np.asarray(values, np.float32)
        y = x[::-1].copy()
        parts = [Delta(x, "F32"), Delta(y, "F32")]
        sums = merge_kernels._measure(BUILDS[isa]["sum_products"], gram, parts, None)
        exact = [sum(Fraction(a) * Fraction(b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
                 for p, q in ((x, x), (y, x), (y, y))]  # fmt: skip
        assert [Fraction(total, 2**1075) for total in totals(sums)] == exact
        assert math.isfinite(float(exact[0]))


# ------------------------------------------------------------------------------- random numbers


@pytest.mark.parametrize("isa", BUILDS)
def test_random_bits_are_those_of_numpys_generator(isa: str, monkeypatch: pytest.MonkeyPatch):
    cases = [(begin, size) for begin in (0, 1, 7, 8, 2**20 + 3, 2**35 - 9, 2**36 + 5, 2**62 + 1)
             for size in (0, 1, 8, 63, 64, 65, 200)]  # fmt: skip
    drawn = {}
    for run in (None, BUILDS[isa]["draw"]):
        monkeypatch.setattr(philox, "_kernel", lambda run=run: run)
        drawn[run] = [
            [draw("key", begin, size).tobytes() for begin, size in cases]
            for draw in (philox.draw_uint16, philox.draw_uint32)
        ]
    one, other = drawn.values()
    assert one == other
    assert philox.draw_uint32("key", 2**70, 3).size == 3  # beyond the kernel's positions


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_stochastic_rounding_gives_numpys_bytes(
    isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "_rounding_kernel", lambda: BUILDS[isa]["round_randomly"])
    rng = np.random.default_rng(8)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x1000, 0x8000, 0xFFFF):  # NaN payloads, -0 and subnormals among them
        values = (upper | np.uint32(lower)).view(np.float32)
        values = values if lower else values[np.isfinite(values)]
        random16 = rng.integers(0, 1 << 16, values.size, np.uint16)
        for given in (values, values[np.isfinite(values)][1:]):
            draws = random16[: given.size]
            with np.errstate(all="ignore"):
                found = kernels.stochastic_narrow(given, dtype, draws)
                expected = kernels.numpy_stochastic_narrow(given, dtype, draws)
            assert found.tobytes() == expected.tobytes()
    for size in (0, 1, 15, 17, 31):
        given, draws = values[20_000 : 20_000 + size], random16[:size]
        found = kernels.stochastic_narrow(given, dtype, draws)
        assert found.tobytes() == kernels.numpy_stochastic_narrow(given, dtype, draws).tobytes()


# ----------------------------------------------------------------------------------- the samples


def test_digests_are_those_of_numpy():
    found = {name: merge_kernels.sample_measure(name, None) for name in merge_kernels.DIGESTS}
    found["merge"] = merge_kernels.sample_merge(None)
    assert {name: xxh3_64_hexdigest(x) for name, x in found.items()} == merge_kernels.DIGESTS
    words = philox.numpy_words(bytes(range(16)), 2**32 - 7, 40)
    assert xxh3_64_hexdigest(words.tobytes()) == philox.DIGEST

    def rounded(values: Any, random16: Any, code: int, out: Any) -> None:
        dtype = ("BF16", "F16")[code]
        out[:] = kernels.numpy_stochastic_narrow(values, dtype, random16).view(np.uint16)

    assert xxh3_64_hexdigest(kernels._sample_rounding(rounded)) == kernels.ROUNDED
    assert {method.name for method in METHODS if method.sparsify not in merge_kernels.KINDS} == {
        "coarsen"
    }


@pytest.mark.parametrize("isa", BUILDS)
def test_a_wrong_call_is_refused(isa: str):
    builds = BUILDS[isa]
    values, out, none = np.zeros(64, np.uint16), np.zeros(64, np.float32), [b""] * 3
    part = np.zeros(1, merge_kernels.PART)
    good = [out, part, b"", 0, 0, 0, values, b"", b"", *none * 5]
    assert builds["merge"](*good) == 0

    def with_part(**fields: Any) -> np.ndarray:
        other = part.copy()
        for name, value in fields.items():
            other[name] = value
        return other

    for place, value in (
        (0, out[:63]), (0, out.view(np.uint8)[:-1]), (1, b""), (1, np.zeros(7, merge_kernels.PART)),
        (1, np.zeros(2, merge_kernels.PART)), (1, part.view(np.uint8)[:-1]),
        (1, with_part(kind=3)), (1, with_part(kind=4)), (1, with_part(kind=-1)),
        (1, with_part(dtype=3)), (1, with_part(dtype=-1)), (3, 4), (3, -8), (4, 3), (4, 4),
        (4, -1), (5, 5), (5, -1), (6, values[:-1]), (7, bytes(4)), (7, bytes(3)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            builds["merge"](*good[:place], value, *good[place + 1 :])
    far = np.array([5, 64, 2**32 - 1], np.uint32), np.ones(3, np.float32)
    builds["merge"](*good[:7], *far, *good[9:])  # positions behind the end are passed over
    fields = values, b"", b""
    counts, bins = np.zeros(32769, np.int64), np.zeros(4 * 32768, np.uint32)
    sums, key = np.zeros((2, 2048), np.int64), bytes(16)
    for name, call in (
        ("count_magnitudes", (*fields, 0, counts[:-1], bins)),
        ("count_magnitudes", (*fields, 0, counts, bins[:-1])),
        ("count_magnitudes", (*fields, 3, counts, bins)),
        ("count_within", (*fields, 0, bytes(7), counts)),
        ("count_within", (*fields, 0, bytes(8), counts)),
        ("sum_products", (*fields, *fields, 0, 0, 0, 0, sums[:1])),
        ("sum_products", (*fields, *fields, 0, 2, 0, 0, sums)),
        ("draw", (key[:8], 0, bytearray(32))), ("draw", (key, -1, bytearray(32))),
        ("draw", (key, 0, bytearray(33))),
        ("round_randomly", (out, values[1:], 0, values)),
        ("round_randomly", (out, values, 2, values)),
        ("round_randomly", (out, values, 0, values[1:])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            builds[name](*call)
