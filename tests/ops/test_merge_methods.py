"""Ways of combining: small examples by hand, plain loops as oracle, laws, and mergekit.

`python tests/ops/test_merge_methods.py` rewrites docs/operators.md.
"""

import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from skillvec.errors import UsageError
from skillvec.ops import merge_counts
from skillvec.ops.arcs import arc_shares
from skillvec.ops.merge_methods import (
    OPERATORS,
    Operator,
    Position,
    check_parameters,
    check_weights,
)
from skillvec.ops.merge_parameters import PARAMETERS
from skillvec.ops.philox import draw_uint32
from skillvec.vectors.recipe import parse_recipe, resolve

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operators.md"
MERGEKIT = ROOT / ".venv-mergekit" / "bin" / "python"
STREAMS = tuple(f"{i:032x}" for i in range(1, 9))
# those of whole matrices are tried in tests/verbs/test_matrix_operators.py
NAMES = tuple(name for name, method in OPERATORS.items() if not method.of_matrices)
# that see density through `density_of`; dare decides by position alone
RANKED = ("ties", "della", "breadcrumbs", "sparsify")
DENSE = {"ties": {"density": 1}, "dare_linear": {"density": 1}, "dare_ties": {"density": 1},
         "della": {"density": 1}, "breadcrumbs": {"density": 1, "gamma": 0},
         "sparsify": {"density": 1}, "ram": {"threshold": 0}}  # fmt: skip

# that take any number of vectors
ANY_NUMBER = tuple(name for name in NAMES if OPERATORS[name].count is None)

Tensors = dict[str, list[np.ndarray]]  # name -> one array a vector


# -------------------------------------------------------------------------- what the engine will do


def run(
    operator: Operator,
    tensors: Tensors,
    weights: Sequence[float],
    parameters: Sequence[dict[str, Any]],
    cuts: dict[str, Sequence[int]] | None = None,
    streams: Sequence[str] = STREAMS,
    seed: int = 5,
    backwards: bool = False,
) -> dict[str, np.ndarray]:
    """Run all passes over pieces cut at `cuts`, then combine; `backwards` begins at the end."""
    streams = tuple(streams[: len(weights)])
    if operator.name == "fisher":
        tensors = {name: with_fisher(vectors) for name, vectors in tensors.items()}
    pieces = []
    for name, vectors in tensors.items():
        size = vectors[0].size
        bounds = [0, *sorted(cuts[name] if cuts else []), size]
        for begin, end in pairwise(bounds):
            pieces.append((name, begin, [vector[begin:end] for vector in vectors]))
    if backwards:
        pieces.reverse()
    scope = operator.scope(parameters)
    assert scope in ("tensor", "vector")
    known: dict[str, Any] = {}
    for number in range(operator.passes(parameters)):
        totals: dict[str, np.ndarray] = {}
        for name, begin, values in pieces:
            place = Position(name, begin, seed, streams)
            group = name if scope == "tensor" else ""
            part = operator.measure(number, values, weights, parameters, place, known.get(group))
            assert part.dtype in (np.int64, np.float64)
            totals[group] = totals[group] + part if group in totals else part
        known = {
            group: operator.settle(number, total, weights, parameters, known.get(group))
            for group, total in totals.items()
        }
        assert is_plain(known)
    out = {name: np.empty(0, np.float32) for name in tensors}
    parts: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in tensors}
    for name, begin, values in pieces:
        place = Position(name, begin, seed, streams)
        copies = [value.copy() for value in values]
        group = name if scope == "tensor" else ""
        result = operator.combine(values, weights, parameters, place, known.get(group))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(values, copies, strict=True))
        parts[name].append((begin, result))
    for name, found in parts.items():
        out[name] = np.concatenate([result for _, result in sorted(found, key=lambda x: x[0])])
    return out


