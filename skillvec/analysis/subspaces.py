"""Numbers of matrices into numbers of groups of them: means by energy, and sums.

A row of one matrix holds what belongs to it, `energy` (or `energy_a` and `energy_b`), by which it
is weighted in a mean, and `sums`: terms that add up over matrices, of which the numbers of a group
are made as those of one matrix are.
"""

from collections.abc import Mapping, Sequence
from math import sqrt

from skillvec.analysis.angle_report import Row

WEIGHTS = ("energy", "energy_a", "energy_b", "sums")
OF_A, OF_B = ("a_in_b", "sar_a"), ("b_in_a", "sar_b")  # shares of one of a pair's energy
SPECK = 1e-6  # of an energy: a rest that is smaller is rounding


def group_row(rows: Sequence[Row]) -> Row:
    """Return the numbers of several matrices from their rows; empty ones are of no matrix."""
    return weighted(rows) | summed([row["sums"] for row in rows if "sums" in row])


def weighted(rows: Sequence[Row]) -> Row:
    """Return the means of what is known of several matrices, weighted by their energy.

    Lists belong to one matrix and are left out of means; of errors the largest is taken.
    """
    known = [row for row in rows if row]
    keys = [key for key in (known[0] if known else ()) if key not in WEIGHTS]
    if len(rows) == 1:
        return {key: known[0][key] for key in keys}
    found: Row = {}
    for key in keys:
        held = [(_weight(row, key), row[key]) for row in known if row[key] is not None]
        if any(isinstance(value, list) for _, value in held):
            continue
        total = sum(energy for energy, _ in held)
        found[key] = sum(energy * value for energy, value in held) / total if total else None
        if key.endswith("_error"):
            found[key] = max((value for _, value in held), default=None)
    return found


def _weight(row: Row, key: str) -> float:
    """Return the energy of what a number is of: a vector's, a pair's first or second, or both."""
    if "energy" in row:
        return float(row["energy"])
    a, b = row["energy_a"], row["energy_b"]
    return float(a if key in OF_A else b if key in OF_B else sqrt(a * b))


def summed(terms: Sequence[Mapping[str, float]]) -> Row:
    """Return the numbers of a pair that are made of sums over matrices."""
    if not terms:
        return {}
    sums = {key: sum(term[key] for term in terms) for key in terms[0]}
    product, spikes, rest = (sums[key] for key in ("product", "spikes", "rest"))
    sizes = {}
    for part in ("spikes", "rest"):
        squares = [sums[f"{part}_{side}"] for side in "ab"]
        wholes = [sums[f"square_{side}"] for side in "ab"]
        clear = all(s > SPECK * whole for s, whole in zip(squares, wholes, strict=True))
        sizes[part] = sqrt(squares[0]) * sqrt(squares[1]) if clear else 0.0
    return {
        "overlap_left_z": _over(sums["left"], sums["left_var"]),
        "overlap_right_z": _over(sums["right"], sums["right_var"]),
        "cosine_spikes": _cosine(spikes, sizes["spikes"]),
        "cosine_rest": _cosine(rest, sizes["rest"]),
        "spikes_share": spikes / product if sizes["spikes"] and product else None,
        "rest_share": rest / product if sizes["rest"] and product else None,
    }


def _over(excess: float, variance: float) -> float | None:
    return excess / sqrt(variance) if variance > 0 else None


def _cosine(product: float, size: float) -> float | None:
    return max(-1.0, min(1.0, product / size)) if size else None


def overlap_by_chance(size: int, one: int, other: int) -> tuple[float, float]:
    """Return mean and variance of tr(P_a P_b), the sum of the squared cosines of two subspaces.

    Of `one` and `other` dimensions, independent and isotropic in `size`: a zonal polynomial's
    second moment (Muirhead 1982); of one dimension each it is the Beta law of a squared cosine.
    """
    if not 0 < one < size or not 0 < other < size:
        return one * other / size, 0.0
    spread = 2 * one * other * (size - one) * (size - other)
    return one * other / size, spread / (size**2 * (size - 1) * (size + 2))
