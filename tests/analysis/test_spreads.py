"""Variances of an inner product under its nulls: axes by shape, sums by chunk, rotations drawn."""

import numpy as np
import pytest

from skillvec.analysis.spreads import (
    BUCKETS,
    EXACT,
    FLAT,
    LONGEST,
    Axis,
    Seen,
    SpreadSums,
    Totals,
    Units,
    draw_signs,
    hidden_size,
    see,
    turn,
)


def test_the_hidden_axis_is_what_most_tensors_have() -> None:
    layer = [(64, 64), (32, 64), (160, 64), (64, 160), (64,)]
    assert hidden_size([(500, 64), *layer, *layer, (64,)]) == 64
    assert hidden_size([(160, 64), (64, 160), (160, 64)]) == 64  # as many; more end in it
    assert hidden_size([(1, 1), (), (LONGEST + 1,)]) == 0


@pytest.mark.parametrize(
    "shape,rows,columns,axes",
    [
        ((160, 8), 160, 8, [(8, True, True)]),
        ((8, 160), 8, 160, [(8, False, True)]),
        ((8, 8), 8, 8, [(8, True, True), (8, False, True)]),
        ((8,), 1, 8, [(8, True, True)]),
        ((8, 1), 1, 8, [(8, True, True)]),
        ((4, 8, 160), 32, 160, [(8, False, True)]),  # experts
        ((8, 3, 5), 8, 15, [(8, False, True)]),
        ((8, 3, 2, 2), 8, 12, [(8, False, True)]),
        ((5, 3, 2, 2), 5, 12, [(12, True, False)]),
        ((7, 6), 7, 6, [(6, True, False)]),
        ((7, LONGEST + 1), 7, LONGEST + 1, [(7, False, False)]),
        ((LONGEST + 5,), 65, FLAT, [(FLAT, True, False)]),
        ((), 1, 1, [(1, True, False)]),
    ],
)
def test_how_a_tensor_is_seen(shape, rows: int, columns: int, axes: list) -> None:
    assert see(shape, 8) == Seen(rows, columns, tuple(Axis(*axis) for axis in axes))


def spread_of(a: np.ndarray, b: np.ndarray, hidden: int, step: int = 10**6, pair=(0, 1)):
    seen = see(a.shape, hidden)
    signs = [draw_signs("s", axis.size) for axis in seen.axes]
    sums = SpreadSums(seen, signs, [pair])
    flat = [x.reshape(seen.rows, seen.columns).astype(np.float32) for x in (a, b)]
    for first in range(0, seen.rows, step):
        sums.add(first, [x[first : first + step] for x in flat])
    return sums.spread(0, 1.0)


def model(rng: np.random.Generator, hidden: int) -> list[np.ndarray]:
    """Return tensors of every kind on an axis, matrices with structure of rank 1."""
    shapes = ((40, hidden), (hidden, 24), (3, hidden, 5), (hidden,), (hidden, hidden))
    made = []
    for shape in shapes:
        made.append(rng.normal(size=shape))
        if len(shape) == 2:
            made[-1] += np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1]))
    return made


@pytest.mark.parametrize("hidden", [16, 48])
def test_the_variance_of_rotations_is_that_of_drawn_ones(hidden: int) -> None:
    """4,000 orthogonal matrices of Haar, each in all tensors of a model at once."""
    rng, total = np.random.default_rng(4), Totals()
    one, other = model(rng, hidden), model(rng, hidden)
    one[-1] = other[-1] = np.zeros((hidden, hidden))  # which of its axes is meant is no question
    for a, b in zip(one, other, strict=True):
        total.add(spread_of(a, b, hidden))
    found = total.variances()
    middle = np.zeros((hidden, hidden))
    for a, b, axis in zip(one[:4], other[:4], (1, 0, 1, 0), strict=True):
        x, y = (np.moveaxis(side, axis, -1).reshape(-1, hidden) for side in (a, b))
        middle += x.T @ y
    drawn, upper = np.linalg.qr(rng.normal(size=(4000, hidden, hidden)))
    turns = drawn * np.sign(np.einsum("nii->ni", upper))[:, None]
    products = np.einsum("nij,ji->n", turns, middle)  # tr(R M)
    assert found.rotation.variance == pytest.approx((middle**2).sum() / hidden, rel=1e-4)
    assert found.rotation.variance == pytest.approx(products.var(), rel=0.1)
    assert found.rotation.degrees == pytest.approx(EXACT)
    values = np.linalg.svd(middle, compute_uv=False) ** 2
    assert found.rotation.rank == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-3)
    assert total.channels == pytest.approx(np.diag(middle), rel=1e-3, abs=1e-3)
    assert found.channels == pytest.approx((float((np.diag(middle) ** 2).sum()), hidden), rel=1e-4)


