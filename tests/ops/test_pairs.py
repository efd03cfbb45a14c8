"""The compiled passes that make deltas and apply them, against numpy, to the bit and the digit.

Without a compiled module the self-checks alone are here: tests/ops/test_arithmetic.py tests numpy.
"""

from itertools import product

import numpy as np
import pytest
from builds import BUILDS
from families import bits
from xxhash import xxh3_64_hexdigest

from skillvec.ops import arithmetic, compiled, moments
from skillvec.ops.arithmetic import Exactness, Subtraction
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import STORAGE_DTYPE, widen
from skillvec.ops.moments import Moments

DTYPES = ("BF16", "F16", "F32")
SIZES = (1, 17, 1007, 1024, 2064)
PATTERNS = {"BF16": 0x7F80, "F16": 0x7C00}


def patterns(dtype: str, numel: int, rng: np.random.Generator) -> np.ndarray:
    """Return values of every kind: NaN, infinities, zeros of both signs, subnormals, the rest."""
    width = STORAGE_DTYPE[dtype].itemsize
    drawn = rng.integers(0, 1 << 8 * width, numel, dtype=np.uint64)
    rare = rng.random(numel)
    sign = np.uint64(1 << 8 * width - 1)
    drawn[rare < 0.02] &= sign  # zeros
    small = (rare > 0.02) & (rare < 0.06)
    drawn[small] &= sign | np.uint64(0x3F if width == 2 else 0x3FFFFF)  # subnormal
    return drawn.astype(f"<u{width}").view(STORAGE_DTYPE[dtype])