def with_fisher(vectors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return vectors and behind them a Fisher diagonal for each: in the laws, the magnitudes."""
    return [*vectors, *(np.abs(vector).astype(np.float32) for vector in vectors)]


def needed(operator: str) -> dict[str, Any]:
    """Return the parameters without which an operator is refused."""
    return {"fisher": "f.safetensors"} if operator == "fisher" else {}


def is_plain(known: Any) -> bool:
    """Return whether something is made of lists, numbers and None, with names above."""
    if isinstance(known, dict | list):
        return all(map(is_plain, known.values() if isinstance(known, dict) else known))
    return known is None or type(known) in (int, float)


def one(
    operator: str,
    vectors: Sequence[Any],
    weights: Sequence[float] | None = None,
    parameters: Sequence[dict[str, Any]] | dict[str, Any] | None = None,
    **more: Any,
) -> np.ndarray:
    """Run an operator on one tensor "w"; lists become float32, parameters are checked."""
    arrays = [np.asarray(v, getattr(v, "dtype", np.float32)) for v in vectors]
    weights = [1.0] * len(arrays) if weights is None else weights
    given = parameters if isinstance(parameters, list) else [parameters or {}] * len(arrays)
    checked = [check_parameters(operator, p | needed(operator)) for p in given]
    return run(OPERATORS[operator], {"w": arrays}, weights, checked, **more)["w"]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------------------------------- by hand


def test_linear_by_hand():
    # 2*1 + .5*.5 = 2.25; 2*2 - .5*2 = 3; 0 + .5*4 = 2
    out = one("linear", [[1, 2, 0], [0.5, -2, 4]], [2, 0.5])
    assert out.tolist() == [2.25, 3, 2] and out.dtype == np.float32


KINDS = ["dense", "sparse", "steps", "sparse steps", "sparse fp64", "steps fp64"]
TIES = [[4, -1, 2, 0, 3], [-2, 5, 1, 1, 0]]


def test_ties_by_hand():
    # density .5 of the 4 non-zero values: 2 stay, |v| >= 3 gives 4 3, |v| >= 2 gives -2 5.
    # weighted by 1 and 3:  4 0 0 0 3  and  -6 15 0 0 0; sums -2 15 0 0 3, signs - + . . +
    # means of those that agree: -6/3, 15/3, 0, 0, 3/1
    assert one("ties", TIES, [1, 3], {"density": 0.5}).tolist() == [-2, 5, 0, 0, 3]
    # and their sums
    out = one("ties", TIES, [1, 3], {"density": 0.5, "normalize": False})
    assert out.tolist() == [-6, 15, 0, 0, 3]


def test_ties_keeps_all_that_equal_the_last():
    # 2 of 5 non-zero: the second largest is 2, and there are three of them
    out = one("ties", [[1, 2, -2, 3, 2, 0]], None, {"density": 0.4})
    assert out.tolist() == [0, 2, -2, 3, 2, 0]


def test_density_of_all_counts_the_zeros():
    # ceil(.5 * 6) = 3 of all six, against ceil(.5 * 4) = 2 of the four that are not 0
    vector = [[0, 0, 4, 3, 2, 1]]
    assert one("ties", vector, None, {"density": 0.5, "density_of": "all"}).tolist() == [
        0, 0, 4, 3, 2, 0]  # fmt: skip
    assert one("ties", vector, None, {"density": 0.5}).tolist() == [0, 0, 4, 3, 0, 0]
    # 5 of 6 is more than there are
    assert one("ties", vector, None, {"density": 0.8, "density_of": "all"}).tolist() == vector[0]


def test_ties_over_the_whole_vector_or_by_tensor():
    tensors = {"a": [np.array([1, 2], np.float32)], "b": [np.array([3, 4], np.float32)]}
    for scope, a, b in (("vector", [0, 0], [3, 4]), ("tensor", [0, 2], [0, 4])):
        checked = [check_parameters("ties", {"density": 0.5, "scope": scope})]
        out = run(OPERATORS["ties"], tensors, [1.0], checked)
        assert (out["a"].tolist(), out["b"].tolist()) == (a, b)


def test_an_exact_tie_of_signs_elects_none():
    # 1 - 1 = 0: no sign, no value; 2 - 1 > 0: the mean of the 2 alone
    assert one("ties", [[1, 2], [-1, -1]], None, {"density": 1}).tolist() == [0, 2]


def test_a_fraction_is_taken_as_written():
    # .07 * 100 is 7.000000000000001 in float64, .29 * 100 is 28.999999999999996
    vector = [np.arange(1, 101, dtype=np.float32)]
    assert np.count_nonzero(one("ties", vector, None, {"density": 0.07})) == 7
    breadcrumbs = one("breadcrumbs", vector, None, {"density": 0.5, "gamma": 0.29})
    assert np.flatnonzero(breadcrumbs).tolist() == list(range(21, 71))


# stream 1, seed 5, tensor "w": the first random numbers / 2^32, from the Philox below
CHANCES = [0.7613, 0.2433, 0.2050, 0.1794, 0.7693, 0.1993]


def test_the_chances_are_what_the_examples_say():
    found = [bits / 2**32 for bits in oracle_bits(5, STREAMS[0], "w", len(CHANCES))]
    assert found == pytest.approx(CHANCES, abs=5e-5)


def test_dare_linear_by_hand():
    # density .5 keeps where the chance is below .5: not at 0 and 4; the rest is divided by .5
    out = one("dare_linear", [[1, 2, 3, 4, 5, 6]], [3], {"density": 0.5})
    assert out.tolist() == [0, 12, 18, 24, 0, 36]


def test_dare_ties_by_hand():
    # density .5 leaves 0 4 6 8 0 12 of the first, density 1 all of the second, of weight 2:
    # sums 0+2 4-2 6-6 8-10 0-14 12-12; signs + + . - - .; means 2/2 4/1 0 -10/2 -14/2 0
    first, second = [1, 2, 3, 4, 5, 6], [1, -1, -3, -5, -7, -6]
    out = one("dare_ties", [first, second], [1, 2], [{"density": 0.5}, {"density": 1}])
    assert out.tolist() == [1, 4, 0, -5, -7, 0]


def test_della_by_hand():
    # ranks 0 1 2 3 of 4 give the probabilities .25 .5 .75 1 (.625 -+ .375) to keep.
    # chances .7613 .2433 .2050 .1794: 1/.25 is dropped, -2/.5, 4/.75 and 8/1 stay
    out = one("della", [[1, -2, 4, 8]], None, {"density": 0.625, "epsilon": 0.375})
    assert out.tolist() == [0, -4, float(np.float32(4 / 0.75)), 8]
    # 2 and 2 share rank 1.5 of 0..3: .625 each, so the chances .2433 and .2050 keep both
    out = one("della", [[1, 2, -2, 8]], None, {"density": 0.625, "epsilon": 0.375})
    assert out.tolist() == [0, float(np.float32(2 / 0.625)), float(np.float32(-2 / 0.625)), 8]


def test_breadcrumbs_by_hand():
    # of ten, floor(.2 * 10) = 2 are passed over (10, -9), the next ceil(.3 * 10) = 3 stay
    vector = [1, 2, 3, 4, 5, 6, 7, 8, -9, 10]
    out = one("breadcrumbs", [vector], None, {"density": 0.3, "gamma": 0.2})
    assert out.tolist() == [0, 0, 0, 0, 0, 6, 7, 8, 0, 0]
    # the zeros count: 6 of 12 are passed over, which leaves 4 3 2 of 10 .. 1, 0, 0
    out = one("breadcrumbs", [[*vector, 0, 0]], None,
              {"density": 0.25, "gamma": 0.5, "density_of": "all"})  # fmt: skip
    assert out.tolist() == [0, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]
    # all that is not 0 is passed over: nothing stays
    out = one("breadcrumbs", [[1, 2, 0, 0]], None,
              {"density": 0.5, "gamma": 0.5, "density_of": "all"})  # fmt: skip
    assert out.tolist() == [0, 0, 0, 0]


def test_ram_by_hand():
    # alone: 2*1; shared by two: (2*2 - 4)/2 = 0; by three: (2*3 + 3 + 3)/3 = 4; alone: 7
    vectors = [[1, 2, 3, 0], [0, -4, 3, 0], [0, 0, 3, 7]]
    assert one("ram", vectors, [2, 1, 1]).tolist() == [2, 0, 4, 7]
    # a vector of weight 0 does not share: (2*3 + 3)/2
    assert one("ram", vectors, [2, 1, 0]).tolist() == [2, 0, 4.5, 0]
    # what does not exceed the threshold is no change: 3 alone, -4 alone, 1 is at it
    chosen = [{"threshold": 3}, {"threshold": 3.5}, {"threshold": 1}]
    assert one("ram", vectors, [2, 1, 1], chosen).tolist() == [0, -4, 3, 7]
    # 1e-5 by default, compared as it is written: its fp32 is 9.9999997e-06
    above = float(np.nextafter(np.float32(1e-5), np.float32(1)))
    out = one("ram", [[1e-5, above, -1e-6], [1, 1, -1]])
    assert out.tolist() == [1, float(np.float32((1 + above) / 2)), -1]
    assert one("ram", [[1e-30], [1]], None, {"threshold": 0}).tolist() == [0.5]


def test_slerp_by_hand():
    for name in ("slerp", "nuslerp"):
        # a right angle, t = 1/3: sin 60 and sin 30
        out = one(name, [[2, 0], [0, 4]], [2, 1])
        assert out.tolist() == pytest.approx([2 * math.sqrt(0.75), 2], rel=1e-7)
        # 60 degrees, half way: sin 30 / sin 60 of both
        out = one(name, [[1, 0], [1, math.sqrt(3)]], [3, 3])
        share = 0.5 / math.sqrt(0.75)
        assert out.tolist() == pytest.approx([2 * share, 1.5 * 2 * share / math.sqrt(3)], rel=1e-6)
        # the ends, whatever the angle; norms may differ
        assert one(name, [[1, 5], [-2, 1]], [3, 0]).tolist() == [1, 5]
        assert one(name, [[1, 5], [-2, 1]], [0, 0.5]).tolist() == [-2, 1]
        # beyond an end: t = 2 of a right angle is sin -90 and sin 180
        assert one(name, [[1, 0], [0, 1]], [-1, 2]).tolist() == pytest.approx([-1, 0], abs=1e-7)
        # with a vector of zeros the cosine is 0: sin 45
        assert one(name, [[1, 3], [0, 0]]).tolist() == pytest.approx([0.5**0.5, 3 * 0.5**0.5])
        # parallel, opposite and both zero: lines
        assert one(name, [[1, 2], [2, 4]], [3, 1]).tolist() == [1.25, 2.5]
        assert one(name, [[1, 2], [-1, -2]], [3, 1]).tolist() == [0.5, 1]
        assert one(name, [[0, 0], [0, 0]]).tolist() == [0, 0]
        assert one(name, [[1, 2], [2, 4]], [0, 0]).tolist() == [0, 0]
    # at cos .9998 slerp takes the line, nuslerp the arc
    near = [[1, 0], [1, 0.02]]
    assert one("slerp", near).tolist() == pytest.approx([1, 0.01], rel=1e-7)
    share = math.sin(math.atan(0.02) / 2) / math.sin(math.atan(0.02))
    assert one("nuslerp", near).tolist() == pytest.approx([2 * share, 0.02 * share], rel=1e-7)
    assert share > 0.5 + 2e-5
    # so does .9996 either way, and .9994 not
    for cosine, lies_straight in ((0.9996, True), (-0.9996, True), (0.9994, False)):
        other = [cosine, math.sqrt(1 - cosine**2)]
        found = one("slerp", [[1, 0], other])
        assert (abs(float(found[0]) - (1 + cosine) / 2) < 1e-6) == lies_straight


def test_shares_of_an_arc_are_rounded_once():
    for angle in (1e-7, 0.03, 1.0, math.pi / 2, 2.2, 3.1):
        for weights in ((0.7, -0.3), (1.0, 1.0), (2.0, 0.5), (1.0, -40.0)):
            turned = tuple(w / sum(weights) * angle for w in weights)
            found = arc_shares(weights, (math.cos(angle), math.sin(angle)))
            expected = [math.sin(x) / math.sin(angle) for x in turned]
            assert found == pytest.approx(expected, rel=1e-12)
            assert arc_shares(weights[::-1], (math.cos(angle), math.sin(angle))) == found[::-1]
    # many times around: shares of 1000
    turned = [1 / (1 - 0.999) * 2.2, -0.999 / (1 - 0.999) * 2.2]
    found = arc_shares((1.0, -0.999), (math.cos(2.2), math.sin(2.2)))
    assert found == pytest.approx([math.sin(x) / math.sin(2.2) for x in turned], rel=1e-8)
    # 1 / sqrt(3) is .577350269189625764509..., which 1 / math.sqrt(3) rounds twice, to ...258
    assert arc_shares((1.0, 1.0), (0.5, math.sqrt(0.75))) == (0.5773502691896257,) * 2


def test_fisher_by_hand():
    # 4 counts 3 to 1: (3*4 + 1*8)/4; alone; all 0: the mean; a weight of 2: (2*1*6 + 1*3)/3
    values = [np.float32([4, 4, 4, 6]), np.float32([8, 8, 8, 3])]
    fishers = [np.float32([3, 1, 0, 1]), np.float32([1, 0, 0, 1])]
    fisher, given = OPERATORS["fisher"], [check_parameters("fisher", needed("fisher"))] * 2
    place = Position("w", 0, 0, STREAMS[:2])

    def merged(weights: list[float], floor: float = 0.0) -> list[float]:
        chosen = [p | {"floor": floor} for p in given]
        found = fisher.combine([*values, *fishers], weights, chosen, place, None)
        return [float(value) for value in found]

    assert merged([1, 1]) == [5, 4, 6, 4.5]
    assert merged([2, 1]) == [float(np.float32((6 * 4 + 8) / 7)), 4, float(np.float32(16 / 3)), 5]
    # against the negated second: (3*4 - 8)/4, 4, (4 - 8)/2, (6 - 3)/2
    assert merged([1, -1]) == [1, 4, -2, 1.5]
    # a floor of 1: the second is (4 + 8)/2
    assert merged([1, 1], 1.0) == [5, 6, 6, 4.5]
    assert merged([0, 0]) == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_the_papers_formula(kind: str):
    rng = np.random.default_rng(len(kind))
    vectors = [make_random(rng, 500, kind) for _ in range(3)]
    fishers = np.float32(rng.exponential(size=(3, 500)) * 10.0 ** rng.integers(-12, 1, (3, 1)))
    fishers[rng.random((3, 500)) < 0.5] = 0
    given, weights = [check_parameters("fisher", needed("fisher"))] * 3, [1.0, 0.5, 2.0]
    place = Position("w", 0, 0, STREAMS[:3])
    found = OPERATORS["fisher"].combine([*vectors, *fishers], weights, given, place, None)
    v, f, w = np.float64(vectors), np.float64(fishers), np.float64(weights)[:, None]
    idle = (f == 0).all(axis=0)
    assert 20 < idle.sum() < 200 and found.dtype == vectors[0].dtype
    f[:, idle] = 1
    expected = (w * f * v).sum(axis=0) / (w * f).sum(axis=0)
    tolerance = 1e-12 if "fp64" in kind else 2e-7
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(v).max())


def test_sparsify_by_hand():
    # half of 3 and 4 is 4; its norm is 4, that of both 5: 4 * 5/4 = 5, times 2
    assert one("sparsify", [[3, 4]], [2], {"density": 0.5}).tolist() == [0, 10]


def test_orthogonal_by_hand():
    # <v0, v1> = 3, |v1|^2 = 1: (3, 4) - 3 (1, 0) = (0, 4), times 2
    assert one("orthogonal", [[3, 4], [1, 0]], [2, 9]).tolist() == [0, 8]
    # Gram of (1,1,0) and (0,1,1) is [2 1; 1 2], right-hand side (3, 5): c = (1/3, 7/3)
    # (1,2,3) - (1,1,0)/3 - (0,1,1)*7/3 = (2/3, -2/3, 2/3)
    out = one("orthogonal", [[1, 2, 3], [1, 1, 0], [0, 1, 1]])
    assert out.tolist() == pytest.approx([2 / 3, -2 / 3, 2 / 3], rel=1e-6)
    # of a vector in the span nothing is left, to the last bit; dependent vectors do no harm
    v1, v2 = np.float32([1, -2, 0.5, 0]), np.float32([0, 3, 1, 7])
    for others in ([v1, v2], [v1, v2, v1 + v2], [v1, v1, 0 * v1, v2]):
        assert same(one("orthogonal", [v1 + 2 * v2, *others]), np.zeros(4, np.float32))
    # with nothing to be orthogonal to, it is the vector
    assert one("orthogonal", [[1, 2], [0, 0]]).tolist() == [1, 2]
    assert one("orthogonal", [[1, 2]]).tolist() == [1, 2]


# -------------------------------------------------------------------------- the oracle: plain loops


def oracle_bits(seed: int, stream: str, name: str, count: int, begin: int = 0) -> list[int]:
    """Return 32 bits for each position: Philox 4x64-10 as published, in Python integers.

    numpy's generator steps its counter before each block of four words.
    """
    mask = 2**64 - 1
    digest = xxhash.xxh3_128_digest(f"{seed}:{stream}:{name}".encode())
    bits: list[int] = []
    for block in range(begin // 8, (begin + count + 7) // 8):
        c = [block + 1, 0, 0, 0]
        k = list(struct.unpack("<2Q", digest))
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [b >> 64 ^ c[1] ^ k[0], b & mask, a >> 64 ^ c[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        for word in c:
            bits += [word & 0xFFFFFFFF, word >> 32]
    return bits[begin % 8 :][:count]


def pattern(value: float) -> int:
    """Return the order of a magnitude: its fp32 bits, at least 1 if it is not 0."""
    single = float(np.float32(abs(value)))
    bits = struct.unpack("<I", struct.pack("<f", single))[0]
    return max(bits, 1) if value else 0


def oracle_trim(vector: list[float], p: dict[str, Any]) -> list[float]:
    order = sorted((pattern(v) for v in vector if v), reverse=True)
    count = len(vector) if p["density_of"] == "all" else len(order)
    passed = int((Decimal(str(p.get("gamma", 0))) * count).to_integral_value(ROUND_FLOOR))
    take = int((Decimal(str(p["density"])) * count).to_integral_value(ROUND_CEILING))
    if passed >= len(order):
        return [0.0] * len(vector)
    chosen = set(order[passed : passed + take])
    return [v if v and pattern(v) in chosen else 0.0 for v in vector]


def oracle_drop(vector: list[float], p: dict[str, Any], bits: list[int]) -> list[float]:
    if p["density"] == 1:
        return vector
    chosen = [b < p["density"] * 2**32 for b in bits]
    return [v / p["density"] if kept else 0.0 for v, kept in zip(vector, chosen, strict=True)]


def oracle_magprune(vector: list[float], p: dict[str, Any], bits: list[int]) -> list[float]:
    if p["density"] == 1:
        return vector
    # zeros rank below the rest, if they have a rank
    order = sorted(pattern(v) >> 16 if v else -1 for v in vector)
    if p["density_of"] == "nonzero":
        order = [key for key in order if key >= 0]
    out = []
    for v, b in zip(vector, bits, strict=True):
        if not v:
            out.append(0.0)
            continue
        below, upto = (find(order, pattern(v) >> 16) for find in (bisect_left, bisect_right))
        rank = (below + upto - 1) / 2
        height = rank / (len(order) - 1) if len(order) > 1 else 0.5
        keep = p["density"] + p["epsilon"] * (2 * height - 1)
        out.append(v / keep if b < keep * 2**32 else 0.0)
    return out


def oracle_to_norm(vector: list[float], p: dict[str, Any]) -> list[float]:
    kept = oracle_trim(vector, p)
    before, after = math.fsum(v * v for v in vector), math.fsum(v * v for v in kept)
    return [v * math.sqrt(before / after) for v in kept] if after else kept


def oracle_elect(columns: list[tuple[float, ...]], weights: list[float], mean: bool) -> list[float]:
    out = []
    for column in columns:
        terms = [w * v for w, v in zip(weights, column, strict=True)]
        total = 0.0
        for term in terms:
            total += term
        agree = [i for i, term in enumerate(terms) if term * total > 0]
        found = sum(terms[i] for i in agree)
        out.append(found / sum(abs(weights[i]) for i in agree) if mean and agree else found)
    return out


def oracle_slerp(
    v0: list[float], v1: list[float], w0: float, w1: float, nearly: bool
) -> list[float]:
    """Shoemake's formula, with the limits of mergekit 0.1.5."""
    n0, n1 = math.hypot(*v0), math.hypot(*v1)
    cosine = math.fsum(a * b for a, b in zip(v0, v1, strict=True)) / ((n0 * n1) or 1)
    cosine, t = max(-1.0, min(1.0, cosine)), w1 / (w0 + w1)
    if 1 - cosine**2 <= 1e-16 if nearly else abs(cosine) > 0.9995:
        return [(1 - t) * a + t * b for a, b in zip(v0, v1, strict=True)]
    angle = math.acos(cosine)
    one, other = math.sin((1 - t) * angle), math.sin(t * angle)
    return [(one * a + other * b) / math.sin(angle) for a, b in zip(v0, v1, strict=True)]


def oracle_fisher(
    values: tuple[float, ...], weights: list[float], parameters: list[dict[str, Any]]
) -> float:
    """Return sum w f v / sum |w| f, where f is the magnitude of v in fp32 (`with_fisher`)."""
    sizes = [abs(float(np.float32(v))) for v in values]
    f = [max(size, p["floor"]) for size, p in zip(sizes, parameters, strict=True)]
    below = math.fsum(abs(w) * x for w, x in zip(weights, f, strict=True))
    return math.fsum(w * x * v for w, x, v in zip(weights, f, values, strict=True)) / (below or 1)


def oracle(
    name: str, vectors: list[list[float]], weights: list[float], parameters: list[dict[str, Any]]
) -> list[float]:
    """Return what an operator makes of one tensor "w" with seed 5."""
    parts = []
    for i, (vector, p) in enumerate(zip(vectors, parameters, strict=True)):
        bits = oracle_bits(5, STREAMS[i], "w", len(vector))
        if name in ("ties", "breadcrumbs"):
            parts.append(oracle_trim(vector, p))
        elif name == "sparsify":
            parts.append(oracle_to_norm(vector, p))
        elif name.startswith("dare"):
            parts.append(oracle_drop(vector, p, bits))
        elif name == "della":
            parts.append(oracle_magprune(vector, p, bits))
        else:
            parts.append(vector)
    columns = list(zip(*parts, strict=True))
    if name in ("ties", "dare_ties", "della"):
        return oracle_elect(columns, weights, parameters[0]["normalize"])
    if name == "orthogonal":
        matrix = np.array(vectors[1:]).T
        others = np.linalg.lstsq(matrix, np.array(vectors[0]), rcond=None)[0]
        return (weights[0] * (np.array(vectors[0]) - matrix @ others)).tolist()
    if name in ("slerp", "nuslerp"):
        return oracle_slerp(*vectors, *weights, nearly=name == "nuslerp")
    if name == "fisher":
        return [oracle_fisher(column, weights, parameters) for column in columns]
    if name == "ram":
        least = [p["threshold"] for p in parameters]
        columns = [tuple(v if abs(v) > limit else 0.0 for v, limit in zip(c, least, strict=True))
                   for c in columns]  # fmt: skip
    out = []
    for column in columns:
        terms = [w * v for w, v in zip(weights, column, strict=True)]
        total = 0.0
        for term in terms:
            total += term
        shared = sum(1 for term in terms if term)
        out.append(total / max(1, shared) if name == "ram" else total)
    return out


def make_random(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """Return a delta: normal, or multiples of a power of two as bf16 steps are; dense or sparse."""
    values = rng.normal(size=size) * 10.0 ** rng.integers(-6, 2)
    if "steps" in kind:
        values = rng.choice([-2, -1, -1, 1, 1, 2, 3], size) * 2.0 ** rng.integers(-14, -10, size)
    if "sparse" in kind:
        values[rng.random(size) > 0.2] = 0
    return values.astype(np.float64 if "fp64" in kind else np.float32)


def make_parameters(rng: np.random.Generator, name: str, density: float) -> dict[str, Any]:
    chosen: dict[str, Any] = {"density": density} if "density" in OPERATORS[name].defaults else {}
    chosen |= needed(name)
    if name == "ram":
        chosen["threshold"] = float(rng.choice([0, 1e-5, 1e-3]))
    if name == "fisher":
        chosen["floor"] = float(rng.choice([0, 1e-3]))
    if name == "breadcrumbs":
        chosen["gamma"] = float(rng.choice([0, min(0.1, round(1 - density, 2))]))
    if name == "della":
        chosen["epsilon"] = min(0.2, round(density / 2, 4), round(1 - density, 4))
    if name in RANKED:
        chosen["density_of"] = str(rng.choice(["nonzero", "all"]))
    return check_parameters(name, chosen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_operators_agree_with_plain_loops(name: str, kind: str):
    rng = np.random.default_rng(len(name) + len(kind))
    for density in (0.05, 0.1, 0.3, 0.5, 0.77, 0.95, 1.0):
        for normalize in (True, False):
            count = OPERATORS[name].count or int(rng.integers(2, 5))
            size = int(rng.integers(1, 300))
            vectors = [make_random(rng, size, kind) for _ in range(count)]
            weights = [float(w) for w in rng.choice([1, 0.5, -0.3, 2, 0.7], count)]
            chosen = [make_parameters(rng, name, density) for _ in range(count)]
            if "normalize" in OPERATORS[name].defaults:
                chosen = [p | {"normalize": normalize} for p in chosen]
            found = run(OPERATORS[name], {"w": vectors}, weights, chosen)["w"]
            expected = np.array(oracle(name, [v.tolist() for v in vectors], weights, chosen))
            assert found.dtype == vectors[0].dtype
            if name == "orthogonal":  # the oracle's least squares is not exact
                largest = max(float(np.abs(v).max()) for v in vectors)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * largest * count)
            elif name in ("slerp", "nuslerp"):  # nor are its sine and cosine
                largest = max(float(np.abs(v).max()) for v in vectors)
                np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * largest)
            elif name in ("sparsify", "della", "fisher"):  # a scale, a share: computed otherwise
                rtol = 1e-12 if "fp64" in kind else 2e-7
                np.testing.assert_allclose(found, expected, rtol=rtol, atol=0)
            else:
                assert same(found, expected.astype(found.dtype) + 0.0)


def test_random_bits_are_philox_addressed_by_position():
    expected = oracle_bits(5, STREAMS[0], "w", 100)
    for begin, size in ((0, 100), (1, 99), (7, 2), (8, 8), (15, 1), (16, 0), (93, 7)):
        found = draw_uint32(f"5:{STREAMS[0]}:w", begin, size)
        assert found.tolist() == expected[begin : begin + size]
    far = 2**36 + 5
    found = draw_uint32(f"5:{STREAMS[0]}:w", far, 20)
    assert found.tolist() == oracle_bits(5, STREAMS[0], "w", 20, far)


@pytest.mark.parametrize("part", ["seed", "stream", "name"])
def test_masks_differ_by_seed_stream_and_name(part: str):
    values = np.ones(400, np.float32)
    given = check_parameters("dare_linear", {"density": 0.5})

    def mask(seed: int = 5, stream: str = STREAMS[0], name: str = "w") -> np.ndarray:
        out = run(OPERATORS["dare_linear"], {name: [values]}, [1.0], [given], None, [stream], seed)
        return out[name] != 0

    other = {"seed": 6, "stream": STREAMS[1], "name": "v"}[part]
    differing = np.count_nonzero(mask() != mask(**{part: other}))
    assert 140 < differing < 260  # 200 expected, 10 a standard deviation
    assert same(mask(), mask())


# ---------------------------------------------------------------------------------------- the laws

STEPS = [0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 3.0, -0.25]
FINITE = st.floats(-(2.0**99), 2.0**99, width=32)
VALUE = st.one_of(st.sampled_from(STEPS), FINITE)
DENSITY = st.sampled_from([0.05, 0.2, 0.31, 0.5, 0.77, 1.0])
WEIGHT = st.sampled_from([1.0, 0.5, -0.3, 2.0, 0.7, -1.0])


def array_of(values: Sequence[float], dtype: Any = np.float32) -> np.ndarray:
    return np.array(values, dtype) + dtype(0)


@st.composite
def problems(draw: Callable[..., Any], vectors: int = 2, sizes: tuple[int, int] = (1, 40)) -> Any:
    """Return arrays, weights and, for any operator, parameters that differ by vector."""
    size = draw(st.integers(*sizes))
    row = st.lists(VALUE, min_size=size, max_size=size)
    arrays = [array_of(draw(row)) for _ in range(vectors)]
    weights = [draw(WEIGHT) for _ in range(vectors)]
    densities = [draw(DENSITY) for _ in range(vectors)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return arrays, weights, lambda name: [make_parameters(rng, name, d) for d in densities]


def of_its_number(name: str, arrays: Any, weights: Any, make: Any) -> Any:
    """Return a problem with no more vectors than an operator takes."""
    count = OPERATORS[name].count
    return arrays[:count], weights[:count], make(name)[:count]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "orthogonal"])