@pytest.mark.parametrize("shape", [(700, 300), (300, 90), (3, 300, 20), (300, 300)])
@pytest.mark.parametrize("step", [1, 7, 128, 299])
def test_chunks_change_nothing(shape: tuple[int, ...], step: int) -> None:
    if step == 1 and len(shape) == 2 and shape[0] > 300:
        step = 2
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, *shape))
    whole, found = spread_of(a, b, 300), spread_of(a, b, 300, step)
    assert found.sketch == pytest.approx(whole.sketch, rel=1e-3, abs=1e-2)
    assert found.channels == pytest.approx(whole.channels, rel=1e-4, abs=1e-3)
    for one, other in ((found.stored, whole.stored), (found.across, whole.across)):
        assert one.number == other.number and one.square == pytest.approx(other.square, rel=1e-5)


def test_a_sketch_has_the_right_mean_and_spread() -> None:
    """Of rank 1 over 500 channels: the mean of 300 keys, their spread, and the rank."""
    rng = np.random.default_rng(6)
    u, v = rng.normal(size=(2, 500))
    exact = float((u @ u) * (v @ v)) / 500
    found = []
    for key in range(300):
        signs = draw_signs(str(key), 500)
        halves = [np.append(x * signs, np.zeros(12)).reshape(-1, BUCKETS).sum(0) for x in (u, v)]
        found.append(turn(np.outer(*halves), u * v))
    variances = np.array([one.variance for one in found]) / exact
    assert variances.mean() == pytest.approx(1, abs=4 * variances.std() / np.sqrt(300))
    ranks = np.array([one.rank for one in found])
    assert ranks.min() >= 1 and ranks.max() < 1.1
    degrees = np.mean([one.degrees for one in found])
    assert variances.std() == pytest.approx(np.sqrt(2 / degrees), rel=0.2)


def test_units_of_rows_and_of_one_row() -> None:
    a, b = np.arange(12.0).reshape(4, 3), np.ones((4, 3))
    found = spread_of(a, b, 0)
    assert found.stored == found.across == Units(3.0**2 + 12**2 + 21**2 + 30**2, 4)
    assert found.channels.tolist() == [18, 22, 26] and not found.is_shared
    one = spread_of(np.array([3.0, 5.0]), np.array([2.0, -2.0]), 2)
    assert one.is_shared and one.stored == Units(2.0 * 2.0**2, 2)  # (-1)(2), (1)(-2), mean 4 * 0
    alike = spread_of(np.array([3.0, 3.0, 3.0]), np.array([2.0, 2.0, 2.0]), 3)
    assert alike.stored == Units(18.0**2, 1)  # one sign, however many values


def test_slices_across_the_axis_where_rows_are_channels() -> None:
    a = np.arange(12.0).reshape(2, 2, 3)  # two matrices whose rows are the axis
    found = spread_of(a, np.ones_like(a), 2)
    slices = a.sum(axis=1).ravel()
    assert found.across == Units(float(slices @ slices), 6)
    assert found.stored.number == 4 and found.channels.tolist() == [3 + 21, 12 + 30]


def test_tensors_without_the_axis_have_their_own() -> None:
    rng, total = np.random.default_rng(7), Totals()
    a, b = rng.normal(size=(2, 9, 6))
    total.add(spread_of(a, b, 4), draw_signs("c", 6))
    total.add(spread_of(a[:4, :4], b[:4, :4], 4), draw_signs("c", 4))
    found = total.variances()
    own, shared = a.T @ b, a[:4, :4].T @ b[:4, :4]
    other = a[:4, :4] @ b[:4, :4].T
    shared = max(shared, other, key=lambda m: float((m**2).sum()))
    expected = float((own**2).sum()) / 6 + float((shared**2).sum()) / 4
    assert found.rotation.variance == pytest.approx(expected, rel=1e-4)
    signed = np.diag(own) @ draw_signs("c", 6) + np.diag(shared) @ draw_signs("c", 4)
    assert found.control == pytest.approx(signed, rel=1e-4)
    assert Totals().channels is None


def test_signs_are_addressed_by_their_key() -> None:
    found = draw_signs("a", 1000)
    assert {*found} == {-1, 1} and abs(found.mean()) < 0.15
    assert np.array_equal(draw_signs("a", 70), found[:70])
    assert not np.array_equal(draw_signs("b", 1000), found)