def near(one: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return values a few steps off, some of them the same, as training leaves them."""
    steps = rng.integers(-3, 4, one.size) * (rng.random(one.size) < 0.7)
    moved = bits(one).astype(np.int64) + steps
    return moved.astype(bits(one).dtype).view(one.dtype)


def sides(kind: str, dtypes: tuple[str, str], numel: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([numel, DTYPES.index(dtypes[0]), DTYPES.index(dtypes[1])])
    one = patterns(dtypes[0], numel, rng)
    if kind == "near" and dtypes[0] == dtypes[1]:
        return one, near(one, rng)
    other = patterns(dtypes[1], numel, rng)
    if kind == "trained":
        wide = rng.normal(scale=0.02, size=numel).astype(np.float32)
        step = rng.normal(scale=1e-3, size=numel).astype(np.float32)
        one = arithmetic.narrow(wide, dtypes[0])
        other = arithmetic.narrow(np.where(rng.random(numel) < 0.6, wide + step, wide), dtypes[1])
    return one, other


def told(found: Subtraction) -> list[object]:
    delta = found.delta
    arrays = delta.values, delta.positions, delta.exact, found.replaced, found.bits, found.lost
    counts = found.delta_sq, found.changed, found.unrestored, found.nonfinite
    return [part.tobytes() for part in arrays] + [repr(count) for count in counts]


def unaligned(values: np.ndarray) -> np.ndarray:
    """Return the values one byte off any boundary, as a header of odd length leaves them."""
    room = np.empty(values.nbytes + 1, np.uint8)[1:]
    room[:] = values.view(np.uint8)
    return room.view(values.dtype)


CASES = [
    (kind, tuned, base)
    for kind, tuned, base in product(("drawn", "near", "trained"), DTYPES, DTYPES)
    if kind != "near" or tuned == base
]


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize(("kind", "tuned_dtype", "base_dtype"), CASES)
def test_subtract_is_numpys(isa: str, kind: str, tuned_dtype: str, base_dtype: str) -> None:
    run = BUILDS[isa]["subtract"]
    for numel in SIZES:
        tuned, base = sides(kind, (tuned_dtype, base_dtype), numel)
        for value_dtype, exactness in product(DTYPES, Exactness):
            out = [np.empty(numel, STORAGE_DTYPE[value_dtype]) for _ in range(2)]
            given = tuned_dtype, unaligned(base), base_dtype, value_dtype, exactness
            scratch = np.empty(12 * numel, np.uint8)
            found = arithmetic._subtract_compiled(run, unaligned(tuned), *given, out[0], scratch)
            expected = arithmetic._subtract_pieces(tuned, *given, out[1])
            assert told(found) == told(expected), (numel, value_dtype, exactness)


def by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_add_kernel", lambda: None)


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize(("kind", "target_dtype", "delta_dtype"), CASES)
def test_add_is_numpys(
    isa: str, kind: str, target_dtype: str, delta_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for numel, out_dtype, lam in product(SIZES, DTYPES, (1.0, -0.7, 1e-60)):
        target, values = sides(kind, (target_dtype, delta_dtype), numel)
        values = np.where(np.isfinite(widen(values, delta_dtype)), values, 0).astype(values.dtype)
        at = np.unique(np.random.default_rng(numel).integers(0, numel, numel // 50))
        exact = widen(values[at], delta_dtype) * np.float32(1.001)
        exact[~np.isfinite(exact)] = 0
        delta = Delta(unaligned(values), delta_dtype, at.astype(np.uint32), exact)
        results = []
        for kernel in (BUILDS[isa]["add"], None):
            monkeypatch.setattr(moments, "_add_kernel", lambda kernel=kernel: kernel)
            out = unaligned(np.empty(numel, STORAGE_DTYPE[out_dtype]))
            moved = arithmetic.add(target, target_dtype, delta, lam, out_dtype, out)
            again = moments.moments(target, target_dtype, delta, out, out_dtype)
            assert again == moved or moved.target_nonfinite
            results.append((out.tobytes(), moved))
        assert results[0] == results[1], (numel, out_dtype, lam)


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("dtype", PATTERNS)
def test_every_pattern_of_16_bits(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65,536, shifted against each other: as tuned and base, as target and delta."""
    one = np.arange(1 << 16, dtype=np.uint16).view(STORAGE_DTYPE[dtype])
    scratch = np.empty(12 * one.size, np.uint8)
    for step in (1, 0x81, 0x8000, 0x1234):
        other = (np.arange(1 << 16) + step).astype(np.uint16).view(one.dtype)
        given = dtype, one, dtype, dtype, Exactness.WHOLE
        out = [np.empty_like(one) for _ in range(2)]
        run = BUILDS[isa]["subtract"]
        found = arithmetic._subtract_compiled(run, other, *given, out[0], scratch)
        assert told(found) == told(arithmetic._subtract_pieces(other, *given, out[1]))
        finite = (bits(other) & PATTERNS[dtype]) != PATTERNS[dtype]
        delta = Delta(np.where(finite, bits(other), 0).astype(np.uint16).view(one.dtype), dtype)
        results: list[tuple[bytes, Moments]] = []
        for kernel in (BUILDS[isa]["add"], None):
            monkeypatch.setattr(moments, "_add_kernel", lambda kernel=kernel: kernel)
            moved = arithmetic.add(one, dtype, delta, 0.7, dtype, out[0])
            results.append((out[0].tobytes(), moved))
        assert results[0] == results[1]


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e19, 1e25])
@pytest.mark.parametrize("isa", BUILDS)
def test_sums_beyond_fp32_are_added_again_in_fp64(
    isa: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    base, step = (rng.normal(scale=scale, size=3000).astype(np.float32) for _ in range(2))
    run, out = BUILDS[isa]["subtract"], np.empty_like(base)
    given = base + step, "F32", base, "F32", "F32", Exactness.WHOLE
    found = arithmetic._subtract_compiled(run, *given, out, np.empty(36_000, np.uint8))
    expected = arithmetic._subtract_pieces(*given, np.empty_like(base))
    wide = expected.delta.wide(0, 3000).astype(np.float64)
    assert found.delta_sq == expected.delta_sq == pytest.approx(wide @ wide, rel=1e-6)
    results = []
    for kernel in (BUILDS[isa]["add"], None):
        monkeypatch.setattr(moments, "_add_kernel", lambda kernel=kernel: kernel)
        results.append(arithmetic.add(base, "F32", expected.delta, 1.0, "F32", out))
    assert results[0] == results[1] and results[0].delta_sq == expected.delta_sq


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("name", ["subtract", "add"])
def test_buffers_that_do_not_fit_are_refused(isa: str, name: str) -> None:
    half, wide = np.zeros(32, np.uint16), np.zeros(32, np.float32)
    nothing = np.zeros(0, np.uint32)
    calls = {
        "subtract": [half, half, 0, 0, 0, 2, half.copy(), np.zeros(32, np.uint64),
                     np.zeros(32, np.uint32), np.zeros(4)],
        "add": [half, half, nothing, nothing, 0, 0, 0, 1.0, half.copy(), 1, 1, np.zeros(6)],
    }  # fmt: skip
    right = calls[name]
    run = BUILDS[isa][name]
    run(*right)
    for place, value in enumerate(right):
        if isinstance(value, np.ndarray):
            wrongs: list[object] = [value[:-1] if value.size else np.zeros(1, np.uint32)]
        elif name == "add" and place in (7, 9, 10):  # lam, and two truths
            continue
        else:
            wrongs = [3, -1, 1 << 40] if place != 5 or name == "add" else [3, -1]
        for wrong in wrongs:
            with pytest.raises(ValueError, match="do not fit"):
                run(*right[:place], wrong, *right[place + 1 :])
    with pytest.raises(ValueError, match="do not fit"):
        run(wide, *right[1:])


def test_the_self_checks_expect_what_numpy_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    by_numpy(monkeypatch)
    made = arithmetic.subtract_sample(arithmetic._subtract_pieces)
    assert xxh3_64_hexdigest(made) == arithmetic.SUBTRACT_CHECK
    assert xxh3_64_hexdigest(moments.add_sample(arithmetic.add)) == moments.ADD_CHECK


def test_a_kernel_that_is_one_bit_off_is_not_used() -> None:
    if not BUILDS:
        return
    run = next(iter(BUILDS.values()))["subtract"]

    def wrong(*given: object) -> int:
        count = run(*given)
        given[6].view(np.uint8)[7] ^= 1  # type: ignore[attr-defined]
        return count

    def sample(kernel: compiled.Kernel) -> bytes:
        scratch = np.empty(12 * 4073, np.uint8)
        return arithmetic.subtract_sample(
            lambda *given: arithmetic._subtract_compiled(kernel, *given, scratch)
        )

    assert xxh3_64_hexdigest(sample(run)) == arithmetic.SUBTRACT_CHECK
    assert xxh3_64_hexdigest(sample(wrong)) != arithmetic.SUBTRACT_CHECK