@settings(max_examples=20)
@given(problem=problems())
def test_the_order_of_two_vectors_does_not_matter(name: str, problem: Any):
    arrays, weights, make = problem
    chosen = make(name)
    streams = list(STREAMS[:2])
    forward = run(OPERATORS[name], {"w": arrays}, weights, chosen, streams=streams)["w"]
    back = run(OPERATORS[name], {"w": arrays[::-1]}, weights[::-1], chosen[::-1],
               streams=streams[::-1])["w"]  # fmt: skip
    assert same(forward, back)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(problem=problems(vectors=3))
def test_negated_vectors_give_the_negated_result(name: str, problem: Any):
    arrays, weights, chosen = of_its_number(name, *problem)
    plain = run(OPERATORS[name], {"w": arrays}, weights, chosen)["w"]
    turned = run(OPERATORS[name], {"w": [-a for a in arrays]}, weights, chosen)["w"]
    assert same(turned, -plain + np.float32(0))
    assert not np.signbit(plain[plain == 0]).any()
    assert not np.signbit(turned[turned == 0]).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ANY_NUMBER)
@settings(max_examples=20)
@given(row=st.lists(VALUE, min_size=1, max_size=30))
def test_one_vector_at_density_1_and_weight_1_is_itself(name: str, dtype: Any, row: list[float]):
    vector = array_of(row, dtype)
    chosen = check_parameters(name, DENSE.get(name, {}) | needed(name))
    assert OPERATORS[name].passes([chosen]) == (1 if name == "orthogonal" else 0)
    assert same(run(OPERATORS[name], {"w": [vector]}, [1.0], [chosen])["w"], vector)


