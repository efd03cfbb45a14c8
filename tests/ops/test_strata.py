"""Counts of supports by the exponent of the weight: by hand, kernels against numpy."""

import numpy as np
import pytest
from builds import BUILDS
from xxhash import xxh3_64_hexdigest

from skillvec.ops import comparison, strata
from skillvec.ops.delta import NO_VALUES, Delta
from skillvec.ops.kernels import narrow
from skillvec.ops.statistics import Request
from skillvec.ops.strata import STRATA, call_strata, count_strata, counting, numpy_strata, pack

BF16_ONE = 0x3F80
DTYPES = ("BF16", "F16", "F32")
SIZES = (0, 1, 15, 16, 17, 1023, 1024, 1025, 2047, 5000, 70_001)


def drawn(rng: np.random.Generator, dtype: str, size: int, density: float) -> Delta:
    """Return a delta with exceptions, some of which are 0 and some in place of a 0."""
    wide = (rng.normal(size=size) * (rng.random(size) < density)).astype(np.float32)
    at = np.flatnonzero(rng.random(size) < 0.01).astype(np.uint32)
    exact = rng.normal(size=at.size).astype(np.float32)
    exact[::3] = 0
    return Delta(narrow(wide, dtype), dtype, at, exact)


def delta(*values: float) -> Delta:
    return Delta(np.float32(values), "F32")


def test_strata_by_hand() -> None:
    """1 and 1.5 have one exponent, and 1, as 2 and 0, is a power of two; signs are none."""
    weights = np.float32([1, -1.5, 1.25, 2, 0, 1.5])
    x, y = delta(1, 1, 0, 1, 0, 0), delta(1, 0, -1, -2, 0, 3)
    for dtype in ("BF16", "F16", "F32"):
        counts = numpy_strata(x, y, (narrow(weights, dtype), dtype))
        found = pack(counts)
        wanted = {127: [0, 2, 1, 0], 256: [1, 0, 0, 0], 256 + 127: [0, 0, 0, 1],
                  256 + 128: [0, 0, 0, 1]}  # fmt: skip
        assert found.numbers.tolist() == list(wanted)
        assert found.counts.tolist() == list(wanted.values())


def test_fp32_weights_are_taken_as_bf16_holds_them() -> None:
    weights = np.float32([2 - 2**-9, 1 + 2**-12, np.inf, np.nan]), "F32"
    found = pack(numpy_strata(delta(1, 1, 1, 1), delta(0, 0, 0, 0), weights))
    assert found.numbers.tolist() == [255, 256 + 127, 256 + 128, 256 + 255]


@pytest.mark.parametrize("isa", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_count_as_numpy(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(6)
    kernel = BUILDS[isa]["count_strata"]
    for n, size in enumerate(SIZES):
        x = drawn(rng, DTYPES[n % 3], size, (0.01, 0.3, 1.0)[n % 3])
        y = drawn(rng, DTYPES[n % 2], size, (1.0, 0.2)[n % 2])
        wide = drawn(rng, "F32", size, 0.95).wide(0, size)
        wide[::50] = 0.25
        weights = narrow(wide, dtype), dtype
        found = call_strata(kernel, x, y, weights)
        assert found.sum() == size
        assert np.array_equal(found, numpy_strata(x, y, weights))
    bits = np.arange(1 << 16, dtype=np.uint16)
    every = {"BF16": bits, "F16": bits.view(np.float16),
             "F32": (bits.astype(np.uint32) * 65537).view(np.float32)}[dtype]  # fmt: skip
    ones = Delta(np.ones(1 << 16, np.float32), "F32")
    found = call_strata(kernel, ones, ones, (every, dtype))
    assert np.array_equal(found, numpy_strata(ones, ones, (every, dtype)))


@pytest.mark.parametrize("isa", BUILDS)
def test_what_does_not_fit_is_refused(isa: str) -> None:
    kernel, x = BUILDS[isa]["count_strata"], delta(*[1] * 20)
    weights = np.zeros(20, np.uint16), "BF16"
    late = x._replace(positions=np.uint32([20]), exact=np.float32([1]))
    lost = x._replace(positions=np.uint32([3]), exact=NO_VALUES)
    assert call_strata(kernel, x, x, weights).sum() == 20
    for y in (late, lost, delta(*[1] * 19)):
        with pytest.raises(ValueError):
            call_strata(kernel, x, y, weights)
    for held in ((weights[0][:-1], "BF16"), (weights[0], "F32"), (np.zeros(20), "F64")):
        with pytest.raises(ValueError):
            call_strata(kernel, x, x, held)


def test_the_digest_of_the_self_check_and_fp64() -> None:
    found = comparison.sample_pairs_on_weights(numpy_strata)
    assert xxh3_64_hexdigest(found) == strata.SELF_CHECK
    y = Delta(np.float64([0, 1e-300]), "F64")
    assert pack(count_strata(delta(1, 1), y, (np.ones(2), "F64"))).counts.tolist() == [[0, 0, 1, 1]]


def test_a_pair_is_counted_by_the_weights_that_are_known() -> None:
    """Those of the second, whose buffer the next delta takes over, or else of the first."""
    buffer, tables = np.zeros(2, np.uint16), {}
    request = Request((1.0,) * 3, ((0, 1), (0, 2), (1, 2)), by_weight=(0, 1))

    def sides():
        for number, known in enumerate((True, True, False)):
            buffer[:] = BF16_ONE * known + number
            yield delta(0, 1), (buffer, "BF16") if known else None

    assert len([*counting(sides(), request, tables)]) == 3
    assert {n: pack(held).numbers.tolist() for n, held in tables.items()} == {
        0: [127], 1: [256 + 127],
    }  # fmt: skip
    assert tables[0].shape == (STRATA, 4)
