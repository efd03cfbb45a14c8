"""Ways of combining skill vectors: pure functions on blocks of 1-D arrays, one table of operators.

Hides how the papers' definitions are reached piece by piece. A tensor comes in pieces of any size,
in any order: before `combine`, measuring passes add up counts over a scope (one tensor, or all of
them), and `settle` turns the totals into thresholds, probabilities or coefficients. What is
measured is exact, random numbers are addressed by position and the rest is elementwise, so no byte
depends on how tensors are cut. No operator here measures anything that depends on the weights.

Blocks are finite float32 or float64; the arithmetic is float64, with one rounding at the end, and
zeros of the result are positive. Densities are fractions of the non-zero values unless `density_of`
is "all", since RL vectors are sparse. Values are ranked by the fp32 bits of their magnitude, and
equals are never parted: all that equal the k-th largest are kept, as in the TIES authors' code.
Refused: unknown parameters, values out of range, vectors that disagree on `scope` or `normalize`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from skillvec.errors import UsageError
from skillvec.ops.arcs import arc_shares, find_angle, find_small_angle
from skillvec.ops.kernels import Array
from skillvec.ops.merge_counts import (
    STEP,
    UPPER,
    Blocks,
    Counts,
    Given,
    Parameters,
    Weights,
    count_lower,
    count_upper,
    find_bins,
    find_coefficients,
    find_probabilities,
    find_scale,
    find_thresholds,
    gram,
    magnitude_bits,
    mark_between,
    sum_squares,
)
from skillvec.ops.merge_parameters import PARAMETERS, accepts
from skillvec.ops.philox import draw_uint32
from skillvec.ops.special import round_mantissa


class Position(NamedTuple):
    """Where a piece lies, and what addresses its random numbers: seed, stream, name, position."""

    name: str  # of the tensor
    begin: int  # flat position of the piece's first value
    seed: int
    streams: tuple[str, ...]  # identity of each vector, 32 hex digits


class Operator(Protocol):
    """What the engine asks of a way of combining; third parties may implement it.

    `passes`: how many measuring passes come first. `scope`: what measures are added up over,
    "tensor", or "vector" for all tensors. `measure`: what pass `number` adds up, int64 or float64,
    of one shape for every piece. `settle`: what the next pass and `combine` get as `known`, plain
    data. `combine`: the piece, float32, or float64 if any input is. Sequences hold one item a
    vector. In scope "vector" one set of parameters serves all tensors, and `measure` must not
    depend on the weights, which may differ by tensor.
    """

    @property
    def name(self) -> str: ...
    def passes(self, parameters: Given) -> int: ...
    def scope(self, parameters: Given) -> str: ...
    def measure(self, number: int, values: Blocks, weights: Weights, parameters: Given,
                place: Position, known: Any) -> Array: ...  # fmt: skip
    def settle(self, number: int, total: Array, weights: Weights, parameters: Given,
               known: Any) -> Any: ...  # fmt: skip
    def combine(self, values: Blocks, weights: Weights, parameters: Given, place: Position,
                known: Any) -> Array: ...  # fmt: skip


def keep(values: Array, given: Parameters, known: Any, key: str, begin: int) -> Array:
    """Keep all."""
    return values.astype(np.float64)


def trim(values: Array, given: Parameters, known: Any, key: str, begin: int) -> Array:
    """Keep what lies between the thresholds (TIES, Breadcrumbs)."""
    return np.where(mark_between(values, known), values, np.float64(0))


def trim_to_norm(values: Array, given: Parameters, known: Any, key: str, begin: int) -> Array:
    """Keep the largest and scale them to the norm of all (DoTS)."""
    thresholds, scale = known
    scaled: Array = trim(values, given, thresholds, key, begin) * scale
    return scaled


def drop_small(values: Array, given: Parameters, known: Any, key: str, begin: int) -> Array:
    """Keep what exceeds the threshold (RAM)."""
    return np.where(np.abs(values) > np.float64(given["threshold"]), values, np.float64(0))


def coarsen(values: Array, given: Parameters, known: Any, key: str, begin: int) -> Array:
    """Keep the first bits of each mantissa."""
    return round_mantissa(values, given["bits"])


def drop(values: Array, given: Parameters, known: Any, key: str, begin: int) -> Array:
    """Keep with probability `density` and divide by it (DARE)."""
    kept = draw_uint32(key, begin, values.size) < given["density"] * 2.0**32
    return np.where(kept, values / np.float64(given["density"]), 0)


def magprune(values: Array, given: Parameters, known: Any, key: str, begin: int) -> Array:
    """Keep with a probability that rises with the magnitude's rank, and divide by it (DELLA)."""
    bins, probabilities = known
    table = np.ones(UPPER)  # 1 is for zeros
    table[bins] = probabilities
    probability = table[magnitude_bits(values) >> 16]
    kept = draw_uint32(key, begin, values.size) < probability * 2.0**32
    return np.where(kept, values / probability, 0)