@settings(max_examples=20)
@given(problem=problems(vectors=3))
def test_a_weight_of_0_contributes_nothing(problem: Any):
    arrays, weights, make = problem
    for name in ("linear", "ram", "ties", "dare_ties", "dare_linear", "della", "breadcrumbs",
                 "fisher"):  # fmt: skip
        chosen = make(name)
        without = run(OPERATORS[name], {"w": arrays[:2]}, weights[:2], chosen[:2])["w"]
        found = run(OPERATORS[name], {"w": arrays}, [*weights[:2], 0.0], chosen)["w"]
        assert same(found, without), name


@settings(max_examples=20)
@given(problem=problems(vectors=2))
def test_a_zero_vector_adds_nothing(problem: Any):
    arrays, weights, make = problem
    zero = np.zeros_like(arrays[0])
    for name in ANY_NUMBER:
        chosen = [p | {"floor": 0.0} if name == "fisher" else p for p in make(name)]
        alone = run(OPERATORS[name], {"w": arrays[:1]}, weights[:1], chosen[:1])["w"]
        found = run(OPERATORS[name], {"w": [arrays[0], zero]}, weights, chosen)["w"]
        assert same(found, alone), name


@settings(max_examples=20)
@given(problem=problems(vectors=2))
def test_a_power_of_two_passes_through(problem: Any):
    arrays, weights, make = problem
    small = [np.clip(a, -1e20, 1e20) for a in arrays]
    small = [np.where(np.abs(a) < 1e-20, np.float32(0), a) for a in small]
    for name in NAMES:
        chosen = make(name)
        plain = run(OPERATORS[name], {"w": small}, weights, chosen)["w"]
        large = [a * np.float32(2**20) for a in small]
        lengths = [{n: p[n] * 2**20 for n in ("threshold", "floor") if n in p} for p in chosen]
        chosen = [p | more for p, more in zip(chosen, lengths, strict=True)]
        scaled = run(OPERATORS[name], {"w": large}, weights, chosen)
        if np.all((plain == 0) | (np.abs(plain) > 1e-36)):
            assert same(scaled["w"], plain * np.float32(2**20)), name


