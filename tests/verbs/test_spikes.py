"""Spikes over the noise of a matrix, and products of the parts: counted, and against full SVDs."""

from math import sqrt

import numpy as np
import pytest

from skillvec.ops import svd
from skillvec.ops.svd import decompose
from skillvec.verbs.relations import both_parts, part_product
from skillvec.verbs.spikes import find_spikes, margin, noise_edge

M, N = 120, 80
EDGE = sqrt(M) + sqrt(N)


def noise(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(M, N))


def planted(rng: np.random.Generator, *sizes: float) -> np.ndarray:
    """Return orthogonal rank-one parts of these sizes, in units of the edge of unit noise."""
    left, right = (np.linalg.qr(rng.normal(size=(side, len(sizes)))).Q for side in (M, N))
    return EDGE * (left * sizes) @ right.T


def count(matrix: np.ndarray, k: int = 4) -> int:
    matrix = matrix.astype(np.float32)
    return find_spikes(matrix, decompose(matrix, k, "cpu", 0), "cpu", 0).number


def zero_rows(rng: np.random.Generator) -> np.ndarray:
    return noise(rng) * (rng.random((M, 1)) < 0.3)


NOISES = {
    "of one variance": noise,
    "sparse": lambda rng: noise(rng) * (rng.random((M, N)) < 0.01),
    "a handful": lambda rng: noise(rng) * (rng.random((M, N)) < 0.001),
    "zero rows": zero_rows,
    "unequal rows and columns": lambda rng: (
        noise(rng) * np.exp(rng.normal(size=(M, 1)) + rng.normal(size=(1, N)))
    ),
    "heavy tails": lambda rng: rng.standard_t(2.5, size=(M, N)),
    "one entry": lambda rng: noise(rng) + 500 * np.eye(M, N) * (np.arange(M) == 3)[:, None],
    "zero": lambda rng: np.zeros((M, N)),
}


@pytest.mark.parametrize("kind", NOISES)
def test_noise_has_no_spikes(kind: str) -> None:
    rng = np.random.default_rng(0)
    assert [count(NOISES[kind](rng)) for _ in range(8)] == [0] * 8


@pytest.mark.parametrize("krylov", [False, True])
def test_planted_parts_are_counted(krylov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weak ones beside strong ones, more than K of them, zero rows beside; below the edge none."""
    if krylov:
        monkeypatch.setattr(svd, "EXACT", 0)
    rng, k = np.random.default_rng(1), 3 if krylov else 4
    for parts in ((1.6,), (1.6, 1.5, 1.4), (30, 10, 2.5), (3,) * 7):
        assert count(noise(rng) + planted(rng, *parts), k) == len(parts)
    assert count(zero_rows(rng) + planted(rng, 2, 2) * (rng.random((M, 1)) < 2), k) == 2
    assert count(noise(rng) + planted(rng, 0.5, 0.4), k) == 0
    assert count(planted(rng, 3, 2, 1), 4) == 3  # nothing but low rank


def test_the_edge_is_that_of_marchenko_and_pastur_for_equal_values() -> None:
    matrix = np.random.default_rng(2).normal(size=(600, 400)).astype(np.float32)
    own = decompose(matrix, 2, "cpu", 0)
    edges = [noise_edge(matrix, own, 0, "cpu", str(key)) for key in range(4)]
    assert np.mean(edges) == pytest.approx(sqrt(600) + sqrt(400), rel=0.02)
    assert len({*edges}) == 4 and noise_edge(matrix, own, 0, "cpu", "0") == edges[0]
    assert margin((5, 5)) == pytest.approx(4 / sqrt(3) / 2)
    assert margin((1, 10**9)) == pytest.approx(sqrt(2), rel=1e-3)


def test_products_of_parts() -> None:
    rng = np.random.default_rng(3)
    a, b = ((noise(rng) + planted(rng, 5, 4, 3)).astype(np.float32) for _ in "ab")
    one, other = (decompose(side, 3, "cpu", 0) for side in (a, b))

    def part(matrix: np.ndarray, kept: int) -> np.ndarray:
        u, s, v = np.linalg.svd(matrix.astype(float), full_matrices=False)
        return (u[:, :kept] * s[:kept]) @ v[:kept]

    size = float(1e-6 * np.linalg.norm(a) * np.linalg.norm(b))
    for kept, wanted in ((2, part(b, 2)), (0, np.zeros_like(b))):
        found = part_product(a, other, kept, "cpu")
        assert found == pytest.approx(float((a * wanted).sum()), abs=size)
    found = both_parts(one, other, (2, 3))
    assert found == pytest.approx(float((part(a, 2) * part(b, 3)).sum()), abs=size)


@pytest.mark.parametrize("power", [60, -80])
def test_spikes_do_not_depend_on_the_unit(power: int) -> None:
    """Squares of fp32 that leave its range, above and below."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((60, 40)).astype(np.float32)
    matrix += 4 * np.outer(rng.standard_normal(60), rng.standard_normal(40)).astype(np.float32)
    units = [matrix, matrix * np.float32(2.0**power)]
    one, other = (find_spikes(m, decompose(m, 4, "cpu", 0), "cpu", 0) for m in units)
    assert one.number == other.number == 1