# --------------------------------------------------------------------- merge: the parts of a piece


def add(parts: list[Array], weights: Weights, parameters: Given, known: Any) -> Array:
    """Return the weighted sum."""
    total = np.zeros(parts[0].size)
    for part, weight in zip(parts, weights, strict=True):
        total += weight * part
    return total


def elect(parts: list[Array], weights: Weights, parameters: Given, known: Any) -> Array:
    """Return the weighted mean (or sum) of the values that have the sign of the weighted sum.

    Where the sum is exactly 0, as opposite bf16 steps often make it, no sign is elected and the
    result is 0: any other rule would not turn around with the vectors.
    """
    sign = np.sign(add(parts, weights, parameters, known))
    total, mass = np.zeros((2, sign.size))
    for part, weight in zip(parts, weights, strict=True):
        term = weight * part
        agrees = sign * term > 0
        total += term * agrees
        mass += abs(weight) * agrees
    if common(parameters, "normalize", True):
        np.divide(total, mass, out=total, where=mass > 0)
    return total


def average_shared(parts: list[Array], weights: Weights, parameters: Given, known: Any) -> Array:
    """Return the weighted sum, divided by the number of its terms that are not 0 (RAM)."""
    count = np.zeros(parts[0].size)
    for part, weight in zip(parts, weights, strict=True):
        count += weight * part != 0
    return add(parts, weights, parameters, known) / np.maximum(count, 1)


def follow_arc(parts: list[Array], weights: Weights, parameters: Given, known: Any) -> Array:
    """Return the sum in the shares of an arc from v_0 to v_1 (slerp)."""
    return add(parts, arc_shares(tuple(weights), tuple(known or ())), parameters, None)


def weigh(parts: list[Array], weights: Weights, parameters: Given, known: Any) -> Array:
    """Return the mean that weighs values by the second half of the parts, where not all are 0.

    Weights count by their size in what is divided by, as in an election.
    """
    count, sizes = len(weights), list(map(abs, weights))
    pairs = zip(parts[count:], parameters, strict=True)
    each = [np.maximum(fisher, given["floor"]) for fisher, given in pairs]
    idle = add(each, sizes, parameters, None) == 0
    each = [np.where(idle, 1, strength) for strength in each]
    mass = add(each, sizes, parameters, None) if any(sizes) else 1
    shared = [part * (f / mass) for part, f in zip(parts[:count], each, strict=True)]
    return add(shared, weights, parameters, None)


def project_out(parts: list[Array], weights: Weights, parameters: Given, known: Any) -> Array:
    """Return w_0 (v_0 - sum_j c_j v_j); the other weights play no part."""
    residual = parts[0]
    for part, coefficient in zip(parts[1:], known, strict=True):
        residual = residual - coefficient * part
    return weights[0] * residual


# -------------------------------------------------------------------------------------- the methods


class Pass(NamedTuple):
    """A measuring pass: `measure` and `settle` of each vector or, if `joint`, of all at once."""

    measure: Callable[..., Counts]
    settle: Callable[..., Any]
    joint: bool = False