SCOPED = [(name, scope) for name in NAMES for scope in ("tensor", "vector")
          if scope == "tensor" or "scope" in OPERATORS[name].defaults]  # fmt: skip


@pytest.mark.parametrize(("name", "scope"), SCOPED)
@settings(max_examples=20)
@given(double=st.booleans(), data=st.data())
def test_no_byte_depends_on_how_tensors_are_cut(name: str, scope: str, double: bool, data: Any):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    sizes = {"a": data.draw(st.integers(1, 500)), "b": data.draw(st.integers(1, 500))}
    kinds = [data.draw(st.sampled_from(KINDS[:4])) for _ in range(3)]
    if double:
        kinds[1] += " fp64"
    tensors = {n: [make_random(rng, size, kind) for kind in kinds] for n, size in sizes.items()}
    chosen = [make_parameters(rng, name, data.draw(DENSITY)) for _ in kinds]
    if "scope" in OPERATORS[name].defaults:
        chosen = [p | {"scope": scope} for p in chosen]
    count = OPERATORS[name].count
    tensors, chosen = {n: vectors[:count] for n, vectors in tensors.items()}, chosen[:count]
    weights = [0.7, -1.1, 0.5][:count]
    whole = run(OPERATORS[name], tensors, weights, chosen)
    cuts = {n: data.draw(st.lists(st.integers(0, size), max_size=6)) for n, size in sizes.items()}
    cut = run(OPERATORS[name], tensors, weights, chosen, cuts, backwards=True)
    for n in tensors:
        assert whole[n].dtype == (np.float64 if double else np.float32)
        assert same(whole[n], cut[n])


@pytest.mark.parametrize("name", NAMES)
def test_pieces_longer_than_a_step(name: str):
    # a piece is worked on in steps of 2^16, so positions and sums must go on across them
    rng = np.random.default_rng(3)
    size = 2 * merge_counts.STEP + 1001
    tensors = {"w": [make_random(rng, size, kind) for kind in ("dense", "sparse steps")]}
    chosen = [make_parameters(rng, name, 0.4) for _ in range(2)]
    whole = run(OPERATORS[name], tensors, [0.7, -1.1], chosen)["w"]
    cuts = {"w": [5, 70000, 70001, 131073]}
    assert same(whole, run(OPERATORS[name], tensors, [0.7, -1.1], chosen, cuts)["w"])


# ------------------------------------------------------------------------------- what is measured


@given(st.lists(st.floats(-1e300, 1e300), max_size=60))
def test_sums_are_exact(values: list[float]):
    total = merge_counts.exact_total(merge_counts.exact_sums(np.array(values)))
    assert Fraction(total, 2**1075) == sum((Fraction(v) for v in values), Fraction(0))


def test_sums_are_exact_where_float64_is_not():
    rng = np.random.default_rng(0)
    values = rng.normal(size=80_000) * 10.0 ** rng.integers(-30, 30, 80_000)
    sums = merge_counts.exact_sums(values[:70_000]) + merge_counts.exact_sums(values[70_000:])
    assert Fraction(merge_counts.exact_total(sums), 2**1075) == sum(map(Fraction, values.tolist()))
    assert merge_counts.exact_total(sums) / 2**1075 == math.fsum(values)


@pytest.mark.parametrize("size", [1, 2, 5, 1000, 30_000])
def test_thresholds_are_exact(size: int):
    rng = np.random.default_rng(size)
    for values in (
        rng.normal(size=size) * 1e-3,
        rng.integers(0, 2**23, size) * 2.0**-149,  # subnormals only: upper bins 0 .. 127
        rng.integers(0, 2**16, size) * 2.0**-149,  # all in bin 0, with the zeros
        1 + rng.integers(0, 300, size) * 2.0**-23,  # all in one bin
        np.full(size, -3.0),
    ):
        vector = values.astype(np.float32)
        for density in (0.01, 0.2, 0.5, 0.99):
            given = check_parameters("ties", {"density": density})
            found = run(OPERATORS["ties"], {"w": [vector]}, [1.0], [given])["w"]
            order = np.sort(np.abs(vector[vector != 0]))[::-1]
            k = math.ceil(Fraction(str(density)) * order.size)
            expected = np.where(np.abs(vector) >= order[k - 1], vector, 0) if k else vector
            assert same(found, expected + np.float32(0))


def test_float64_values_beyond_float32_have_a_rank():
    # 1e-60 and 1e300 have no fp32 neighbours; they rank lowest and highest, and are not zeros
    vector = np.array([1e-60, -2.0, 1e300, 0.0, 3.0])
    kept = one("ties", [vector], None, {"density": 0.5})
    assert kept.tolist() == [0, 0, 1e300, 0, 3]
    kept = one("ties", [vector], None, {"density": 0.99})
    assert kept.tolist() == vector.tolist()


def test_a_vector_of_zeros_alone():
    for name in NAMES:
        for scope in ("tensor", "vector"):
            given = {"scope": scope} if "scope" in OPERATORS[name].defaults else {}
            found = one(name, [np.zeros(7, np.float32)] * 2, None, given)
            assert same(found, np.zeros(7, np.float32)), name
    assert one("linear", [np.zeros(0, np.float32)]).size == 0


def test_what_leaves_float32_becomes_infinite_without_a_warning():
    huge = np.float32([3e38, -3e38])
    assert one("linear", [huge, huge]).tolist() == [np.inf, -np.inf]
    assert one("dare_ties", [huge, -huge], [1, 0.5], {"density": 1}).tolist() == huge.tolist()


