"""The null that holds, by hand and by draws, and the laws that p follows."""

from math import erfc, sqrt

import numpy as np
import pytest
from scipy import stats

from skillvec.analysis.chance import chance_of, chance_of_signs, is_related, judge, quantile
from skillvec.analysis.spreads import EXACT, Turned, Units, Variances


def found(rows: float = 1.0, channels: float = 1.0, rotation: float = 1.0, rank: float = 4.0,
          degrees: float = EXACT) -> Variances:  # fmt: skip
    return Variances(Units(rows, 500), Units(channels, 400), Turned(rotation, rank, degrees))


def test_groups_hold_until_another_variance_is_clearly_larger() -> None:
    groups = Units(1.0, 1000)
    bar = quantile(4.0)  # 2.37
    assert judge(2.0, groups, None)["null"] == "groups"
    assert judge(2.0, groups, found(rows=bar - 0.01))["null"] == "groups"
    assert judge(2.0, groups, found(rows=bar + 0.01))["null"] == "rows"
    assert judge(2.0, groups, found(rows=3, rotation=4))["null"] == "rotation"
    assert judge(2.0, groups, found(rows=0.5, channels=0.1, rotation=0.2))["null"] == "groups"
    assert judge(2.0, groups, found(rows=3.5, rank=1.0))["null"] == "groups"  # one chi^2 of 3.8


def test_channels_go_before_rotations_with_a_clear_lead() -> None:
    lead = quantile(100)  # of 400 channels
    assert (
        judge(2.0, Units(1.0, 9), found(channels=4 * lead - 0.1, rotation=4))["null"] == "rotation"
    )
    assert (
        judge(2.0, Units(1.0, 9), found(channels=4 * lead + 0.1, rotation=4))["null"] == "channels"
    )


def test_what_is_judged_by_hand() -> None:
    row = judge(6.0, Units(1.0, 1000), found(rows=4.0, channels=9.0, rotation=4.0))
    assert (row["null"], row["z"], row["spread"]) == ("channels", 2.0, 3.0)
    assert [row[f"z_{n}"] for n in ("groups", "rows", "channels", "rotation")] == [6, 3, 2, 3]
    assert row["p"] == pytest.approx(stats.t.sf(2 * sqrt(399 / 396), 399) * 2)
    row = judge(-6.0, Units(1.0, 1000), found(rotation=4.0, degrees=64.0))
    assert (row["null"], row["z"]) == ("rotation", -3.0)
    assert row["p"] == pytest.approx(2 * stats.t.sf(3, 64))
    exact = judge(-6.0, Units(1.0, 1000), found(rotation=4.0))
    assert exact["p"] == pytest.approx(erfc(3 / sqrt(2)), rel=1e-4)
    nothing = judge(0.0, Units(), None)
    assert (nothing["z"], nothing["p"], nothing["null"], nothing["z_rows"]) == (None,) * 4


def test_a_relation_is_rare_and_clear_of_every_null() -> None:
    row = judge(9.0, Units(1.0, 1000), found(rows=9.0))
    assert is_related(row)
    assert not is_related(row | {"p": 0.02})
    assert not is_related(row | {"z_channels": -1.9}) and is_related(row | {"z_channels": None})
    assert not is_related(judge(0.0, Units(), None))


@pytest.mark.parametrize("degrees", [1.0, 3.0, 17.5, 400.0])
def test_the_bar_is_the_quantile_of_chi_squared(degrees: float) -> None:
    assert quantile(degrees) == pytest.approx(stats.chi2.ppf(0.95, degrees) / degrees, rel=0.03)


def test_p_of_few_signs_is_no_smaller_than_all_of_one_sign() -> None:
    assert chance_of_signs(1.0, 1) == 1.0
    assert chance_of_signs(2.0, 4) == 1 / 8
    assert chance_of_signs(sqrt(30), 30) == pytest.approx(2.0**-29)
    assert chance_of_signs(-2.0, 5000) == pytest.approx(2 * stats.norm.sf(2), rel=1e-3)


@pytest.mark.parametrize("kind", ["independent", "rank 1", "rotated"])
def test_false_alarms_are_one_in_twenty(kind: str) -> None:
    """Where sums over 64 channels are drawn as three structures make them; 2,000 pairs each."""
    rng, alarms = np.random.default_rng(3), 0
    for _ in range(2000):
        x, y = rng.normal(size=(2, 6))  # of six matrices: agreement of rows, and of channels
        if kind == "independent":
            z = rng.normal()
            spread = found(1 + rng.normal() / 20, 1 + rng.normal() / 6, 1 + rng.normal() / 30, 30)
        elif kind == "rank 1":
            z = float(x @ y) / sqrt(6)
            spread = found(float(y @ y) / 6, float(x @ x) / 6, float(x @ x) / 6, 6)
        else:  # groups see nothing of what all rows share
            z = 20 * rng.normal()
            spread = found(50.0, 400 * (1 + rng.normal() / 6), 400.0, 1.0)
        p = judge(z, Units(1.0, 1000), spread)["p"]
        alarms += p < 0.05
    assert 0.035 < alarms / 2000 < 0.065


@pytest.mark.parametrize("numel", [2, 3, 5, 50, 10**5, 10**10])
def test_p_is_the_share_of_the_sphere(numel: int) -> None:
    """In 2 dimensions angles are uniform, in 3 cosines (Archimedes); far out z is normal."""
    from math import acos, erfc, pi

    for cosine in (0.0, 1e-3, -0.3, 0.9, -1.0):
        p = chance_of(cosine, numel)
        if numel == 2:
            assert p == pytest.approx(acos(abs(cosine)) / (pi / 2))
        elif numel == 3:
            assert p == pytest.approx(1 - abs(cosine))
    for z in (0.1, 1.0, 3.0):
        if numel >= 10**5:
            p = chance_of(z / sqrt(numel), numel)
            assert p == pytest.approx(erfc(z / sqrt(2)), rel=1e-3)
    assert chance_of(1.0, 1) == 1.0 and chance_of(-1.0, numel) == 0.0


@pytest.mark.parametrize("numel", [1000, 1001, 4096, 10**6, 10**9])
def test_p_of_many_values_is_the_beta_law(numel: int) -> None:
    from scipy.special import betainc

    for z in (0.01, 0.5, 2.0, 4.0, 6.0):
        cosine = z / sqrt(numel)
        expected = betainc((numel - 1) / 2, 0.5, 1 - cosine**2)
        assert chance_of(-cosine, numel) == pytest.approx(expected, rel=3e-5)


@pytest.mark.parametrize("numel", [2, 3, 4, 11, 101, 500, 1000])
def test_chance_is_the_law_of_beta(numel: int) -> None:
    from scipy.special import betainc

    for cosine in (0.0, 1e-4, 0.01, 0.03, 0.05, 0.1, -0.3, 0.7, -0.99, 0.999999, 1.0):
        expected = float(betainc((numel - 1) / 2, 0.5, 1 - cosine * cosine))
        assert chance_of(cosine, numel) == pytest.approx(expected, rel=1e-11, abs=1e-300)
