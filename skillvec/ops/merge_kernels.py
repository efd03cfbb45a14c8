"""Merge methods by compiled kernels, on stored values with their exceptions.

Hides which methods a kernel knows and how what they need is packed for it. `combine` and `measure`
answer None where numpy has to do the work, whose functions say what the kernels do: methods put
together from other parts, more than six vectors, fp64, numbers near the ends of the range of fp64,
and vectors with values that are not finite.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from xxhash import xxh3_128_digest

from skillvec.ops import merge_methods as methods
from skillvec.ops.arcs import arc_shares
from skillvec.ops.compiled import CODES, Kernel, kernel
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import Array
from skillvec.ops.merge_counts import (
    LOWER,
    UPPER,
    Counts,
    Given,
    Weights,
    count_lower,
    count_upper,
    exact_total,
    gram,
    sum_squares,
)
from skillvec.ops.merge_methods import Method, Operator, Position

PART = np.dtype([
    ("weight", "<f8"), ("factor", "<f8"), ("dtype", "<i8"), ("kind", "<i8"), ("low", "<i8"),
    ("high", "<i8"), ("key", "<u8", 2),
])  # fmt: skip
MOST_PARTS = 6
KEEP, TRIM, DROP, MAGPRUNE = range(4)
KINDS = {methods.keep: KEEP, methods.trim: TRIM, methods.trim_to_norm: TRIM, methods.drop: DROP,
         methods.drop_small: TRIM, methods.magprune: KEEP}  # fmt: skip
SCALES = {methods.trim_to_norm: TRIM, methods.drop: DROP, methods.magprune: MAGPRUNE}
MERGES = {methods.add: 0, methods.follow_arc: 0, methods.elect: 1, methods.average_shared: 3,
          methods.project_out: 4}  # fmt: skip
LARGEST = 0x7FFFFFFF
NONE = b"", b"", b""


def combine(
    operator: Operator, parts: Sequence[Delta], weights: Weights, parameters: Given,
    place: Position, known: Any, out: Array,
) -> bool:  # fmt: skip
    """Write a merged piece to `out`, float32; return whether a kernel did, and all is finite."""
    run = _kernel("merge")
    if run is None or not isinstance(operator, Method) or not _suit(parts, out.dtype):
        return False
    return _combine(run, operator, parts, weights, parameters, place, known, out)


def measure(operator: Operator, number: int, parts: Sequence[Delta], known: Any) -> Counts | None:
    """Return what pass `number` of a method finds in a piece; None where no kernel does it."""
    if not isinstance(operator, Method) or not _suit(parts, np.dtype(np.float32)):
        return None
    measured = operator.measured[number].measure
    name = MEASURES.get(measured)
    run = None if name is None else _kernel(name)
    return None if run is None else _measure(run, measured, parts, known)


def _suit(parts: Sequence[Delta], dtype: Any) -> bool:
    held = all(part.dtype in ("BF16", "F16", "F32") for part in parts)
    return held and len(parts) <= MOST_PARTS and dtype == np.float32


def _fields(delta: Delta) -> tuple[Any, ...]:
    return delta.values, delta.positions, delta.exact


def _combine(
    run: Kernel, method: Method, parts: Sequence[Delta], weights: Weights, parameters: Given,
    place: Position, known: Any, out: Array,
) -> bool:  # fmt: skip
    if method.sparsify not in KINDS or method.merge not in MERGES or place.begin % 8:
        return False
    packed = np.zeros(len(parts), PART)
    dense = [given.get("density") == 1 for given in parameters]
    scale = KEEP if all(dense) else SCALES.get(method.sparsify, KEEP)
    chances: Any = b""
    how = MERGES[method.merge]
    if method.merge is methods.elect:
        how += bool(methods.common(parameters, "normalize", True))
    if method.merge is methods.project_out:
        weights = [weights[0], *known]
    elif method.merge is methods.follow_arc:
        weights = arc_shares(tuple(weights), tuple(known or ()))
    for i, (part, given) in enumerate(zip(parts, parameters, strict=True)):
        packed[i]["weight"], packed[i]["dtype"] = weights[i], CODES[part.dtype]
        packed[i]["factor"], packed[i]["high"] = 1, LARGEST
        if dense[i]:  # keeps all, whatever the method
            continue
        packed[i]["kind"] = KINDS[method.sparsify]
        key = f"{place.seed}:{place.streams[i]}:{place.name}"
        packed[i]["key"] = np.frombuffer(xxh3_128_digest(key.encode()), "<u8")
        if method.sparsify is methods.trim:
            packed[i]["low"], packed[i]["high"] = _limits(known[i])
        elif method.sparsify is methods.trim_to_norm:
            thresholds, packed[i]["factor"] = known[i]
            packed[i]["low"], packed[i]["high"] = _limits(thresholds)
        elif method.sparsify is methods.drop_small:
            packed[i]["low"] = _above(given["threshold"])
        elif method.sparsify is methods.drop:
            # below a limit that is no integer is at most the integer below it
            packed[i]["factor"] = given["density"]
            packed[i]["high"] = int(np.ceil(given["density"] * 2.0**32)) - 1
        elif method.sparsify is methods.magprune:
            chances = _chances(known, dense)
    sizes = np.abs([*packed["weight"], *packed["factor"]])
    if not ((sizes == 0) | ((sizes > 1e-100) & (sizes < 1e100))).all():
        return False
    fields = [field for part in parts for field in _fields(part)]
    fields += NONE * (MOST_PARTS - len(parts))
    return not run(out, packed, chances, place.begin, scale, how, *fields)


def _limits(thresholds: Sequence[int]) -> tuple[int, int]:
    return thresholds[0], thresholds[1] if len(thresholds) > 1 else LARGEST


def _above(threshold: float) -> int:
    """Return the bits of the smallest fp32 magnitude that exceeds a threshold."""
    nearest = np.float32(min(threshold, float(np.finfo(np.float32).max)))
    return int(nearest.view(np.uint32)) + (float(nearest) <= threshold)


_tables: dict[tuple[int, tuple[bool, ...]], tuple[Any, Array]] = {}


def _chances(known: Sequence[Any], dense: Sequence[bool]) -> Array:
    """Return MAGPRUNE's probabilities by upper bin, and their inverses, a row a vector.

    Kept for the last four, because a tensor has many blocks; `known` is held, so that its id is.
    """
    key = id(known), tuple(dense)
    held = _tables.get(key)
    if held is None:
        table = np.ones((len(known), 2, UPPER))
        for row, (bins, probabilities), keeps_all in zip(table, known, dense, strict=True):
            if not keeps_all:
                row[0, bins] = probabilities
        np.divide(1, table[:, 0], out=table[:, 1])
        held = _tables[key] = known, table
        for oldest in list(_tables)[:-4]:
            _tables.pop(oldest, None)
    return held[1]


def _measure(run: Kernel, measured: Any, parts: Sequence[Delta], known: Any) -> Counts | None:
    codes = [CODES[part.dtype] for part in parts]
    if measured is count_upper:
        counts = np.zeros((len(parts), UPPER + 1), np.int64)
        bins = np.empty(4 * UPPER, np.uint32)
        for part, code, row in zip(parts, codes, counts, strict=True):
            run(*_fields(part), code, row, bins)
        return counts
    if measured is count_lower:
        counts = np.zeros((len(parts), len(known[0]), LOWER), np.int64)
        for part, code, rows, found in zip(parts, codes, counts, known, strict=True):
            run(*_fields(part), code, np.array([upper for upper, _ in found], np.int64), rows)
        return counts
    if measured is sum_squares:
        counts = np.zeros((len(parts), 2, 2, 2048), np.int64)
        for part, code, sums, thresholds in zip(parts, codes, counts, known, strict=True):
            limits = _limits(thresholds)
            if run(*_fields(part), *_fields(part), code, code, *limits, sums):
                return None
        return counts
    pairs = list(zip(*(side.tolist() for side in np.tril_indices(len(parts))), strict=True))
    counts = np.zeros((len(pairs), 2, 2048), np.int64)
    for (i, j), sums in zip(pairs, counts, strict=True):
        ends = codes[i], codes[j], 0, LARGEST
        if run(*_fields(parts[i]), *_fields(parts[j]), *ends, sums):
            return None
    return counts


MEASURES: Mapping[Any, str] = {count_upper: "count_magnitudes", count_lower: "count_within",
                               sum_squares: "sum_products", gram: "sum_products"}  # fmt: skip

# ------------------------------------------------------- whether a kernel gives numpy's bytes here

KNOWN: dict[str, Any] = {
    "ties": [[0x3B000000]] * 2, "breadcrumbs": [[0x3A800000, 0x3C000000]] * 2,
    "della": [[list(range(0x3800, 0x3E00)), np.linspace(0.1, 1, 0x600).tolist()]] * 2,
    "sparsify": [[[0x3B000000], 1.7]] * 2, "orthogonal": [0.3], "slerp": [-0.6, 0.8],
    "nuslerp": [0.28, 0.96],
}  # fmt: skip
WEIGHTS, SEEN_AT = (0.7, -1.1), Position("w", 16, 5, ("a", "b"))
DIGESTS = {
    "merge": "d4de362e6cf8df96",
    "count_magnitudes": "405738e8af215c82",
    "count_within": "c1f86d0438dfac49",
    "sum_products": "12327d93871c8b85",
}


def fixed_parts() -> list[Delta]:
    """Return two deltas of 1,100 values in which every exponent of use and a few exceptions are."""
    steps = np.arange(1100, dtype=np.uint32) * np.uint32(2654435761)
    bits = (steps & 0x87FF0000) + np.uint32(0x38000000)  # 3e-5 to 1
    bits[::7] = 0
    at, exact = np.array([3, 700, 1099], np.uint32), np.array([1e-3, 0, 7.7e-4], np.float32)
    other = (bits[::-1] ^ (steps & 0x80003FFF)).view(np.float32)
    return [Delta((bits >> 16).astype(np.uint16), "BF16", at, exact), Delta(other, "F32")]


def sample_merge(run: Kernel | None) -> bytes:
    """Return what a kernel, or numpy, makes of the fixed deltas by every method."""
    parts, found = fixed_parts(), b""
    wide = [part.wide(0, 1100) for part in parts]
    for method in methods.METHODS:
        if method.of_matrices or method.merge not in MERGES:
            continue
        given = [{**method.defaults}] * 2
        known = KNOWN.get(method.name)
        out = np.zeros(1100, np.float32)
        if run is None:
            out = method.combine(wide, WEIGHTS, given, SEEN_AT, known)
        else:
            _combine(run, method, parts, WEIGHTS, given, SEEN_AT, known, out)
        found += out.tobytes()
    return found


def sample_measure(name: str, run: Kernel | None) -> bytes:
    """Return what a kernel, or numpy, measures of the fixed deltas."""
    parts = fixed_parts()
    found: list[Any] = []
    known = [[[0x3B00, 1]] * 2, [[0x3A81, 1]] * 2] if name == "count_within" else KNOWN["ties"]
    for measured in [key for key, value in MEASURES.items() if value == name]:
        if run is not None:
            counts = _measure(run, measured, parts, known)
        elif measured is gram:
            counts = gram([part.wide(0, 1100) for part in parts])
        else:
            each = zip(parts, known, strict=True)
            counts = np.stack([measured(p.wide(0, 1100), {}, one) for p, one in each])
        if counts is not None and name == "sum_products":  # what exponents hold may differ
            found += [exact_total(sums) for sums in counts.reshape(-1, 2, 2048)]
        elif counts is not None:
            at = np.flatnonzero(counts)
            found += [counts.shape, at.tolist(), counts.reshape(-1)[at].tolist()]
    return repr(found).encode()


@cache
def _kernel(name: str) -> Kernel | None:
    def sample(run: Kernel) -> bytes:
        return sample_merge(run) if name == "merge" else sample_measure(name, run)

    return kernel(name, sample, DIGESTS[name])