def test_della_keeps_as_many_as_its_density_says():
    rng = np.random.default_rng(0)
    vector = make_random(rng, 200_000, "sparse")
    out = one("della", [vector], None, {"density": 0.5, "epsilon": 0.3})
    held = vector != 0
    magnitudes = np.abs(vector[held])
    kept = (out[held] != 0)[np.argsort(magnitudes)]
    assert kept.mean() == pytest.approx(0.5, abs=0.01)
    tenths = kept[: kept.size // 10 * 10].reshape(10, -1).mean(axis=1)
    assert tenths == pytest.approx(np.linspace(0.23, 0.77, 10), abs=0.03)
    # 1 / p makes the expectation that of the vector
    assert np.abs(out).sum() == pytest.approx(np.abs(vector).sum(), rel=0.02)


def test_sparsify_keeps_the_norm():
    rng = np.random.default_rng(1)
    vector = make_random(rng, 5000, "dense")
    out = one("sparsify", [vector], None, {"density": 0.1})
    assert np.count_nonzero(out) == 500
    before, after = (float(np.linalg.norm(v.astype(np.float64))) for v in (vector, out))
    assert after == pytest.approx(before, rel=1e-7)


def test_orthogonal_is_orthogonal():
    rng = np.random.default_rng(2)
    vectors = [make_random(rng, 5000, kind) for kind in ("dense", "sparse", "dense", "steps")]
    vectors[0] = (vectors[0] + 30 * vectors[2] - vectors[3]).astype(np.float32)
    wide = [v.astype(np.float64) for v in vectors]
    for scope in ("tensor", "vector"):
        tensors = {"a": [v[:2000] for v in vectors], "b": [v[2000:] for v in vectors]}
        given = [check_parameters("orthogonal", {"scope": scope})] * 4
        out = run(OPERATORS["orthogonal"], tensors, [1.0] * 4, given)
        slices = {"a": slice(0, 2000), "b": slice(2000, None)}
        joined = np.concatenate([out["a"], out["b"]]).astype(np.float64)
        places = slices.values() if scope == "tensor" else [slice(None)]
        for place in places:
            for other in wide[1:]:
                scale = np.linalg.norm(wide[0][place]) * np.linalg.norm(other[place])
                assert abs(joined[place] @ other[place]) < 1e-8 * scale


def test_a_vector_nearly_in_the_span_of_another_is_left_out():
    # .3 v1 rounded to fp32 differs from v1's direction by 2^-25: noise, not a direction of its own
    rng = np.random.default_rng(4)
    v0, v1 = (make_random(rng, 3000, "dense") for _ in range(2))
    near = (np.float32(0.3) * v1).astype(np.float32)
    operator, given = OPERATORS["orthogonal"], [check_parameters("orthogonal", {})] * 3

    def coefficients(*vectors: np.ndarray) -> Any:
        place = Position("w", 0, 0, STREAMS[: len(vectors)])
        weights = [1.0] * len(vectors)
        total = operator.measure(0, vectors, weights, given, place, None)
        return operator.settle(0, total, weights, given, None)

    assert coefficients(v0, v1, near) == [*coefficients(v0, v1), 0.0]
    far = (near + np.float32(1e-3) * v0).astype(np.float32)
    assert coefficients(v0, v1, far)[1] != 0


# ------------------------------------------------------------------------------------- parameters


def test_defaults_are_filled_in_and_numbers_are_floats():
    assert check_parameters("ties", {}) == {
        "density": 0.2, "density_of": "nonzero", "scope": "vector", "normalize": True}  # fmt: skip
    found = check_parameters("ties", {"density": 1, "scope": "tensor"})
    assert type(found["density"]) is float and found["scope"] == "tensor"
    assert type(check_parameters("ties", {"density": np.float64(0.5)})["density"]) is float
    for name in NAMES:
        given = needed(name)
        assert check_parameters(name, given) == {**OPERATORS[name].defaults, **given}


@pytest.mark.parametrize(
    ("operator", "given", "said"),
    [
        ("tie", {}, ["'tie'", *OPERATORS]),
        ("ties", {"densty": 0.5}, ["'densty'", "density, density_of, scope, normalize"]),
        ("linear", {"density": 0.5}, ["'density'", "takes none"]),
        ("dare_ties", {"scope": "tensor"}, ["'scope'", "density, normalize"]),
        ("ties", {"density": 0}, ["density = 0", "above 0, at most 1"]),
        ("ties", {"density": 1.5}, ["density = 1.5"]),
        ("ties", {"density": -0.1}, ["density = -0.1"]),
        ("ties", {"density": float("nan")}, ["density = nan"]),
        ("ties", {"density": True}, ["density = True"]),
        ("ties", {"density": "0.5"}, ["density = '0.5'"]),
        ("ties", {"density": None}, ["density = None"]),
        ("ties", {"density_of": "zeros"}, ["density_of = 'zeros'", "nonzero or all"]),
        ("ties", {"scope": "layer"}, ["scope = 'layer'", "tensor or vector"]),
        ("ties", {"normalize": 1}, ["normalize = 1", "true or false"]),
        ("breadcrumbs", {"gamma": -0.1}, ["gamma = -0.1"]),
        ("breadcrumbs", {"gamma": 0.6, "density": 0.5}, ["gamma = 0.6", "with density at most 1"]),
        ("breadcrumbs", {"density": 1}, ["gamma = 0.006"]),
        ("della", {"epsilon": -0.1}, ["epsilon = -0.1"]),
        ("ram", {"threshold": -1e-9}, ["threshold = -1e-09", "at least 0"]),
        ("ram", {"threshold": math.nan}, ["threshold = nan"]),
        ("ram", {"epsilon": 0.1}, ["no parameter 'epsilon'", "threshold"]),
        ("fisher", {}, ["fisher = ''", "a file for each vector"]),
        ("fisher", {"fisher": 3}, ["fisher = 3"]),
        ("fisher", {"fisher": "f", "floor": -1}, ["floor = -1"]),
        ("della", {"epsilon": 0.4}, ["epsilon = 0.4", "at most 1"]),
        ("della", {"density": 0.05}, ["epsilon = 0.07", "above 0"]),
        ("della", {"density": 0.25, "epsilon": 0.25}, ["epsilon = 0.25", "above 0"]),
        ("spectral", {"rank": 0}, ["rank = 0", "at least 1"]),
        ("spectral", {"rank": 1.5}, ["rank = 1.5", "a whole number"]),
        ("spectral", {"energy": 1.01}, ["energy = 1.01", "at most 1"]),
        ("spectral", {"rank": 2, "energy": 0.5}, ["rank 2 and energy 0.5", "the other 0"]),
        ("spectral", {"part": "tail"}, ["part = 'tail'", "head, residual or whole"]),
        ("spectral", {"others": True}, ["others = True", "keep, drop or split"]),
        ("coarsen", {"rank": -1}, ["rank = -1", "a whole number"]),
        ("coarsen", {"bits": 24}, ["bits = 24", "0 to 23"]),
        ("coarsen", {"bits": 1.5}, ["bits = 1.5", "a whole number"]),
        ("coarsen", {"energy": 0.5}, ["no parameter 'energy'", "rank, bits, others"]),
        ("project", {}, ["moments = ''", "a path"]),
        ("project", {"moments": "m", "rank": -1}, ["rank = -1", "a whole number"]),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(operator: str, given: dict[str, Any], said: list[str]):
    with pytest.raises(UsageError) as caught:
        check_parameters(operator, given)
    for part in said:
        assert part in str(caught.value)


def test_weights_of_which_nothing_is_made_are_refused():
    for name in ("slerp", "nuslerp"):
        for count in (1, 3):
            with pytest.raises(UsageError, match=f"{name} takes 2 vectors, found {count}"):
                check_weights(name, [1.0] * count)
        with pytest.raises(UsageError, match=f"{name}: the weights 0.5 and -0.5 add up to 0"):
            check_weights(name, [0.5, -0.5])
        check_weights(name, [0.0, 0.0])
        check_weights(name, [-1.0, 3.0])
    for name in ANY_NUMBER:
        check_weights(name, [1.0, -1.0, 0.0])


def test_limits_that_are_allowed():
    check_parameters("breadcrumbs", {"density": 0.7, "gamma": 0.3})
    check_parameters("breadcrumbs", {"density": 1, "gamma": 0})
    check_parameters("della", {"density": 0.9, "epsilon": 0.1})
    check_parameters("della", {"density": 1})
    assert check_parameters("spectral", {"rank": 4.0, "energy": 0}) == (
        OPERATORS["spectral"].defaults | {"rank": 4})  # fmt: skip
    assert check_parameters("spectral", {"energy": 1})["energy"] == 1.0
    # a rank alone is not passed over for the default energy; neither leaves the matrix alone
    assert check_parameters("project", {"moments": "m", "rank": 3})["energy"] == 0
    assert check_parameters("project", {"moments": "m"})["energy"] == 0.9
    check_parameters("project", {"moments": "m", "rank": 0, "energy": 0})


@pytest.mark.parametrize(("name", "values"), [("scope", ("tensor", "vector")),
                                              ("normalize", (True, False))])  # fmt: skip
def test_vectors_that_disagree_are_refused(name: str, values: tuple[Any, Any]):
    with pytest.raises(UsageError, match=f"{name} must be the same for all vectors"):
        one("ties", [[1], [2]], None, [{name: value} for value in values])


def test_operators_are_what_the_protocol_says():
    for name, method in OPERATORS.items():
        operator: Operator = method
        assert operator.name == name
        assert set(method.defaults) <= set(PARAMETERS)
        assert all("\n" not in text for text in (method.formula, method.differs, method.paper))
        assert (method.formula + method.differs).isascii()
        assert pickle.loads(pickle.dumps(method)) == method


# --------------------------------------------------------------------------- against mergekit 0.1.5


def ask_mergekit(folder: Path, cases: list[tuple[dict[str, Any], np.ndarray]]) -> list[np.ndarray]:
    """Return what mergekit_reference.py finds for each case, in mergekit's interpreter."""
    if not MERGEKIT.exists():
        pytest.fail("no .venv-mergekit: run benchmarks/mergekit_setup.sh")
    arrays = {f"deltas_{i}": deltas for i, (_, deltas) in enumerate(cases)}
    np.savez(folder / "in.npz", cases=json.dumps([case for case, _ in cases]), **arrays)
    script = Path(__file__).parents[1] / "support" / "mergekit_reference.py"
    command = [str(MERGEKIT), str(script), str(folder / "in.npz"), str(folder / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as found:
        return [found[f"out_{i}"] for i in range(len(cases))]


def test_without_mergekit_the_comparison_fails_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules[__name__], "MERGEKIT", tmp_path / "python")
    with pytest.raises(pytest.fail.Exception, match="run benchmarks/mergekit_setup"):
        ask_mergekit(tmp_path, [])


@pytest.mark.slow
def test_mergekit_agrees_where_the_definitions_do(tmp_path: Path):
    rng = np.random.default_rng(0)
    size = 4000
    plain = np.stack([make_random(rng, size, "dense") for _ in range(3)]).astype(np.float32)
    plain /= np.abs(plain).max(axis=1, keepdims=True)  # alike in size, so that signs conflict
    steps = np.stack([make_random(rng, size, "sparse steps") for _ in range(3)])
    weights = [1.0, 0.5, 0.7]
    density = [0.2, 0.55, 0.85]  # of 4000 values a whole number, so int() and ceil() are one
    gamma = [0.01, 0.1, 0.05]
    all_values: dict[str, Any] = {"density_of": "all"}
    by_tensor = {"scope": "tensor", **all_values}
    agree: list[tuple[str, str, np.ndarray, dict[str, Any], list[dict[str, Any]]]] = [
        ("task_arithmetic", "linear", plain, {}, [{}] * 3),
        ("task_arithmetic", "linear", steps, {}, [{}] * 3),
        # no two magnitudes are equal, no sum is 0
        ("ties", "ties", plain, {"density": density},
         [{"density": d, **by_tensor} for d in density]),
        ("ties", "ties", plain, {"density": density, "normalize": False},
         [{"density": d, "normalize": False, **by_tensor} for d in density]),
        # at density 1 ties is elect and merge alone, and nothing is ranked
        ("ties", "ties", plain, {"density": 1.0}, [{"density": 1}] * 3),
        # mergekit's normalize is false for dare_ties; at density 1 there is no mask
        ("dare_ties", "dare_ties", plain, {"density": 1.0},
         [{"density": 1, "normalize": False}] * 3),
        ("della", "della", plain, {"density": 1.0}, [{"density": 1}] * 3),
        ("breadcrumbs", "breadcrumbs", plain, {"density": [0.2, 0.55, 0.85], "gamma": gamma},
         [{"density": d, "gamma": g, **all_values} for d, g in zip(density, gamma, strict=True)]),
        # mergekit's ram has no weights and takes what is at most epsilon for 0
        ("ram", "ram", steps, {"epsilon": 0.0}, [{"threshold": 0}] * 3),
        ("ram", "ram", np.float32(plain * 3e-5), {}, [{}] * 3),
        ("nuslerp", "nuslerp", plain[:2], {}, [{}] * 2),
        ("nuslerp", "nuslerp", steps[:2], {}, [{}] * 2),
        ("nuslerp", "nuslerp", np.float32([1, 3])[:, None] * plain[0], {}, [{}] * 2),
    ]  # fmt: skip
    cases = []
    for theirs, _, deltas, parameters, _ in agree:
        given = parameters
        if theirs != "ram":
            given = {"weight": weights[: len(deltas)]} | parameters
        cases.append(({"method": theirs, "parameters": given}, deltas))
    for (theirs, ours, deltas, _, chosen), expected in zip(
        agree, ask_mergekit(tmp_path, cases), strict=True
    ):
        given = [1.0] * 3 if theirs == "ram" else weights[: len(deltas)]
        found = one(ours, list(deltas), given, chosen)
        # fp32 at each step there, fp64 and one rounding here: a few 2^-24 of the terms
        assert np.count_nonzero(expected) > 500
        assert theirs != "ram" or deltas is steps or np.sum(np.abs(deltas) <= 1e-5) > 100
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-7 * np.abs(deltas).max())
        rounded = theirs in ("task_arithmetic", "ram", "nuslerp")
        assert np.array_equal(found != 0, expected != 0) or rounded


@pytest.mark.slow
def test_slerp_is_mergekits_on_vectors(tmp_path: Path):
    """mergekit's function is given the vectors themselves; its method takes whole models."""
    rng = np.random.default_rng(2)
    first = np.float32(rng.normal(size=5000))
    others = [np.float32(rng.normal(size=5000)), first * np.float32(-2), np.zeros_like(first),
              first + np.float32(rng.normal(size=5000)) * np.float32(0.01),  # straight there
              first + np.float32(rng.normal(size=5000)) * np.float32(0.1)]  # fmt: skip
    cases = [({"slerp": t}, np.stack([first, other])) for other in others for t in (0.25, 0.5, 1.5)]
    for (case, deltas), expected in zip(cases, ask_mergekit(tmp_path, cases), strict=True):
        found = one("slerp", list(deltas), [1 - case["slerp"], case["slerp"]])
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.slow
def test_mergekit_differs_where_the_table_says_so(tmp_path: Path):
    rng = np.random.default_rng(1)
    tied = make_random(rng, 4000, "steps")[None]
    values = np.sort(np.abs(make_random(rng, 1000, "dense")))[None] + np.float32(1e-9)
    draws = 2000
    della = {"density": 0.6, "epsilon": 0.3}
    cases: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"method": "ties", "parameters": {"weight": [1.0, 1.0]}}, np.float32([[1, 2], [-1, -1]])),
        ({"method": "ties", "parameters": {"weight": [-1.0]}}, np.float32([[1, -2]])),
        ({"sparsify": "magnitude", "parameters": {"density": 0.25}, "draws": 1}, tied),
        ({"sparsify": "random", "parameters": {"density": 0.3}, "draws": draws}, values),
        ({"sparsify": "della_magprune", "parameters": della, "draws": draws}, values),
        ({"method": "dare_linear", "parameters": {"weight": [1.0], "density": 0.3}},
         np.float32(rng.normal(size=(1, 200_000)))),
        ({"method": "nuslerp", "parameters": {"weight": [1.0, -1.0]}},
         np.float32([[1, 0], [0, 1]])),
        ({"method": "breadcrumbs", "parameters": {"weight": [1.0], "density": 0.9, "gamma": 0.5}},
         np.float32(np.arange(1, 11))[None]),
        ({"signs": "sum"}, plain_signs := np.float32(rng.normal(size=(3, 500)))),
    ]  # fmt: skip
    tie, negative, magnitude, random, magprune, dare, half, crumbs, signs = ask_mergekit(
        tmp_path, cases
    )
    # a sum of 0 elects + there and nothing here, where the result turns around with the vectors
    assert tie.tolist() == [1, 2]
    assert one("ties", [[1, 2], [-1, -1]], None, {"density": 1}).tolist() == [0, 2]
    # a weight of -1 is divided out again there
    assert negative.tolist() == [1, -2]
    assert one("ties", [[1, -2]], [-1], {"density": 1}).tolist() == [-1, 2]
    # equals are parted there to keep 1,000 of 4,000 exactly; here they stay together
    given = {"density": 0.25, "density_of": "all", "scope": "tensor"}
    ours = one("ties", [tied[0]], None, given) != 0
    assert magnitude.sum() == 1000 < ours.sum()
    assert np.all(ours[magnitude == 1])
    least = np.abs(tied[0][ours]).min()
    assert np.array_equal(magnitude[np.abs(tied[0]) > least], ours[np.abs(tied[0]) > least])
    # dare keeps with the same probability: 2,000 draws of 1,000 values, sigma 3e-4
    seeds = [run(OPERATORS["dare_linear"], {"w": [values[0]]}, [1.0], [{"density": 0.3}], seed=seed)
             for seed in range(draws)]  # fmt: skip
    ours = sum((out["w"] != 0).astype(int) for out in seeds)
    assert random.mean() / draws == pytest.approx(0.3, abs=0.0015)
    assert ours.mean() / draws == pytest.approx(0.3, abs=0.0015)
    assert ours.std() == pytest.approx(random.std(), rel=0.15)  # each position on its own
    # its scale there is that of the L1 norm: 1 / density but for chance
    kept = dare != 0
    factor = (dare[kept] / cases[5][1][0][kept]).mean()
    assert factor == pytest.approx(1 / 0.3, rel=0.02) and abs(factor - 1 / 0.3) > 1e-5
    assert np.abs(dare).sum() == pytest.approx(np.abs(cases[5][1]).sum(), rel=1e-4)
    # della: one row there is one tensor here. Same ranks, so the same probabilities; the bins of
    # the upper 16 bits hold few values each. Means of 100 values: sigma 1.1e-3
    chosen = [check_parameters("della", della)]
    seeds = [run(OPERATORS["della"], {"w": [values[0]]}, [1.0], chosen, seed=seed)
             for seed in range(draws)]  # fmt: skip
    ours = sum((out["w"] != 0).astype(int) for out in seeds).reshape(10, 100).mean(axis=1) / draws
    theirs = magprune.reshape(10, 100).mean(axis=1) / draws
    assert theirs == pytest.approx(np.linspace(0.33, 0.87, 10), abs=0.007)
    assert ours == pytest.approx(theirs, abs=0.012)
    # weights that add up to 0 give the middle there, and are refused here
    assert half.tolist() == pytest.approx([0.5**0.5] * 2)
    with pytest.raises(UsageError, match="add up to 0"):
        check_weights("nuslerp", [1.0, -1.0])
    # gamma .5 with density .9 drops one value there, and is refused here
    assert crumbs.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    with pytest.raises(UsageError, match="gamma"):
        check_parameters("breadcrumbs", {"density": 0.9, "gamma": 0.5})
    # the values that agree with the elected sign are the same
    total = plain_signs.astype(np.float64).sum(axis=0)
    assert np.array_equal(signs, np.sign(plain_signs) == np.sign(total))


