"""What the singular subspaces of deltas say of each vector and each pair, matrix by matrix.

Reads the matrices again after the run that gave the sums, one for each worker at a time.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np

from skillvec.analysis.angle_report import Row, SubspaceFacts
from skillvec.analysis.subspaces import overlap_by_chance
from skillvec.engine.matrix_workers import in_turn
from skillvec.engine.plan import Job, JobResult, Plan
from skillvec.files.file import forget_open_files
from skillvec.ops import svd
from skillvec.ops.kernels import Array
from skillvec.ops.statistics import Request, layout
from skillvec.report import Watcher
from skillvec.vectors.deltas.base import add_values
from skillvec.vectors.reader import BlockReader, readers_of
from skillvec.verbs.relations import (
    alignment_ratio,
    both_parts,
    interference,
    part_product,
    principal_angles,
)
from skillvec.verbs.spikes import Spikes, find_spikes


class Spectra(NamedTuple):
    """What is known of each matrix, by vector or pair and tensor: nothing unless it is asked."""

    vectors: list[list[Row]]
    pairs: list[list[Row]]

    @staticmethod
    def empty(request: Request, tensors: int) -> "Spectra":
        return Spectra(
            [[{}] * tensors for _ in request.scales],  # put in the place of, never added to
            [[{}] * tensors for _ in request.pairs],
        )


def is_matrix(job: Job) -> bool:
    """Return whether a job's tensor has singular subspaces: two dimensions above 1."""
    shape = job.deltas[0].spec.shape
    return len(shape) == 2 and min(shape) > 1


def find_spectra(
    results: Sequence[JobResult], plan: Plan, said: SubspaceFacts, at_once: int,
    watcher: Watcher | None,
) -> Spectra:  # fmt: skip
    """Decompose every matrix of every vector, `at_once` at a time, and relate them.

    Fills in `said`. The matrices of the results are read anew, which `watcher` is told of.
    """
    assert plan.request is not None
    request, spectra = plan.request, Spectra.empty(plan.request, len(results))
    matrices = [n for n, result in enumerate(results) if is_matrix(result.job)]
    said |= {"exact": 0, "randomised": 0, "left_out": len(results) - len(matrices), "error": 0.0}
    readers = readers_of(plan.vectors)
    total = sum(results[n].job.nbytes_read for n in matrices)
    done = 0

    def relate(n: int) -> _Related:
        sums = results[n].sums.view(layout(request))[0]
        products = sums["pairs"]["product"].tolist()
        return _relate(_Matrices(results[n].job, request, said, readers), products)

    def nbytes_of(n: int) -> int:
        return 4 * results[n].job.numel

    try:
        with closing(in_turn(relate, matrices, nbytes_of, at_once)) as found:
            for n, related in zip(matrices, found, strict=True):
                for rows, row in zip(spectra.vectors, related.vectors, strict=False):
                    rows[n] = row  # none of the control
                for rows, row in zip(spectra.pairs, related.pairs, strict=True):
                    rows[n] = row
                said["exact" if related.exact else "randomised"] += 1
                said["error"] = max(said["error"], related.error)
                done += results[n].job.nbytes_read
                if watcher:
                    watcher.advanced(done, total)
    finally:
        forget_open_files()
    return spectra


class Own(NamedTuple):
    """What is known of one matrix: its leading triplets, and which of them are spikes."""

    spectrum: svd.Spectrum
    spikes: Spikes


class _Related(NamedTuple):
    """The rows of one tensor, whether its SVDs are exact, and the largest error of one."""

    vectors: list[Row]
    pairs: list[Row]
    exact: bool
    error: float


class _Matrices(NamedTuple):
    """The deltas of one tensor as matrices."""

    job: Job
    request: Request
    asked: SubspaceFacts
    readers: dict[str, BlockReader]

    def read(self, *numbers: int) -> Array:
        """Return the sum of deltas, each times its factor."""
        values = np.zeros(self.job.numel, np.float32)
        for number in numbers:
            delta, scale = self.job.deltas[number], self.request.scales[number]
            add_values(delta, self.readers, values, scale)
        return values.reshape(self.job.deltas[0].spec.shape)

    def decompose(self, values: Array) -> svd.Spectrum:
        return svd.decompose(values, self.asked["k"], self.asked["device"], self.request.seed)

    def decompose_weights(self) -> svd.Spectrum | None:
        """Return the spectrum of the weights, or None where they are unknown or not finite."""
        if self.job.point is None:
            return None
        values = np.zeros(self.job.numel, np.float32)
        add_values(self.job.point, self.readers, values)
        if not np.isfinite(values).all():
            return None
        return self.decompose(values.reshape(self.job.deltas[0].spec.shape))


