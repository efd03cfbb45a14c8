"""The addition in torch gives the bytes and the digits of `arithmetic.add`, whatever the bits."""

import numpy as np
import pytest
import torch

from skillvec.ops import arithmetic, device
from skillvec.ops.delta import NO_POSITIONS, NO_VALUES, Delta
from skillvec.ops.kernels import STORAGE_DTYPE, narrow, widen
from skillvec.ops.special import bit_pattern

DTYPES = ("BF16", "F16", "F32", "F64")
NUMEL = 70_001  # more than a step of numpy's, and no whole number of groups
FACTORS = (1.0, -1.0, 0.7, -0.3, 3e-7, 0.0, 1e30)
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def patterns(dtype: str, seed: int) -> np.ndarray:
    """Return values of any bits: subnormals, infinities, NaNs with payloads, both zeros."""
    size = STORAGE_DTYPE[dtype].itemsize
    raw = np.random.default_rng(seed).bytes(NUMEL * size)
    bits = np.frombuffer(raw, f"<u{size}").copy()
    sign = bits.dtype.type(1 << 8 * size - 1)
    bits[::7] &= sign  # zeros of both signs
    return bits.view(STORAGE_DTYPE[dtype])


def delta_of(target: np.ndarray, dtype: str, value_dtype: str, seed: int) -> Delta:
    """Return a finite delta: a third are zeros, a third about the target's size, a third any."""
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        near = widen(target, dtype).astype(np.float64) * rng.uniform(-1.5, 1.5, NUMEL)
        near = near.astype(np.float64 if value_dtype == "F64" else np.float32)
        near[::3] = widen(patterns(value_dtype, seed), value_dtype)[::3]
    near[1::3] = 0
    near[~np.isfinite(near)] = 0
    values = narrow(near, value_dtype).copy()
    values[~np.isfinite(widen(values, value_dtype))] = 0
    values[widen(values, value_dtype) == 0] = 0  # positive zeros
    if value_dtype not in ("BF16", "F16"):
        return Delta(values, value_dtype)
    at = np.flatnonzero(rng.random(NUMEL) < 0.01).astype(np.uint32)
    return Delta(values, value_dtype, at, near[at].astype(np.float32))


def as_torch(values: np.ndarray, dtype: str, place: str = "cpu") -> torch.Tensor:
    return device.as_floats(device.from_host(values.copy(), place), dtype)


def compare(
    target: np.ndarray, dtype: str, delta: Delta, lam: float, random16: np.ndarray | None,
    place: str,
) -> None:  # fmt: skip
    """Add here and there: bytes of the weights, counts and digits of the sums are the same."""
    out = np.empty_like(target)
    expected = arithmetic.add(target, dtype, delta, lam, dtype, out, random16)
    there = as_torch(target, dtype, place)
    found = device.add(there, dtype, delta, lam, random16)
    written = bit_pattern(device.to_host(found.out, dtype))
    wrong = np.flatnonzero(written != bit_pattern(out))
    assert not wrong.size, (lam, wrong[:5], target[wrong[:5]], delta.wide(0, NUMEL)[wrong[:5]])
    assert repr(found.moments) == repr(expected)
    assert device.to_host(there, dtype).tobytes() == target.tobytes()
    unmeasured = device.add(there, dtype, delta, lam, random16, measure=False)
    assert unmeasured.moments == arithmetic.add(
        target, dtype, delta, lam, dtype, out, random16, measure=False
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_becomes_what_it_becomes_on_the_host(
    dtype: str, value_dtype: str, place: str
) -> None:
    target = patterns(dtype, 1)
    delta = delta_of(target, dtype, value_dtype, 2)
    random16 = np.random.default_rng(3).integers(0, 1 << 16, NUMEL, np.uint16)
    for number, lam in enumerate(FACTORS):
        compare(target, dtype, delta, lam, random16 if number % 2 else None, place)
    compare(target, dtype, delta, 0.7, random16, place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_ties_go_to_even_and_what_is_all_but_a_tie_does_not(dtype: str, place: str) -> None:
    """Target 1 and its neighbours, half a step away, and nearer or farther by an fp32 or less."""
    step = 2.0 ** (-7 if dtype == "BF16" else -10)
    ones = narrow(np.float32(1 + step * (np.arange(NUMEL) % 4)), dtype)
    for hair in (0.0, 2.0**-24, -(2.0**-24), 2.0**-40, -(2.0**-40)):
        values = np.full(NUMEL, step / 2 + hair, np.float32)
        compare(ones, dtype, Delta(values, "F32"), 1.0, None, place)
        compare(ones, dtype, Delta(values.astype(np.float64), "F64"), 1.0, None, place)
        compare(ones, dtype, Delta(2 * values, "F32"), -0.5, None, place)


@pytest.mark.parametrize("place", PLACES)
def test_a_delta_of_zero_leaves_every_bit_alone(place: str) -> None:
    for dtype in DTYPES:
        target, zero = patterns(dtype, 4), np.zeros(NUMEL, np.float32)
        moved = device.add(as_torch(target, dtype, place), dtype, Delta(zero, "F32"), 0.7)
        assert device.to_host(moved.out, dtype).tobytes() == target.tobytes()
        assert moved.moments.changed == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_checksum_tells_one_changed_bit_and_two_that_changed_places(place: str) -> None:
    patterns = np.random.default_rng(5).integers(-(1 << 15), 1 << 15, NUMEL).astype(np.int16)
    first = device.checksum(device.from_host(patterns, place))
    factors = (np.arange(NUMEL, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    total = (patterns.astype(np.int64).view(np.uint64) * factors).sum(dtype=np.uint64)
    assert first == total.tobytes()
    others = {first}
    for at, bit in ((0, 1), (1, 1), (NUMEL - 1, 1 << 14)):
        changed = patterns.copy()
        changed[at] ^= bit
        others.add(device.checksum(device.from_host(changed, place)))
    others.add(device.checksum(device.from_host(patterns[::-1], place)))
    assert len(others) == 5


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025])
def test_any_number_of_values(numel: int) -> None:
    target, values = np.ones(numel, np.float32), np.full(numel, 0.1, np.float32)
    delta = Delta(values, "F32", NO_POSITIONS, NO_VALUES)
    compare(target, "F32", delta, 0.3, None, "cpu")