@dataclass(frozen=True)
class Method:
    """An Operator put together from parts: measure, sparsify each vector, merge."""

    name: str
    formula: str
    paper: str
    differs: str  # from mergekit 0.1.5, and where it matters from the authors' code
    defaults: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[Pass, ...] = ()
    sparsify: Callable[..., Array] = keep
    merge: Callable[..., Array] = add
    of_matrices: bool = False  # t_i are parts of whole matrices, taken before pieces come here
    count: int | None = None  # of vectors, where it is not any

    @property
    def random(self) -> bool:
        """Whether the result depends on random numbers or files, and so on the tensor's name."""
        return self.sparsify in (drop, magprune) or self.merge is weigh

    def passes(self, parameters: Given) -> int:
        """Return the number of measuring passes: none where all densities are 1."""
        return 0 if all(map(_dense, parameters)) else len(self.measured)

    def scope(self, parameters: Given) -> str:
        """Return "tensor" or "vector"."""
        return str(common(parameters, "scope", "tensor"))

    def measure(self, number: int, values: Blocks, weights: Weights, parameters: Given,
                place: Position, known: Any) -> Counts:  # fmt: skip
        """Return int64 counts."""
        measured = self.measured[number]
        if measured.joint:
            return measured.measure(values)
        each = zip(values, parameters, known or [None] * len(values), strict=True)
        return np.stack([measured.measure(*one) for one in each])

    def settle(self, number: int, total: Array, weights: Weights, parameters: Given,
               known: Any) -> Any:  # fmt: skip
        """Return one item a vector: of plain lists, ints and floats."""
        measured = self.measured[number]
        if measured.joint:
            return measured.settle(total)
        each = zip(total, parameters, known or [None] * len(total), strict=True)
        return [measured.settle(*one) for one in each]

    def combine(self, values: Blocks, weights: Weights, parameters: Given, place: Position,
                known: Any) -> Array:  # fmt: skip
        """Return the combined piece; what is one item a vector stands behind all `values`."""
        values, beside = values[: len(weights)], values[len(weights) :]
        out = np.empty(values[0].size, np.result_type(np.float32, *values))
        keys = [f"{place.seed}:{stream}:{place.name}" for stream in place.streams]
        facts = [None] * len(values) if known is None or self.sparsify is keep else known
        each = list(zip(values, parameters, facts, keys, strict=True))
        for begin in range(0, out.size, STEP):
            end = begin + STEP
            with np.errstate(over="ignore", under="ignore"):
                parts = [
                    (keep if _dense(given) else self.sparsify)(
                        block[begin:end], given, fact, key, place.begin + begin
                    )
                    for block, given, fact, key in each
                ]
                parts += [block[begin:end].astype(np.float64) for block in beside]
                out[begin:end] = self.merge(parts, weights, parameters, known)
        out += 0.0  # no negative zeros
        return out


def _dense(given: Parameters) -> bool:
    return given.get("density") == 1


def common(parameters: Given, name: str, default: Any) -> Any:
    """Return a parameter that all vectors must share; raise UsageError if they do not."""
    first, *others = [given.get(name, default) for given in parameters]
    if any(other != first for other in others):
        raise UsageError(f"{name} must be the same for all vectors, found {[first, *others]}")
    return first


ABOVE = "t_i = v_i where |v_i| >= the ceil(density * count)-th largest, else 0"
DARE = "t_i = v_i / density with probability density, else 0"
ADD = "sum_i w_i t_i"
ELECT = "s = sign(sum_i w_i t_i); sum of the w_i t_i of sign s, / sum of their |w_i|"
ARC = ("s_i = w_i / (w_0 + w_1); a_0 v_0 + a_1 v_1 with a_i = sin(s_i angle) / sin(angle), the "
       "angle between v_0 and v_1")  # fmt: skip