def _relate(matrices: _Matrices, products: Sequence[float]) -> _Related:
    """Return what the singular subspaces of one tensor's deltas say; `products` are the pairs'."""
    request, device = matrices.request, matrices.asked["device"]
    pairs = request.pairs
    alone: list[Own] = []
    for i in range(1 + max((j for _, j in pairs), default=0)):  # not the control
        values = matrices.read(i)
        found = matrices.decompose(values)
        alone.append(Own(found, find_spikes(values, found, device, request.seed)))
    merged = [matrices.decompose(matrices.read(i, j)) for i, j in pairs]
    weights = matrices.decompose_weights()
    vector_rows, pair_rows = [], [Row() for _ in pairs]
    across = [0.0] * len(pairs)  # inner products of each whole with the spikes of the other
    for i, own in enumerate(alone):
        values = matrices.read(i)
        within = svd.shares_inside(values, weights, device) if weights is not None else None
        vector_rows.append(describe_spectrum(*own, within[2] if within else None))
        for m, pair in enumerate(pairs):
            if i in pair:
                side, to, other = ("a", "b", pair[1]) if i == pair[0] else ("b", "a", pair[0])
                share = svd.shares_inside(values, alone[other].spectrum, device)
                kept = alone[other].spikes.kept
                across[m] += part_product(values, alone[other].spectrum, kept, device)
                pair_rows[m] |= {
                    f"energy_{side}": own.spectrum.norm_sq,
                    f"sar_{side}": alignment_ratio(values, merged[m], device),
                    f"{side}_in_{to}": share[2] if share else None,
                }
    for m, (row, (i, j)) in enumerate(zip(pair_rows, pairs, strict=True)):
        row |= relate_spectra(alone[i].spectrum, alone[j].spectrum, matrices.asked["k"])
        row["sums"] |= relate_parts(alone[i], alone[j], products[m], across[m])
    spectra = [*(own.spectrum for own in alone), *merged]
    error = max(s.error for s in [*spectra, *([weights] if weights is not None else [])])
    return _Related(vector_rows, pair_rows, spectra[0].exact, error)


def describe_spectrum(own: svd.Spectrum, spikes: Spikes, energy_in_w: float | None) -> Row:
    """Return the numbers of one vector's matrix."""
    whole = own.norm_sq
    return {
        "energy": whole,
        "stable_rank": own.stable_rank,
        "spikes": spikes.number,
        "spike_energy": spikes.energy / whole if whole else None,
        "effective_rank": own.effective_rank,
        "effective_rank_error": own.effective_rank_error,
        "top_energy": float((own.values**2).sum()) / whole if whole else None,
        "energy_in_w": energy_in_w,
        "svd_error": own.error,
    }


def relate_spectra(one: svd.Spectrum, other: svd.Spectrum, k: int) -> Row:
    """Return how the leading subspaces of two matrices of one shape lie to each other."""
    angles = principal_angles(one, other)
    rows, columns = one.shape
    sizes = one.values.size, other.values.size
    k = max(sizes) or min(k, rows, columns)  # fewer of low rank
    met = interference([one, other])
    sums: dict[str, float] = {}
    overlaps: list[float | None] = []
    for side, size, held in zip(("left", "right"), one.shape, angles, strict=True):
        squares = np.cos(np.radians(held)) ** 2
        overlaps.append(float(squares.mean()) if held else None)
        expected, sums[f"{side}_var"] = overlap_by_chance(size, *sizes)
        sums[side] = float(squares.sum()) - expected
    return {
        "overlap_left": overlaps[0],
        "overlap_right": overlaps[1],
        "overlap_chance": (k / rows + k / columns) / 2,
        "in_chance": k * k / (rows * columns),
        "interference": met.raw,
        "interference_share": met.relative,
        "angles_left": angles[0],
        "angles_right": angles[1],
        "sums": sums,
    }


def relate_parts(one: Own, other: Own, product: float, across: float) -> dict[str, float]:
    """Return what adds up of the parts of two matrices: spikes and the rests.

    `product` is their inner product, `across` that of each whole with the spikes of the other.
    """
    (a, in_a), (b, in_b) = one, other
    both = both_parts(a, b, (in_a.kept, in_b.kept))
    return {
        "product": product, "spikes": both, "rest": product - across + both,
        "square_a": a.norm_sq, "square_b": b.norm_sq,
        "spikes_a": in_a.kept_energy, "spikes_b": in_b.kept_energy,
        "rest_a": a.norm_sq - in_a.kept_energy, "rest_b": b.norm_sq - in_b.kept_energy,
    }  # fmt: skip
