"""Supports of two deltas beside chance: by hand, kernels against numpy, and false alarms."""

from math import sqrt

import numpy as np
import pytest
from builds import BUILDS
from xxhash import xxh3_64_hexdigest

from skillvec.analysis import support_rows
from skillvec.analysis.spreads import Seen, see
from skillvec.analysis.support_rows import (
    OVERLAP,
    SIGNS,
    UNIT,
    Clusters,
    RowScores,
    add_scores,
    by_chance,
    call_scores,
    numpy_scores,
    sample_scores,
    table_of,
)
from skillvec.analysis.supports import support_row, support_terms
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import Array, narrow, widen
from skillvec.ops.strata import STRATA, Strata, numpy_strata, pack

HIDDEN = 32


def plain(numel: int, in_a: int, in_b: int, shared: int) -> Strata:
    counts = [numel - in_a - in_b + shared, in_b - shared, in_a - shared, shared]
    return Strata(np.zeros(1, np.uint16), np.array([counts]))


def test_chance_by_hand() -> None:
    """Of 4 values 2 and 2: 0, 1 or 2 the same in 1, 4 and 1 of 6 ways."""
    mean, variance = by_chance([4, 1, 0, 4], [2, 1, 0, 4], [2, 1, 0, 1])
    assert mean.tolist() == [1, 1, 0, 1]
    assert variance.tolist() == [pytest.approx(1 / 3), 0, 0, 0]


def test_terms_and_row_by_hand() -> None:
    """Two tensors, one with strata: all that both change has large weights there."""
    strata = Strata(np.uint16([7, 9]), np.array([[4, 0, 0, 0], [1, 1, 1, 1]]))
    terms = support_terms(
        np.array([8, 8]), np.array([2, 4]), np.array([2, 4]), [strata, None], False
    )
    assert terms["chance"].tolist() == [0.5, 2] and terms["chance_weights"].tolist() == [1, 2]
    assert terms["by_weight"].tolist() == [1, 0]
    assert terms["weights_var"].tolist() == pytest.approx([1 / 3, 4 / 7])
    sums = {key: column.sum() for key, column in terms.items()} | {"shared": 5.0, "agree": 4.0}
    row = support_row(sums)
    assert row["lift"] == 2 and row["lift_weights"] == pytest.approx(5 / 3)
    assert row["overlap_z"] == row["overlap_z_weights"] == pytest.approx(2 / sqrt(1 / 3 + 4 / 7))
    assert row["overlap_z_plain"] == pytest.approx(2.5 / sqrt(0.5 * 6 / 8 * 6 / 7 + 4 / 7))
    assert row["sign_z"] == row["sign_z_plain"] == pytest.approx(3 / sqrt(5))
    clusters = Clusters(np.array([3.0, 9.0]), np.array([0.0, 1.0]), np.array([[2.0, 0.0]]), 0.5,
                        np.array([1.0, 4.0]), np.array([0.5, 4.0]))  # fmt: skip
    row = support_row(sums, clusters)
    spread = 3 + 4 - 1 + (1 / 3 + 4 / 7 - 0.5)
    assert row["overlap_z"] == pytest.approx(2 / sqrt(spread))
    assert row["sign_z"] == pytest.approx(3 / sqrt(9 + 1 - 4 + 1))
    unknown = support_terms(np.array([8, 8]), np.array([2, 8]), np.array([2, 4]), [None] * 2, True)
    assert unknown["unknown"].tolist() == [1, 0]  # of a dense one nothing is missing
    assert support_row(sums | {"unknown": 1.0})["overlap_z"] is None
    nothing = dict.fromkeys(sums, 0.0)
    assert not {*support_row(nothing).values()} - {None}


def test_scores_by_hand() -> None:
    """Two rows of two: a changes three, b two, of which one with the other sign."""
    a, b = np.float32([[1, -2], [3, 0]]), np.float32([[1, 0], [-1, 0]])
    table = table_of(plain(4, 3, 2, 2))
    columns = np.zeros((2, 4), np.int64)
    rows = add_scores(a, b, None, "F32", table, columns)
    p, q = 0.75, 0.5
    values = np.array([[(1 - p) * (1 - q), (1 - p) * -q], [(1 - p) * (1 - q), p * q]])
    assert rows[:, OVERLAP] / UNIT == pytest.approx(values.sum(axis=1))
    assert columns[:, OVERLAP] / UNIT == pytest.approx(values.sum(axis=0))
    assert rows[:, 1:3].sum(axis=0).tolist() == [0, 0]  # centred
    assert rows[:, SIGNS].tolist() == [1, -1] and columns[:, SIGNS].tolist() == [0, 0]