NONZERO: dict[str, Any] = {"density_of": "nonzero"}
MEAN: dict[str, Any] = {"normalize": True}
THRESHOLDS = Pass(count_upper, find_bins), Pass(count_lower, find_thresholds)
METHODS = (
    Method(
        "linear", "sum_i w_i v_i", "Task arithmetic, arXiv 2212.04089",
        "task_arithmetic is the same sum, rounded at each step to the dtype of the models",
    ),
    Method(
        "ties", f"{ABOVE}; {ELECT}", "TIES, arXiv 2306.01708",
        "mergekit keeps int(density * all values) of each tensor, breaks ties by position; elects "
        "+ where the sum is 0 (here the result is 0); divides by the sum of w_i, not of |w_i|",
        {"density": 0.2, **NONZERO, "scope": "vector", **MEAN}, THRESHOLDS, trim, elect,
    ),
    Method(  # the authors' merging script drops .1
        "dare_linear", f"{DARE}; {ADD}", "DARE, arXiv 2311.03099",
        "mergekit restores each tensor's L1 norm instead of dividing by density; its masks come "
        "from one global seed and the order of work",
        {"density": 0.9}, (), drop,
    ),
    Method(
        "dare_ties", f"{DARE}; {ELECT}", "DARE, arXiv 2311.03099, and TIES, arXiv 2306.01708",
        "as dare_linear and ties; mergekit's normalize is false by default",
        {"density": 0.9, **MEAN}, (), drop, elect,
    ),
    Method(  # the authors' example: drop rate .3, window .14
        "della",
        "p_i rises linearly with the rank of |v_i| from density - epsilon to density + epsilon; "
        f"t_i = v_i / p_i with probability p_i, else 0; {ELECT}",
        "DELLA, arXiv 2406.11617",
        "paper and mergekit rank within rows; here over the tensor by the upper 16 bits of fp32, "
        "equal ones by their mean rank; mergekit restores the L1 norm instead of dividing by p_i",
        {"density": 0.7, "epsilon": 0.07, **NONZERO, **MEAN},
        (Pass(count_upper, find_probabilities),), magprune, elect,
    ),
    Method(  # where the authors' search for parameters begins
        "breadcrumbs",
        "t_i = v_i where |v_i| is below the floor(gamma * count) largest and among the next "
        f"ceil(density * count), else 0; {ADD}",
        "Model Breadcrumbs, arXiv 2312.06795",
        "mergekit takes fractions of all values, breaks ties by position, and lowers gamma where "
        "gamma + density exceeds 1 (refused here); the authors rank within rows",
        {"density": 0.15, "gamma": 0.006, **NONZERO}, THRESHOLDS, trim,
    ),
    Method(
        "ram", "t_i = v_i where |v_i| > threshold, else 0; "
        "sum_i w_i t_i / max(1, number of w_i t_i != 0)", "RAM, arXiv 2601.13572",
        "mergekit calls the threshold epsilon; it and the authors have no weights; no RAM+ here",
        {"threshold": 1e-5}, sparsify=drop_small, merge=average_shared,
    ),
    Method(  # the authors' code keeps .3
        "sparsify", f"{ABOVE}; sum_i w_i t_i |v_i| / |t_i|, norms over the tensor",
        "DoTS, arXiv 2605.00610",
        "not in mergekit; the authors' code takes fractions of all values and can keep the norm of "
        "the whole vector, not of each tensor",
        {"density": 0.3, **NONZERO}, (*THRESHOLDS, Pass(sum_squares, find_scale)), trim_to_norm,
    ),
    Method(
        "orthogonal", "w_0 (v_0 - sum_j c_j v_j), with c such that it is orthogonal to v_1..v_n",
        "none: least squares", "not in mergekit",
        {"scope": "tensor"}, (Pass(gram, find_coefficients, joint=True),), merge=project_out,
    ),
    Method(
        "slerp", f"{ARC}, or s_i where |cos(angle)| > .9995", "none: spherical interpolation",
        "mergekit turns whole models, and calls s_1 t; in both the cosine with a zero vector is 0",
        {"scope": "tensor"}, (Pass(gram, find_angle, joint=True),), merge=follow_arc, count=2,
    ),
    Method(
        "nuslerp", f"{ARC}, or s_i where sin(angle) <= 1e-8", "none: spherical interpolation",
        "mergekit takes s_i = .5 where |w_0 + w_1| < 1e-6 (refused here where it is 0); "
        "nuslerp_row_wise and nuslerp_flatten false, an angle for each column or row, are not "
        "here, because a piece of a tensor knows no rows",
        {"scope": "tensor"}, (Pass(gram, find_small_angle, joint=True),), merge=follow_arc, count=2,
    ),
    Method(
        "fisher", "f_i = max(F_i, floor), F_i from a file, or 1 where all are 0; "
        "sum_i w_i f_i v_i / sum_i |w_i| f_i", "Fisher merging, arXiv 2111.09832, arXiv 2606.18521",
        "not in mergekit; the authors' code divides each file by its L2 norm (here by weights) and "
        "has a floor of 1e-6 on the first model alone",
        {"fisher": "", "fisher_digest": "", "floor": 0.0}, merge=weigh,
    ),
    Method(  # rank 1 is what arXiv 2510.00553 looks at
        "spectral",
        "A_i = the k leading singular triplets of v_i, matrix by matrix; "
        f"t_i = A_i (part head) or v_i - A_i (part residual); {ADD}",
        "rank-1 dominance of RL updates, arXiv 2510.00553, and ResMerge's head and residual, "
        "arXiv 2606.02252",
        "not in mergekit; 2510.00553 scales the head to the norm of v_i (rescale), ResMerge's code "
        "leaves embeddings and heads of the model whole (a rule with part whole), and how it "
        "weighs heads and residuals of several vectors is not here",
        {"rank": 1, "energy": 0.0, "part": "head", "rescale": False, "others": "keep"},
        of_matrices=True,
    ),
    Method(
        "coarsen",
        "t_i = L_i R_i' rounded once to fp32, matrix by matrix: the k leading singular triplets of "
        "v_i, each side with the root of the singular value, rounded to `bits` stored bits of "
        f"mantissa; with rank 0, or where k (m + n) >= m n, t_i = v_i, rounded so itself; {ADD}",
        "none: what a file of L_i and R_i holds (docs/format.md, factors)",
        "not in mergekit",
        {"rank": 0, "bits": 23, "others": "keep"}, sparsify=coarsen, of_matrices=True,
    ),
    Method(
        "project",
        "U_i = the k leading eigenvectors of E[x x'], x what the module of the weight is given; "
        f"t_i = v_i - v_i U_i U_i' (of weights that lie turned v_i - U_i U_i' v_i); {ADD}",
        "the idea: null-space projection of RAIN-Merging, arXiv 2602.22538",
        "not in mergekit; the authors solve for what keeps a few tokens' queries, keys, values and "
        "gates with a ridge, head by head; here the subspace of all inputs of a module is left "
        "alone, and its attention-guided coefficients are not here",
        {"moments": "", "moments_digest": "", "rank": 0, "energy": 0.9}, of_matrices=True,
    ),
)  # fmt: skip
OPERATORS: dict[str, Method] = {method.name: method for method in METHODS}