# ---------------------------------------------------------------------------------------- the page


INTRODUCTION = """# Ways of combining skill vectors

This page is for whoever merges several [skill vectors](terms.md#skill-vector), or makes another
vector of one. It gives the formula, the paper and the parameters of every operator of
`combine --op` and `apply --op`, and says how to vary them by tensor and layer in a recipe. The
default is `linear`, the weighted sum.

| you want to | operators |
|---|---|
| add vectors with weights | `linear` |
| add vectors that pull single values in opposite directions | `ties`, `dare_ties`, `della` |
| keep a part of the values of each vector | `dare_linear`, `breadcrumbs`, `sparsify` |
| average each value over the vectors that changed it | `ram` |
| weigh each value by how much a model depends on it | `fisher` |
| take out of one vector what lies along others | `orthogonal` |
| go from one vector to another along an arc | `slerp`, `nuslerp` |
| keep, or take out, the leading singular directions of every matrix | `spectral` |
| take out what the inputs of a module reach | `project` |
| make a small, lossy copy of a vector | `coarsen` |

Generated from `skillvec/ops/merge_methods.py`: `python tests/ops/test_merge_methods.py` rewrites
this page, a test compares it.

## How to read the formulas

- v_i is the value of vector i at one position, w_i its weight, and t_i what is left of v_i.
- A count is the number of values in the scope: those that are not 0, or all of them with
  `density_of` all. This matters for RL vectors, which are sparse: where 10 % of the values changed,
  density .2 keeps 2 % of all values.
- Values are ranked by their magnitude in float32, and equal magnitudes are never parted: all values
  that equal the last one to keep are kept. Differences of bf16 models repeat often, so more values
  than the density says may be left.
- Where the weighted sum of an election is exactly 0, no sign is elected and the result is 0.
- The arithmetic is float64. It rounds once, to float32, or not at all if a vector is float64.
- Random masks come from Philox, keyed by seed, vector and tensor name and addressed by position. No
  byte of a result depends on the number of threads or on how tensors are cut into pieces.
- A measuring pass reads all values once before the merge, for example to find a threshold.
- The lines "against mergekit" compare with mergekit 0.1.5, which the slow tests run.
- The defaults are the papers'. Where a paper gives none, they are those of the authors' code: the
  drop rate .1 of DARE's merging script, DELLA's example command, the point where the search of
  Breadcrumbs begins, .3 of DoTS, and 1e-5 of RAM.

**The threshold of `ram`** is in units of the weights, and a change that does not exceed it is
dropped. A training whose changes are small as a whole needs a lower threshold. With threshold 0,
hardly a value of an fp32 vector counts as unchanged, and `ram` is a plain average. For bf16
vectors the threshold hardly matters: one step of bf16 is below 1e-5 only for weights below 2^-9,
about .002.

**`slerp` and `nuslerp`** take two vectors and go from one to the other along an arc. Its angle is
measured over the tensor, or with `scope` vector over all tensors. Where both vectors have one
length, so has the result. Only the ratio of the weights matters, and says how far along the arc the
result lies; `--lam` of `apply` says how much of it is added.
"""