@pytest.mark.parametrize("isa", BUILDS)
def test_kernels_score_as_numpy(isa: str) -> None:
    kernel, rng = BUILDS[isa]["support_scores"], np.random.default_rng(0)
    table = rng.integers(-(2**31), 2**31, (STRATA, 8, 4)).astype(np.int32)
    for rows, width in ((1, 1), (3, 17), (2, 1024), (2, 2500), (5, 0), (0, 5)):
        a, b, w = rng.normal(size=(3, rows, width)).astype(np.float32)
        a[rng.random(a.shape) < 0.5], b[rng.random(b.shape) < 0.5] = 0, -0.0
        for weights, dtype in ((w, "BF16"), (w, "F16"), (None, "F32")):
            found, wanted = np.ones((2, width, 4), np.int64)
            one = call_scores(kernel, a, b, weights, dtype, table, found)
            assert np.array_equal(one, numpy_scores(a, b, weights, dtype, table, wanted))
            assert np.array_equal(found, wanted)
    a = np.ones((2, 3), np.float32)
    for b, w, columns in ((a[1:], a, 3), (a, a[1:], 3), (a, a, 2)):
        with pytest.raises(ValueError):
            call_scores(kernel, a, b, w, "F32", table, np.zeros((columns, 4), np.int64))
    assert xxh3_64_hexdigest(sample_scores(numpy_scores)) == support_rows.SELF_CHECK


def test_chunks_and_fp64_change_nothing() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3 * HIDDEN, 20)) * (rng.random((2, 3 * HIDDEN, 20)) < 0.3)
    seen = see((3, HIDDEN, 20), HIDDEN)
    shared = int(((a != 0) & (b != 0)).sum())
    strata = plain(a.size, np.count_nonzero(a), np.count_nonzero(b), shared)
    found = []
    for step, dtype in ((96, np.float32), (7, np.float64)):
        scores = RowScores(seen, strata)
        for first in range(0, 96, step):
            rows = slice(first, first + step)
            scores.add(first, a[rows].astype(dtype), b[rows].astype(dtype), None, "F32")
        found.append(scores.clusters())
    for one, other in zip(*found, strict=True):
        assert np.allclose(one, other, rtol=1e-12)
    assert found[0].channels.shape == (HIDDEN, 2)
    assert found[0].cells[1] == shared


# ------------------------------------------------------------------------------- false alarms

SHAPES = [(150, HIDDEN), (48, HIDDEN), (HIDDEN, 48)]
Updates = list[tuple[Array, Array, Array | None]]  # a, b and weights, of each tensor


def judge(updates: Updates) -> dict:
    """Return the row of a pair, as the verb makes it."""
    terms, total, more = [], None, {"shared": 0.0, "agree": 0.0}
    for a, b, weights in updates:
        sides = [Delta(side.astype(np.float32).ravel(), "F32") for side in (a, b)]
        held = np.ones(a.size, np.float32) if weights is None else weights.ravel()
        strata = pack(numpy_strata(*sides, (narrow(held, "BF16"), "BF16")))
        if weights is None:
            strata = Strata(np.zeros(1, np.uint16), strata.counts)
        scores = RowScores(see(a.shape, HIDDEN), strata)
        scores.add(0, a.astype(np.float32), b.astype(np.float32), weights, "BF16")
        found = scores.clusters()
        total = found if total is None else total.plus(found)
        sizes = (np.array([n]) for n in (a.size, np.count_nonzero(a), np.count_nonzero(b)))
        terms.append(support_terms(*sizes, [strata], weights is not None))
        more["shared"] += np.count_nonzero((a != 0) & (b != 0))
        more["agree"] += np.count_nonzero(a * b > 0)
    sums = {key: sum(term[key][0] for term in terms) for key in terms[0]}
    return support_row(sums | more, total)


def rounded(values: Array) -> Array:
    return widen(narrow(values.astype(np.float32), "BF16"), "BF16")


