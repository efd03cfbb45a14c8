"""Numbers of matrices into those of groups: by hand, and the law of independent subspaces."""

from math import sqrt

import numpy as np
import pytest

from skillvec.analysis.subspaces import group_row, overlap_by_chance, summed, weighted


def test_numbers_of_matrices_are_weighted_by_energy() -> None:
    rows = [{"energy": 3.0, "stable_rank": 2.0, "svd_error": 0.1, "list": [1]}, {},
            {"energy": 1.0, "stable_rank": 6.0, "svd_error": 0.3, "list": [2]}]  # fmt: skip
    assert weighted(rows) == {"stable_rank": 3.0, "svd_error": 0.3}
    assert weighted(rows[:1]) == {"stable_rank": 2.0, "svd_error": 0.1, "list": [1]}
    assert weighted([{}]) == {} == weighted([{}, {}])
    pairs = [{"energy_a": 4.0, "energy_b": 1.0, "a_in_b": 1.0, "b_in_a": 1.0, "sti": 1.0},
             {"energy_a": 1.0, "energy_b": 4.0, "a_in_b": 0.0, "b_in_a": 0.0,
              "sti": 0.0}]  # fmt: skip
    assert weighted(pairs) == {"a_in_b": 0.8, "b_in_a": 0.2, "sti": 0.5}


TERMS = {
    "left": 1.0, "left_var": 4.0, "right": -1.0, "right_var": 0.0, "product": 2.0, "spikes": 3.0,
    "rest": -2.0, "square_a": 13.0, "square_b": 10.0, "spikes_a": 9.0, "spikes_b": 1.0,
    "rest_a": 4.0, "rest_b": 9.0,
}  # fmt: skip


def test_parts_and_overlaps_by_hand() -> None:
    """Sums over matrices before roots: z of two alike is sqrt(2) that of one, cosines are kept."""
    one = summed([TERMS])
    assert one == {
        "overlap_left_z": 0.5, "overlap_right_z": None, "cosine_spikes": 1.0,
        "cosine_rest": pytest.approx(-1 / 3), "spikes_share": 1.5, "rest_share": -1.0,
    }  # fmt: skip
    row = {"energy_a": 1.0, "energy_b": 1.0, "sti": 0.25, "sums": TERMS}
    assert group_row([row]) == {"sti": 0.25, **one}
    assert group_row([row, {}, row]) == {
        "sti": 0.25, **one, "overlap_left_z": pytest.approx(0.5 * sqrt(2)),
    }  # fmt: skip
    nothing = {"spikes_a": 0.0, "spikes": 0.0, "rest_b": 9e-7, "product": 0.0}
    assert {*summed([TERMS | nothing]).values()} == {0.5, None}


@pytest.mark.parametrize("size,one,other", [(3, 1, 1), (4, 2, 1), (12, 2, 5), (20, 4, 4)])
def test_the_law_of_independent_subspaces(size: int, one: int, other: int) -> None:
    """Of 4,000 random subspaces beside a fixed one: mean and variance of tr(P_a P_b)."""
    random = np.random.default_rng(size).normal(size=(4000, size, one))
    inside = np.linalg.qr(random).Q[:, :other]
    traces = (inside**2).sum(axis=(1, 2))
    mean, variance = overlap_by_chance(size, one, other)
    assert traces.mean() == pytest.approx(mean, abs=4 * sqrt(variance / 4000))
    assert traces.var() == pytest.approx(variance, rel=0.1)
    assert overlap_by_chance(size, size, other) == (other, 0.0)