MATRICES = """
## Whole matrices

`spectral`, `coarsen` and `project` look at each matrix as a whole. Of tensors with more dimensions,
such as fused experts, each matrix of the last two dimensions is taken on its own. Embeddings and
heads of the model are matrices as any other.

**`coarsen`** makes a copy that is meant to be small, and its file says so: its claim is `lossy`.
With a rank, the k (m + n) factors of each matrix are stored ([format.md](format.md), factors), if
the combination has one vector with weight 1; else they are multiplied out. Values with 7 bits or
fewer of mantissa fit bf16. `skillvec search` finds which rank and how many bits keep a skill
([search.md](search.md)).

**`spectral`** and **`project`** take each vector's matrices apart and add up the parts. So of
several vectors they give the sum of the heads, not the head of the sum; for that, store a
`linear` sum first. In a recipe each vector may have its own rank, part or moments. To leave
embeddings alone, give `spectral` the rule `{match: "*embed*", part: whole}`, and `project` the
rule `{match: "*embed*", rank: 0, energy: 0}`. Where a matrix has no more directions than are
wanted, the head is the vector itself, bit for bit, and the residual is 0. Otherwise head +
residual is the vector within the roundings of the two.

**`project`** leaves alone what a module has been seen to be given as input. The inputs are those
that `python -m skillvec.recipes.calibrate` measured: `--param moments=moments.safetensors`. By
default it takes the directions that hold .9 of the trace of E[x x'], as `energy_active` of
`orthogonality --activations` measures it. The path counts from the folder in which skillvec runs,
as the paths of vectors do. The file's digest (of what it says, and of samples of its values) goes
into the recipe, and another file is refused; so is a file of other shapes. Matrices that the file
does not know, such as embeddings, norms and biases, are kept as they are, and a warning names the
matrices.

**The report** has, for each tensor and vector, the rank and the share of the squared norm that is
kept (`ranks`, `kept_energies`), and the shares of all (`matrices`), before `rescale`.

**Cost.** Before the run each matrix is looked at once, whole, one for each worker at a time. The
line "memory" of the plan counts them: three copies each, and with `project` also the second
moments of an input and their eigenvectors, 36 n^2 bytes for n values. What is found, k (m + n)
fp32 values of an m x n matrix, waits in a file in the folder for temporary files (`TMPDIR`), so
that no rank fills the memory. The file goes with the run. With `--engine ray` the other machines
have to see that folder.

**Reproducibility.** Neither seed nor workers change a byte. But singular values come from LAPACK
on the processor, so another machine, or another version of torch, may differ in the last bits,
and `verify` there says that values differ.

A target in another layout than the vectors needs the combination stored first.
"""


RECIPES = """
## Recipes

A recipe gives weights and parameters by tensor and by layer. `skillvec combine --recipe FILE` and
`apply --recipe FILE` take it as YAML or JSON, `skillvec.combine(recipe=...)` as a dict. The
recipe is kept in the manifest of the result, and `verify` follows it.

```yaml
op: ties                         # default linear
parameters: {density: 0.3}       # of the operator, for all vectors
seed: 0
vectors:
  - vector: math.safetensors     # a vector, or TUNED::BASE
    weight: 0.7                  # default 1
    rules:                       # the last one that matches and states a key decides it
      - {match: "model.layers.*", weight: [0.2, 1.0]}       # a gradient from first to last layer
      - {match: "*.mlp.*", density: 0.5}
      - {match: "lm_head.*", weight: 0}
  - vector: tools.safetensors
    weight: -0.3
```

A glob that matches no tensor is an error, and so is a gradient that reaches tensors outside every
layer. In scope vector, tensors with the same parameters share a threshold; tensors to which a rule
gives another density have a threshold of their own.

## Files of Fisher information

`fisher` weighs each value by Fisher information, which it reads from a file beside each vector:

```sh
python -m skillvec.recipes.fisher --model MATH --data math.jsonl -o math_fisher.safetensors
python -m skillvec.recipes.fisher --model TOOLS --data tools.jsonl -o tools_fisher.safetensors
skillvec combine math.safetensors tools.safetensors --op fisher -o both.safetensors \\
    --param fisher=math_fisher.safetensors --param fisher=tools_fisher.safetensors
```

`--param fisher=` stands once for each vector, in their order. In Python the parameter is a list
of files; in a recipe it is the key `fisher` of the `parameters` of each vector, and no rule
changes it.

**What the file holds**: it is any safetensors file, or folder of shards, with a tensor of floats
for each tensor of the vector, under its name and in its shape, or in a layout that can be brought
to it.

- Tensors that no vector has are passed over. A tensor that no vector changes needs no information.
- A head that a vector unties goes by the information of its embedding.
- A value that is negative, NaN or infinite is refused when it is read, with the tensor's name.
- The files are read block by block as the vectors are, and take the memory of as many vectors more.

**Files must have one scale**, because only the ratio of the F_i at a place matters. Take the same
kind of texts for all, or weights that make up for the difference (`skillvec.recipes.fisher`
prints the L2 norm by which the authors' code divides). It writes the mean over the texts of the
squared gradient of log p(text), one backward pass a text. With `--sample` the tokens are drawn
from the model, as the definition of Fisher information has them; without it they are the text's
own.

**`verify`**: the manifest of a stored combination, and the header of a model that one was added
to, keep place and digest of each file, and `verify` refuses another file. The digest is that of
samples, as for models; a change between the samples is found by the values, which `verify`
computes again.
"""


def test_the_recipe_of_the_page_is_one():
    text = re.search(r"```yaml\n(.*?)```", RECIPES, re.S)
    assert text is not None
    recipe = parse_recipe(yaml.safe_load(text.group(1)))
    names = [f"model.layers.{i}.{k}.weight" for i in (0, 1) for k in ("mlp.up", "attn.q")]
    shares = resolve(recipe, [*names, "lm_head.weight", "norm.weight"])
    assert [share[0][0] for share in shares.values()] == [0.2, 0.2, 1.0, 1.0, 0, 0.7]
    assert [share[0][1]["density"] for share in shares.values()] == [0.5, 0.3, 0.5, 0.3, 0.3, 0.3]


def operators_page() -> str:
    """Return docs/operators.md, made from the table of operators."""
    parts = [re.sub(r"(?<=[|,] )`(\w+)`", r"[\1](#\1)", INTRODUCTION.strip())]
    for method in OPERATORS.values():
        paper = re.sub(r"arXiv ([\d.]+\d)", r"[arXiv \1](https://arxiv.org/abs/\1)", method.paper)
        defaults = ", ".join(f"{name} {shown(v)}" for name, v in method.defaults.items())
        passes = "one over whole matrices" if method.of_matrices else len(method.measured)
        parts.append(
            f"## {method.name}\n\n```text\n" + method.formula.replace("; ", "\n") + "\n```\n\n"
            f"- paper: {paper}\n- parameters and their defaults: {defaults or 'none'}\n"
            f"- measuring passes: {passes}\n- against mergekit: {method.differs}"
        )
    rows = ["## Parameters\n", "| name | what it does | values |", "|---|---|---|"]
    for name, (meaning, allowed) in PARAMETERS.items():
        row = re.sub(r"\|(\w_i)\|", r"\\|\1\\|", f"{meaning} | {allowed}")
        rows.append(f"| {name} | {row} |")
    parts.append("\n".join(rows))
    parts.append(MATRICES.strip())
    parts.append(RECIPES.strip())
    return "\n\n".join(parts) + "\n"


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"


def test_the_page_of_operators_is_what_the_table_says():
    assert PAGE.exists() and PAGE.read_text() == operators_page(), (
        "docs/operators.md is out of date; run: python tests/ops/test_merge_methods.py"
    )


if __name__ == "__main__":
    PAGE.write_text(operators_page())
    print(f"wrote {os.path.relpath(PAGE)}", file=sys.stderr)
