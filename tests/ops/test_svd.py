"""Singular subspaces: numpy's full SVD in fp64 as oracle, numbers by hand, planted ones, laws."""

import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillvec.errors import IncompatibleError, UsageError
from skillvec.ops import svd
from skillvec.ops.kernels import Array
from skillvec.ops.svd import Spectrum, decompose, resolve_device, shares_inside
from skillvec.verbs.relations import alignment_ratio, interference, principal_angles


def normal(m: int, n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((m, n))


def orthonormal(m: int, n: int, seed: int = 0) -> Array:
    return np.linalg.qr(normal(m, n, seed))[0]


def with_values(values: Array, m: int, n: int, seed: int = 0) -> Array:
    k = len(values)
    return (orthonormal(m, k, seed) * values) @ orthonormal(n, k, seed + 1000).T


def of(matrix: Array, k: int = 4, seed: int = 0) -> Spectrum:
    return decompose(np.asarray(matrix, np.float32), k, "cpu", seed)


def entropy_rank(values: Array) -> float:
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def krylov(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices with min(m, n) above 8 (k + 8) go the way of large ones."""
    monkeypatch.setattr(svd, "EXACT", 0)


def check(found: Spectrum, matrix: Array, k: int, tolerance: float = 3e-6) -> None:
    """Compare all that a Spectrum says with numpy's SVD of the matrix in fp64."""
    matrix = np.asarray(matrix, np.float32).astype(np.float64)
    values = np.linalg.svd(matrix, compute_uv=False)
    kept = int((values[:k] > 1e-5 * values[0]).sum())
    assert found.shape == matrix.shape and found.left.dtype == found.right.dtype == np.float32
    assert found.left.shape == (matrix.shape[0], kept)
    assert found.right.shape == (matrix.shape[1], kept)
    np.testing.assert_allclose(found.values, values[:kept], atol=tolerance * values[0])
    for side in (found.left, found.right):
        np.testing.assert_allclose(side.T @ side, np.eye(kept), atol=3e-6)
    bound = (found.error + tolerance) * values[0]
    image = matrix @ found.right - found.left * found.values
    assert np.linalg.norm(image, axis=0).max() <= tolerance * values[0]
    residual = np.linalg.norm(matrix.T @ found.left - found.right * found.values, axis=0)
    assert residual.max() <= bound
    assert found.error * values[0] <= residual.max() + tolerance * values[0]
    assert found.norm_sq == pytest.approx((values**2).sum(), rel=1e-6)
    assert found.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-4)


MATRICES = {
    "tall": normal(40, 7),
    "wide": normal(7, 40),
    "square": normal(12, 12),
    "rank 3": normal(12, 3) @ normal(3, 9, 1),
    "rank 1": normal(9, 1) @ normal(1, 12, 1),
    "equal values": with_values(np.array([3, 3, 3, 1, 1]), 9, 8),
    "identity": np.eye(6),
    "a row": normal(1, 11),
    "a column": normal(11, 1),
    "one value": np.full((1, 1), -2.0),
    "tiny": 1e-25 * normal(12, 9),
    "huge": 1e15 * normal(12, 9),
    "one entry": np.eye(6, 9, 2)[::-1] * (np.arange(9) == 4),
}


@pytest.mark.parametrize("k", [1, 4, 50])
@pytest.mark.parametrize("name", MATRICES)
def test_small_matrices_agree_with_numpy(name: str, k: int) -> None:
    matrix = MATRICES[name]
    found = of(matrix, k)
    check(found, matrix, k)
    assert found.exact and found.effective_rank_error == 0 and found.error < 1e-6
    values = np.linalg.svd(np.asarray(matrix, np.float32).astype(float), compute_uv=False)
    assert found.effective_rank == pytest.approx(entropy_rank(values), rel=1e-5)


DECAYING = {
    "powers of .8": with_values(0.8 ** np.arange(90), 130, 90),
    "1 / i": with_values(1 / np.arange(1.0, 91), 90, 110),
    "planted": 20 * normal(130, 4) @ normal(4, 90, 1) + normal(130, 90, 2),
    "rank 3": normal(130, 3) @ normal(3, 90, 1),
    "rank 30": normal(130, 30) @ normal(30, 90, 1),
    "identity": np.eye(90),
    "three rows": normal(130, 90) * (np.arange(130) < 3)[:, None],
    "one entry": np.eye(90, 130) * (np.arange(130) == 4),
    "a block of ones": np.eye(90)[:, :9] @ np.ones((9, 9)) @ np.eye(9, 130),
    "sparse": normal(100, 120) * (normal(100, 120, 1) > 2),
    "tiny": 1e-25 * normal(130, 90),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", DECAYING)
def test_the_large_way_agrees_with_numpy(name: str, k: int, krylov: None) -> None:
    matrix = DECAYING[name]
    found = of(matrix, k)
    check(found, matrix, k, 1e-5)
    assert not found.exact and found.error < 1e-3
    values = np.linalg.svd(np.asarray(matrix, np.float32).astype(float), compute_uv=False)
    off = abs(found.effective_rank - entropy_rank(values))
    assert off <= 3 * found.effective_rank_error + 1e-3
    if len(found.values) < k or (name == "rank 3" and k == 3):  # nothing is left to estimate
        assert found.effective_rank_error < 1e-3


@pytest.mark.parametrize("passes", [2, 4])
def test_a_flat_spectrum_states_a_larger_error_and_keeps_within_it(
    passes: int, krylov: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "PASSES", (passes,))
    flat, steep = normal(120, 100), with_values(0.5 ** np.arange(100), 120, 100)
    found, other = of(flat), of(steep)
    values = np.linalg.svd(flat, compute_uv=False)
    assert found.error > 1e-2 > 100 * other.error
    for value in found.values:  # Weyl
        assert abs(values - value).min() <= found.error * values[0]
    short = values[:4] - found.values
    assert 1e-3 * values[0] < short.max() and short.min() > -1e-5
    residual = np.linalg.norm(flat.T @ found.left - found.right * found.values, axis=0).max()
    assert found.error == pytest.approx(residual / found.values[0], rel=1e-4)


def test_the_angle_to_a_planted_vector_keeps_within_the_error_over_the_gap(
    krylov: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "PASSES", (2,))
    values = np.append(1.0, np.linspace(0.8, 0, 99))
    matrix = with_values(values, 120, 100)
    found = of(matrix, 1)
    true = orthonormal(100, 100, 1000)[:, 0]
    sine = np.linalg.norm(true - found.right[:, 0] * (found.right[:, 0] @ true))
    assert 1e-3 < sine <= found.error * found.values[0] / (found.values[0] - 0.8)


@pytest.mark.parametrize(
    "matrix", [normal(110, 100), with_values(0.95 ** np.arange(100), 110, 100)]
)
def test_the_effective_rank_keeps_within_its_error_over_seeds(matrix: Array, krylov: None) -> None:
    true = entropy_rank(np.linalg.svd(matrix, compute_uv=False))
    found = [of(matrix, 1, seed) for seed in range(6)]
    assert len({one.effective_rank for one in found}) == 6
    score = [(one.effective_rank - true) / one.effective_rank_error for one in found]
    assert max(map(abs, score)) < 3 and abs(np.mean(score)) < 1.2
    assert all(0 < one.effective_rank_error < 0.15 * true for one in found)


@pytest.mark.parametrize("passes", [2, 4])
def test_the_effective_ranks_error_covers_few_passes(
    passes: int, krylov: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "PASSES", (passes,))
    matrix = normal(110, 110)
    true = entropy_rank(np.linalg.svd(matrix, compute_uv=False))
    for seed in range(4):
        found = of(matrix, 1, seed)
        assert abs(found.effective_rank - true) < found.effective_rank_error < 0.5 * true


def test_a_krylov_space_that_is_exhausted_speaks_for_the_rest(
    krylov: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "PASSES", (4,))
    found = of(np.eye(110), 1)
    assert found.effective_rank == pytest.approx(110) and found.error < 1e-5


def test_passes_go_on_until_the_residual_is_small_which_the_recurrence_knows(
    krylov: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    def spy(band: Array, size: int) -> tuple[Array, ...]:
        found = ritz(band, size)
        seen.append((size, found[3][:2].max() / found[1][0]))
        return found

    ritz = svd._ritz
    monkeypatch.setattr(svd, "_ritz", spy)
    monkeypatch.setattr(svd, "PASSES", (2, 4, 6))
    found = of(normal(110, 100), 2)
    assert [size for size, _ in seen] == [20, 40, 60, 60, 30]
    assert seen[2][1] == pytest.approx(found.error, rel=1e-3)
    assert seen[0][1] > seen[1][1] > seen[2][1] > svd.TOLERANCE
    seen.clear()
    of(normal(110, 1) @ normal(1, 100, 1), 2)
    assert [size for size, _ in seen] == [20, 20, 10]


def test_the_same_seed_gives_the_same_numbers_whatever_other_generators_do(krylov: None) -> None:
    matrix = normal(110, 100)
    one = of(matrix)
    torch.manual_seed(1)
    other, seeded = of(matrix), of(matrix, seed=1)
    for field, before, after in zip(Spectrum._fields, one, other, strict=True):
        assert np.array_equal(before, after), field
    assert not np.array_equal(one.left, seeded.left)
    np.testing.assert_allclose(one.values, seeded.values, rtol=1e-5)


# ---------------------------------------------------------------------------------------- by hand


def test_ranks_by_hand() -> None:
    two = of([[0, 3], [4, 0]])
    assert two.values == pytest.approx([4, 3]) and two.norm_sq == 25
    assert two.stable_rank == pytest.approx(25 / 16)
    assert two.effective_rank == pytest.approx(7 / (4 ** (4 / 7) * 3 ** (3 / 7)))  # 1.9796
    assert of(np.eye(3)).effective_rank == pytest.approx(3)
    assert of([[1, 2], [2, 4]]).effective_rank == pytest.approx(1, abs=1e-5)
    assert of([[1, 2], [2, 4]]).stable_rank == pytest.approx(1)


def test_shares_and_alignment_by_hand() -> None:
    matrix = np.array([[1, 2], [3, 4]], np.float32)  # |A|^2 = 30
    inside = of([[0, 7], [0, 0]], 1)  # u = e1, v = e2
    # u'A = (1, 2), A v = (2, 4), u'A v = 2
    assert shares_inside(matrix, inside, "cpu") == pytest.approx((5 / 30, 20 / 30, 4 / 30))
    assert alignment_ratio(matrix, inside, "cpu") == pytest.approx((5 / 30) ** 0.5)
    whole = of([[1, 0], [0, 2]], 2)
    assert shares_inside(matrix, whole, "cpu") == pytest.approx((1, 1, 1))


def test_angles_and_interference_by_hand() -> None:
    one = of([[2, 0], [0, 0]], 1)
    other = of(3 * np.outer([0.6, 0.8], [0.8, 0.6]), 1)
    left, right = principal_angles(one, other)
    assert left == pytest.approx([53.1301024], abs=1e-5)
    assert right == pytest.approx([36.8698976], abs=1e-5)
    # U'U - I = .6 X and V'V - I = .8 X, X the exchange: .48 X S X, S = diag(2, 3)
    assert interference([one, other]) == pytest.approx((0.48 * 5, 0.48))
    third = of([[0, 0], [0, 5]], 1)  # orthogonal to one; .8 and .6 to other
    # rows of (U'U - I) S: (0, 1.8, 0), (1.2, 0, 4), (0, 2.4, 0); of V'V - I:
    # (0, .8, 0), (.8, 0, .6), (0, .6, 0); product: 1.44 1.08 / .96 + 2.4 / 1.92 1.44
    assert interference([one, other, third]) == pytest.approx((9.24, 0.924))


# ---------------------------------------------------------------------------------------- planted


@pytest.mark.parametrize("change", [lambda a: a, lambda a: 30 * a, lambda a: -a])
def test_scale_and_sign_leave_subspaces_alone(change: Callable[[Array], Array]) -> None:
    matrix = with_values(np.array([4, 3, 2, 1.0]), 30, 20)
    one, other = of(matrix), of(change(matrix))
    assert max(map(max, principal_angles(one, other))) < 1e-4
    assert interference([one, other]).relative == pytest.approx(1, abs=1e-5)
    assert interference([other] * 3).relative == pytest.approx(4, abs=1e-4)  # (T - 1)^2
    assert shares_inside(change(matrix).astype(np.float32), one, "cpu") == pytest.approx((1, 1, 1))


def test_orthogonal_on_one_side_or_shared_in_two_dimensions() -> None:
    u, v = orthonormal(30, 10), orthonormal(20, 10)
    one, other = of((u[:, :4] * [4, 3, 2, 1]) @ v[:, :4].T), of(u[:, 4:8] @ v[:, :4].T)
    left, right = principal_angles(one, other)
    assert left == pytest.approx([90] * 4, abs=1e-4) and right == pytest.approx([0] * 4, abs=1e-4)
    assert interference([one, other]).raw == pytest.approx(0, abs=1e-4)
    matrix = ((u[:, 4:8] * [4, 3, 2, 1]) @ v[:, :4].T).astype(np.float32)
    assert shares_inside(matrix, one, "cpu") == pytest.approx((0, 1, 0), abs=1e-6)
    left, right = principal_angles(one, of(u[:, 2:6] @ v[:, 2:6].T))
    assert left == pytest.approx([0, 0, 90, 90], abs=1e-4) == right
    # of sixes and fours: as many angles as the fewer
    assert len(principal_angles(one, of(u[:, :6] @ v[:, :6].T, 6))[0]) == 4


@pytest.mark.parametrize("angle", [1e-3, 30, 89.999])
def test_small_and_large_angles_stand_side_by_side(angle: float) -> None:
    q = orthonormal(50, 6)
    turns = np.radians([angle, 60])
    turned = q[:, :2] * np.cos(turns) + q[:, 2:4] * np.sin(turns)
    found = principal_angles(of(q[:, :2] @ q[:, :2].T), of(turned @ q[:, :2].T))[0]
    assert found == pytest.approx(sorted([angle, 60]), abs=1e-5)


def test_chance() -> None:
    m, n, k = 240, 160, 8
    one = of(normal(m, n), k)
    other = normal(m, n, 1).astype(np.float32)
    left, right, both = shares_inside(other, one, "cpu")
    assert left == pytest.approx(k / m, rel=0.1) and right == pytest.approx(k / n, rel=0.1)
    assert both == pytest.approx(k * k / m / n, rel=0.5)
    spectrum = of(other, k)
    cosines = [np.mean(np.cos(np.radians(side)) ** 2) for side in principal_angles(one, spectrum)]
    assert cosines == pytest.approx([k / m, k / n], rel=0.3)
    chance = (2 / np.pi) ** 0.5 * k**1.5 / (m * n) ** 0.5
    assert interference([one, spectrum]).relative == pytest.approx(chance, rel=0.3)


def test_large_flat_matrices_do_not_meet_in_their_common_random_start(krylov: None) -> None:
    one, other = of(normal(110, 100), 4, 7), of(normal(110, 100, 1), 4, 7)
    cosines = [np.mean(np.cos(np.radians(side)) ** 2) for side in principal_angles(one, other)]
    assert np.mean(cosines) == pytest.approx(4 / 105, rel=0.5)


# ------------------------------------------------------------------------------------------- laws


@settings(max_examples=25)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), k=st.integers(1, 13), rank=st.integers(1, 12),
    seed=st.integers(0, 99), scale=st.sampled_from([-3.0, 1e-8, 1.0, 1e6]),
)  # fmt: skip
def test_laws(m: int, n: int, k: int, rank: int, seed: int, scale: float) -> None:
    """Rotation, transposition and scale; the swap of two; shares of a matrix in its own space."""
    a, b = normal(m, rank, seed) @ normal(rank, n, seed + 1), normal(m, n, seed + 2)
    one, other = of(a, k), of(b, k)
    turn, spin = orthonormal(m, m, seed + 3), orthonormal(n, n, seed + 4)
    for found, size in (
        (of(a.T, k), 1), (of(turn @ a @ spin, k), 1), (of(scale * a, k), abs(scale)),
    ):  # fmt: skip
        np.testing.assert_allclose(found.values / size, one.values, atol=1e-5 * one.values[0])
        assert found.stable_rank == pytest.approx(one.stable_rank, rel=1e-5)
        assert found.effective_rank == pytest.approx(one.effective_rank, rel=1e-4)
    flipped = of(a.T, k)
    assert (
        max(
            map(
                max,
                principal_angles(
                    one, flipped._replace(left=flipped.right, right=flipped.left, shape=one.shape)
                ),
            )
        )
        < 1e-2
    )
    left, right = principal_angles(one, other)
    swapped = principal_angles(other, one)
    assert swapped[0] + swapped[1] == pytest.approx(left + right, abs=1e-4)
    turned = principal_angles(of(turn @ a @ spin, k), of(turn @ b @ spin, k))
    shared = interference([one, other]).relative
    assert interference([other, one]).relative == pytest.approx(shared, abs=1e-5)
    assert all(0 <= x <= 90 + 1e-4 for x in left + right)
    shares = shares_inside(a.astype(np.float32), other, "cpu")
    assert 0 <= shares[2] <= min(shares[:2]) + 1e-6 and max(shares) <= 1
    own = shares_inside(a.astype(np.float32), one, "cpu")
    assert own == pytest.approx([(one.values**2).sum() / one.norm_sq] * 3, abs=1e-5)
    if k >= min(m, n):  # no gap within which single directions may wander
        assert turned[0] == pytest.approx(left, abs=0.1)


# ------------------------------------------------------------------------- inputs and their limits


def test_fp64_is_worked_on_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    values = 0.7 ** np.arange(100) * (1 + 1e-9)
    matrix = with_values(values, 110, 100)
    small = decompose(matrix, 3, "cpu", 0)
    monkeypatch.setattr(svd, "EXACT", 0)
    large = decompose(matrix, 3, "cpu", 0)
    assert small.exact and not large.exact
    for found in (small, large):
        np.testing.assert_allclose(found.values, values[:3], rtol=1e-13)
        assert found.left.dtype == np.float32 and found.error < 1e-12


def test_layout_and_dtype_of_the_input_do_not_matter() -> None:
    matrix = normal(20, 9).astype(np.float16)
    wide = matrix.astype(np.float32)
    frozen = wide.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [
            decompose(one, 3, "cpu", 0).values
            for one in (
                wide,
                matrix,
                frozen,
                np.asfortranarray(wide),
                np.repeat(wide, 2, 1)[:, ::2],
            )
        ]
    for values in found:
        np.testing.assert_allclose(values, found[0], rtol=1e-6)
    assert (wide == matrix).all()


def test_products_are_full_fp32_whatever_the_process_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def spy(matrix: torch.Tensor) -> float:
        seen.append(torch.get_float32_matmul_precision())
        return squared(matrix)

    squared = svd._squared
    monkeypatch.setattr(svd, "_squared", spy)
    matrix = normal(5, 3).astype(np.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        shares_inside(matrix, of(matrix), "cpu")
        with pytest.raises(IncompatibleError):
            of(matrix * np.nan)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"} and len(seen) > 2


def test_a_zero_matrix_has_no_subspace() -> None:
    zero = np.zeros((5, 3), np.float32)
    found, other = of(zero), of(normal(5, 3), 2)
    assert found.left.shape == (5, 0) and found.right.shape == (3, 0) and found.values.size == 0
    assert found[3:-1] == ((5, 3), 0.0, 0.0, True, 0.0, 0.0, 0.0) and found.every.size == 0
    assert principal_angles(found, other) == principal_angles(other, found) == ([], [])
    assert shares_inside(zero, other, "cpu") is None
    assert alignment_ratio(zero, other, "cpu") is None
    assert shares_inside(np.ones((5, 3), np.float32), found, "cpu") == (0, 0, 0)
    assert alignment_ratio(np.ones((5, 3), np.float32), found, "cpu") == 0
    assert interference([found, other]) == pytest.approx((0, 0), abs=1e-5)
    assert interference([found, found]) == (0, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    matrix = normal(5, 3)
    matrix[4, 2] = value
    with pytest.raises(IncompatibleError, match="5 x 3 values holds NaN or infinities"):
        of(matrix)


def test_what_does_not_fit_is_refused() -> None:
    one, other = of(normal(5, 3)), of(normal(3, 5))
    for call in (
        lambda: principal_angles(one, other),
        lambda: interference([one, other]),
        lambda: shares_inside(normal(3, 5), one, "cpu"),
        lambda: alignment_ratio(normal(3, 5), one, "cpu"),
    ):
        with pytest.raises(IncompatibleError, match=r"\(3, 5\)"):
            call()
    with pytest.raises(UsageError, match="k = 0, expected at least 1"):
        of(normal(5, 3), 0)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = {word: resolve_device(word) for word in ("auto", "cpu", "cuda", "cuda:1")}
    assert found == {"auto": "cuda:0", "cpu": "cpu", "cuda": "cuda:0", "cuda:1": "cuda:1"}
    with pytest.raises(UsageError, match="finds 2 CUDA devices"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UsageError, match="finds 0 CUDA devices"):
        decompose(np.eye(2, dtype=np.float32), 1, "cuda", 0)
    for word in ("gpu", "", "cuda:", "cuda:x", "cpu:0", "auto:0", "cuda:-1", "cudaX"):
        with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
            resolve_device(word)


def test_torch_is_imported_on_use_only() -> None:
    code = "import sys, skillvec.ops.svd; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("shape", [(300, 200), (90, 400)])
@pytest.mark.parametrize("exact", [True, False])
def test_the_threads_of_a_process_change_no_bit(
    shape: tuple[int, int], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    monkeypatch.setattr(svd, "EXACT", 1024 if exact else 0)
    found, before = [], torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(svd.decompose(matrix, 3, "cpu", 0))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert found[0].exact == exact


def test_angles_and_interference_do_not_depend_on_threads() -> None:
    generator = np.random.default_rng(0)
    spectra = [
        svd.decompose(generator.standard_normal((400, 300), dtype=np.float32), 16, "cpu", 0)
        for _ in range(2)
    ]
    found, before = [], torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append((principal_angles(*spectra), interference(spectra)))
    torch.set_num_threads(before)
    assert found[0] == found[1]
