"""What deltas do to outputs, from sums of matrices to the numbers of tensors, layers and models.

A row of sums belongs to one matrix and is empty where nothing is known of its inputs.
docs/orthogonality.md has the formulas.
"""

from collections.abc import Sequence
from math import sqrt

from skillvec.analysis.angle_report import ActivationFacts, Row


def vector_outputs(rows: Sequence[Row]) -> Row:
    """Return how a delta meets the inputs: share in their active subspace, and gain.

    Rows have `energy`, of it what is `inside`, `chance` for that, `output` and what `white` inputs
    of the same size would give. Energies and outputs are sums over matrices.
    """
    energy, inside, output, white = (
        sum(row[key] for row in rows if row) for key in ("energy", "inside", "output", "white")
    )
    chance = sum(row["energy"] * row["chance"] for row in rows if row)
    return {
        "energy_active": inside / energy if energy > 0 else None,
        "active_chance": chance / energy if energy > 0 else None,
        "gain_outputs": output / white if white > 0 else None,
    }


def pair_outputs(rows: Sequence[Row]) -> Row:
    """Return how alike the outputs of two deltas are.

    Rows have the mean `product` of the outputs, the mean squares `output_a` and `output_b`, and of
    covariances the square that is `shared`, beside the geometric mean of each one's `own`. The
    cosine is that of the outputs of all matrices as one long vector; CKA belongs to a matrix, its
    mean is weighted by the root of the product of the mean squares.
    """
    known = [row for row in rows if row]
    product, one, other = (
        sum(row[key] for row in known) for key in ("product", "output_a", "output_b")
    )
    size = sqrt(max(one, 0.0)) * sqrt(max(other, 0.0))
    alike = [
        (sqrt(max(row["output_a"] * row["output_b"], 0.0)), row["shared"] / row["own"])
        for row in known
        if row["own"] > 0
    ]
    weight = sum(w for w, _ in alike)
    return {
        "cosine_outputs": max(-1.0, min(1.0, product / size)) if size > 0 else None,
        "cka_outputs": sum(w * cka for w, cka in alike) / weight if weight else None,
    }


def say_activations(asked: ActivationFacts | None) -> str:
    """Return whose inputs the outputs are of, "" for none."""
    if not asked:
        return ""
    without = f"; {asked['without']} matrices without inputs there" if asked["without"] else ""
    return (
        f"{asked['tokens']:,} tokens of {asked['path']}, inputs of {asked['matrices']} matrices"
        f" of {asked['model']}{without}"
    )