def check_parameters(operator_name: str, given: Parameters) -> dict[str, Any]:
    """Return the parameters of one vector, defaults filled in and numbers as float.

    Raises UsageError for an unknown operator or parameter and for a value out of range.
    """
    if operator_name not in OPERATORS:
        raise UsageError(f"no operator {operator_name!r}; there are {', '.join(OPERATORS)}")
    defaults = OPERATORS[operator_name].defaults
    for name in given:
        if name not in defaults:
            takes = ", ".join(defaults) or "none"
            raise UsageError(f"{operator_name} has no parameter {name!r}; it takes {takes}")
    found = {**defaults, **given}
    if "rank" in given and "energy" in defaults and not given.get("energy"):
        found["energy"] = 0.0
    if given.get("rank") and found.get("energy"):
        raise UsageError(
            f"{operator_name}: rank {given['rank']} and energy {given['energy']}: expected one of"
            " them, the other 0"
        )
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(defaults[name], float) and number:
            found[name] = float(value)
        if type(defaults[name]) is int and number and float(value).is_integer():
            found[name] = int(value)
        if type(found[name]) is not type(defaults[name]) or not accepts(name, found):
            allowed = PARAMETERS[name][1]
            raise UsageError(f"{operator_name}: {name} = {value!r}, expected {allowed}")
    return found


def check_weights(operator_name: str, weights: Weights) -> None:
    """Raise UsageError for weights, one a vector, that an operator makes nothing of."""
    method, said = OPERATORS[operator_name], " and ".join(f"{weight:g}" for weight in weights)
    if method.count not in (None, len(weights)):
        raise UsageError(f"{operator_name} takes {method.count} vectors, found {len(weights)}")
    if method.merge is follow_arc and any(weights) and not sum(weights):
        raise UsageError(f"{operator_name}: the weights {said} add up to 0: no place on an arc")