def of_one_base(rng: np.random.Generator, shape: tuple[int, int]) -> tuple:
    """Two updates of one bf16 base whose rows have other scales: a weight decides what is kept."""
    base = rounded(rng.normal(size=shape) * 0.02 * np.exp(0.5 * rng.normal(size=(shape[0], 1))))
    return *(rounded(base + rng.normal(size=shape) * s) - base for s in (3e-5, 2e-5)), base


def with_rates(rng: np.random.Generator, shape: tuple[int, int], rates: list[Array]) -> tuple:
    changed = (rng.random(shape) < rate for rate in rates)
    return *(rng.normal(size=shape) * where for where in changed), None


def largest(rng: np.random.Generator, shape: tuple[int, int]) -> tuple:
    """Supports tied to magnitudes: the largest tenth of heavy tails."""
    values = rng.standard_t(3, size=(2, *shape))
    kept = np.abs(values) >= np.quantile(np.abs(values), 0.9, axis=(1, 2), keepdims=True)
    return *(values * kept), None


def along_channels(rng: np.random.Generator) -> Updates:
    """Channels of unequal densities, in every tensor those of the hidden axis."""
    rates = rng.beta(0.5, 3, size=(2, HIDDEN))
    sides = [[rate if shape[1] == HIDDEN else rate[:, None] for rate in rates] for shape in SHAPES]
    return [with_rates(rng, *found) for found in zip(SHAPES, sides, strict=True)]


CLASSES = {
    "sparse": lambda rng: [with_rates(rng, s, [0.1, 0.2]) for s in SHAPES],
    "tied to magnitudes": lambda rng: [largest(rng, s) for s in SHAPES],
    "bf16 of one base": lambda rng: [of_one_base(rng, s) for s in SHAPES],
    "whole rows": lambda rng: [
        with_rates(rng, s, [1.0 * (rng.random((s[0], 1)) < 0.4) for _ in "ab"]) for s in SHAPES
    ],
    "unequal rows": lambda rng: [
        with_rates(rng, s, [rng.beta(0.5, 3, size=(s[0], 1)) for _ in "ab"]) for s in SHAPES
    ],
    "unequal channels": along_channels,
}
# where supports that share a tenth of b's beyond chance are seen in all draws
STRUCTURED = {"bf16 of one base": 100, "whole rows": 5, "unequal rows": 2, "unequal channels": 2}


@pytest.mark.parametrize("kind", CLASSES)
def test_independent_supports_give_no_alarm(kind: str) -> None:
    """80 pairs: |z| > 1.96 in about 4; plain z is far too wide where there is structure."""
    rng = np.random.default_rng(3)
    rows = [judge(CLASSES[kind](rng)) for _ in range(80)]
    z = np.array([row["overlap_z"] for row in rows])
    assert abs(z.mean()) < 0.35 and 0.8 < z.std() < 1.2
    assert np.count_nonzero(np.abs(z) > 1.96) <= 9
    signs = np.array([row["sign_z"] for row in rows])
    assert 0.8 < signs.std() < 1.2
    square = np.mean([row["overlap_z_plain"] ** 2 for row in rows])
    assert square > STRUCTURED.get(kind, 0) and (kind in STRUCTURED or square < 1.5)
    if kind == "bf16 of one base":
        lifts = [row["lift_weights"] for row in rows]
        assert np.mean(lifts) == pytest.approx(1, abs=0.01)
        assert np.mean([row["lift"] for row in rows]) > 1.5


@pytest.mark.parametrize("kind", CLASSES)
def test_shared_supports_are_seen(kind: str) -> None:
    """Three in ten values of b stand where a has its own."""
    rng = np.random.default_rng(4)
    for _ in range(5):
        updates = []
        for a, b, weights in CLASSES[kind](rng):
            moved = np.where(a != 0, np.abs(b).max() * rng.choice([-1, 1], a.shape), 0)
            updates.append((a, np.where(rng.random(a.shape) < 0.3, moved, b), weights))
        assert judge(updates)["p_overlap"] < 0.01


def test_a_vector_has_values_in_place_of_rows() -> None:
    a, b = np.float32([[1, 1, 0, 0]]), np.float32([[1, 0, 1, 0]])
    scores = RowScores(Seen(1, 4, see((4,), 4).axes), plain(4, 2, 2, 1))
    scores.add(0, a, b, None, "F32")
    found = scores.clusters()
    assert found.across[0] == found.cells[0] == 4 / 16 and found.effects == 0
    assert found.variances(np.array([1 / 3, 1.0])).tolist() == pytest.approx([1 / 3, 1.0])
