"""Which of several nulls a pair is judged by, and how rare what it shows is under it.

Pure arithmetic on variances that `spreads` and the run bring back. Every null is measured with the
same numerator; which one holds is told by the data. docs/orthogonality.md has the formulas and
docs/calibration.md what false-alarm rates they have.
"""

from collections.abc import Sequence
from math import erfc, exp, isfinite, lgamma, log, log1p, sqrt

from skillvec.analysis.angle_report import Row
from skillvec.analysis.spreads import Units, Variances

NORMAL = 1.6449  # the quantile that one in twenty lies beyond
RARE, CLEAR_OF_ALL = 0.01, 2.0  # the p that a relation has at most, and its least |z| of any null
NULLS = {
    "groups": "the spread of random signs of neighbouring values",
    "rows": "the spread of random signs of whole rows",
    "channels": "the spread of random signs of channels of the hidden axis",
    "rotation": "the spread of random rotations of the hidden axis",
}


def judge(product: float, groups: Units, found: Variances | None) -> Row:
    """Return z, p and name of the null that holds and its `spread`, then the z of each null.

    None where nothing is shared.

    Groups of neighbours hold where values are independent. Another null takes their place where its
    variance is larger by more than chance: by the 95 % quantile of chi^2_r / r, r the rank of M, as
    rank 1 structure in both deltas makes of it without any relation. Of several that are the
    largest counts; channels need a clear lead before rotations, of which they are a noisier copy.
    """
    if found is None:
        found = Variances()
    units = {"groups": groups, "rows": found.rows, "channels": found.channels}
    variances = {null: one.square for null, one in units.items()}
    variances["rotation"] = found.rotation.variance
    z = {null: product / sqrt(held) if held > 0 and isfinite(held) else None
         for null, held in variances.items()}  # fmt: skip
    row: Row = {"z": None, "p": None, "null": None, "spread": None}
    bar = quantile(found.rotation.rank) * groups.square
    taken = {null: held for null, held in variances.items() if held > bar}
    if "rotation" in taken and "channels" in taken:
        lead = quantile(max(found.channels.number / 4, 1.0))
        taken.pop("rotation" if taken["channels"] > lead * taken["rotation"] else "channels")
    null = max(taken, key=lambda key: taken[key], default="groups")
    if (value := z[null]) is not None:
        if null == "rotation":
            degrees = found.rotation.degrees
            p = chance_of(value / sqrt(degrees + value**2), degrees + 1)
        else:
            p = chance_of_signs(value, units[null].number)
        row = {"z": value, "p": p, "null": null, "spread": sqrt(variances[null])}
    return row | {f"z_{null}": value for null, value in z.items()}


def is_related(row: Row) -> bool:
    """Return whether the numbers of a row are too rare for chance, by the null that holds.

    And above two standard deviations by every other null, so that it does not hang on which was
    taken.
    """
    others = [abs(row[f"z_{null}"]) for null in NULLS if row[f"z_{null}"] is not None]
    return row["p"] is not None and row["p"] < RARE and min(others) >= CLEAR_OF_ALL


def quantile(degrees: float) -> float:
    """Return the 95 % quantile of chi^2 over its degrees of freedom (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * degrees)
    return (1 - spread + NORMAL * sqrt(spread)) ** 3


def chance_of_signs(z: float, count: int) -> float:
    """Return how often `count` terms of random signs have a sum as far from 0, two-sided.

    Student's t under symmetry (Efron 1969); no rarer than that all signs are equal.
    """
    cosine = min(1.0, abs(z) / sqrt(count))
    return max(chance_of(cosine, count), 2.0 ** (1 - count) if count < 1000 else 0.0)


def matrix_means(each: Sequence[tuple[float, float | None]]) -> Row:
    """Return the mean of cosines that count one by one, its error, and the share with p < .05.

    `each` has cosine and p of a matrix, whose p is None where the two share no value.
    """
    cosines = [cosine for cosine, _ in each]
    row: Row = {"cosine_mean": None, "cosine_mean_se": None, "rare_share": None}
    if (count := len(each)) >= 2:
        mean = sum(cosines) / count
        variance = sum((cosine - mean) ** 2 for cosine in cosines) / (count - 1)
        rare = sum(p is not None and p < 0.05 for _, p in each)
        row = {"cosine_mean": mean, "cosine_mean_se": sqrt(variance / count),
               "rare_share": rare / count}  # fmt: skip
    return row


def chance_of(cosine: float, numel: float) -> float:
    """Return how often unrelated directions have a cosine as far from 0: the two-sided p.

    The square of the cosine of a fixed and an isotropic direction follows
    Beta(1/2, (numel - 1) / 2): Student's t of numel - 1 degrees. From 1,000 on by Wallace's normal
    approximation (Annals of Mathematical Statistics 30, 1959): 3e-5 of p off where p > 1e-9.
    """
    if numel < 2 or abs(cosine) == 1:
        return float(numel < 2)
    degrees = numel - 1
    if degrees >= 1000:  # without scipy, whose import takes longer than a small model
        spread = sqrt(-degrees * log1p(-cosine * cosine))
        return erfc((8 * degrees + 1) / (8 * degrees + 3) * spread / sqrt(2))
    square = cosine * cosine
    if 1 - square > (degrees + 2) / (degrees + 5):  # the fraction converges from the other end
        return 1 - beta_fraction(0.5, degrees / 2, square) if square else 1.0
    return beta_fraction(degrees / 2, 0.5, 1 - square)


def beta_fraction(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), 0 < x < (a + 1) / (a + b + 2).

    By its continued fraction (Abramowitz and Stegun 26.5.8, evaluated as Lentz does), to 11 digits
    for a and b up to 1,000. scipy has one too; its import takes longer than a small model.
    """
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    above, below = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    found, m, step = below, 0, 0.0
    while abs(step - 1) > 1e-16 and m < 500:
        m += 1
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            below = 1 / (1 + numerator * below)
            above = 1 + numerator / above
            step = above * below
            found *= step
    return front * found
