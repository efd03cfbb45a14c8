"""Measured sums into statements: realised gain, cosines and how far they are from chance.

Pure arithmetic on the sums that the engine brings back; reads nothing.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import copysign, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def realised(sums: Sequence[float] | Matrix, lam: float) -> tuple[float | None, float | None]:
    """Return gain and cosine of what was written against what was asked, lam * delta.

    `sums` are |written|^2, <written, delta> and |delta|^2. The gain is the projection
    <written, lam v> / |lam v|^2: 1 where everything arrived. None where nothing was asked, and for
    the cosine where nothing was written.
    """
    written_sq, written_dot_delta, delta_sq = (float(value) for value in sums)
    if lam == 0 or delta_sq == 0:
        return None, None
    gain = written_dot_delta / (lam * delta_sq)
    if written_sq == 0:
        return gain, None
    return gain, copysign(1.0, lam) * written_dot_delta / sqrt(written_sq * delta_sq)


def layer_of(name: str) -> str:
    """Return the prefix of a tensor name up to its first number: its layer, or "" for none."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return found.group() if found else ""


def kind_of(name: str) -> str:
    """Return the module kind: the name without its layer, other numbers as *."""
    layer = layer_of(name)
    rest = name[len(layer) :].lstrip(".") if layer else name
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.|$)", "*", rest)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 10 behind layer 9."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def pair_row(gram: Matrix, i: int, j: int, numel: int) -> dict[str, Any]:
    """Return cosine, norms and z of two of the deltas whose inner products are `gram`.

    z is the cosine over 1 / sqrt(numel), its standard deviation for unrelated directions in
    `numel` dimensions. Cosine and z are None where a delta is zero.
    """
    norms = sqrt(max(gram[i, i], 0.0)), sqrt(max(gram[j, j], 0.0))
    product = norms[0] * norms[1]
    cosine = float(gram[i, j]) / product if product > 0 else None
    if cosine is not None:
        cosine = max(-1.0, min(1.0, cosine))
    return {
        "numel": numel,
        "cosine": cosine,
        "z": None if cosine is None else cosine * sqrt(numel),
        "norm_a": norms[0],
        "norm_b": norms[1],
        "norm_ratio": norms[0] / norms[1] if norms[1] > 0 else None,
    }


def compare(
    grams: Sequence[tuple[str, int, Matrix]], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return for every pair of vectors its rows per tensor, layer, module kind and overall.

    `grams` holds (tensor name, numel, inner products) in any order.
    """
    ordered = sorted(grams, key=lambda item: natural_order(item[0]))
    pairs = []
    for i, j in combinations(range(len(labels)), 2):
        pairs.append(
            {
                "a": labels[i],
                "b": labels[j],
                "overall": _group(ordered, i, j),
                "layers": _groups(((layer_of(item[0]), item) for item in ordered), i, j),
                "kinds": _groups(((kind_of(item[0]), item) for item in ordered), i, j),
                "tensors": [
                    {"name": name, **pair_row(gram, i, j, numel)} for name, numel, gram in ordered
                ],
            }
        )
    return pairs


def _group(items: Iterable[tuple[str, int, Matrix]], i: int, j: int) -> dict[str, Any]:
    numel, total = 0, None
    for _, count, gram in items:
        numel += count
        total = gram if total is None else total + gram
    assert total is not None
    return pair_row(total, i, j, numel)


def _groups(
    keyed: Iterable[tuple[str, tuple[str, int, Matrix]]], i: int, j: int
) -> list[dict[str, Any]]:
    groups: dict[str, list[tuple[str, int, Matrix]]] = {}
    for key, item in keyed:
        groups.setdefault(key or "(no layer)", []).append(item)
    return [{"name": key, **_group(items, i, j)} for key, items in groups.items()]
