"""Measured sums into statements: realised gain, cosines and how far they are from chance.

Pure arithmetic on the sums that the engine brings back; reads nothing. Numbers of a layer, a module
or the whole model come from sums over its tensors, never from averaged cosines.
docs/orthogonality.md has every formula.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import copysign, isfinite, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from skillvec.analysis.angle_report import Forecast, ForecastLayer, Levels, PairLevels, Row
from skillvec.analysis.chance import NULLS, RARE, chance_of, is_related, judge, matrix_means
from skillvec.analysis.outputs import pair_outputs, vector_outputs
from skillvec.analysis.spreads import Units, Variances
from skillvec.analysis.subspaces import group_row
from skillvec.analysis.support_rows import Clusters
from skillvec.analysis.supports import support_row, support_terms
from skillvec.ops import statistics
from skillvec.ops.names import NO_LAYER, kind_of, layer_of, module_of
from skillvec.ops.statistics import Request
from skillvec.ops.strata import Strata
from skillvec.report import Rows

Sums = Mapping[str, Any]
Terms = Mapping[str, npt.NDArray[Any]]  # columns: a row for each tensor
Record = tuple[str, int, Any]  # tensor, its number of values, sums of statistics.layout
Place = tuple[str, str]  # level, and name of the row in it
Spreads = Mapping[Place, Variances]
OVERALL: Place = ("overall", "")
INSIDE, OUTSIDE = "layers", "outside"  # the parts of a model: embeddings, head, last norm outside


def realised(
    sums: Sequence[float] | npt.NDArray[np.float64], lam: float
) -> tuple[float | None, float | None]:
    """Return gain and cosine of what was written against what was asked, lam * delta.

    `sums` are |written|^2, <written, delta> and |delta|^2. The gain is the projection
    <written, lam v> / |lam v|^2: 1 where everything arrived. None where nothing was asked, or
    squares left fp64, and for the cosine where nothing was written. Sums round, the cosine of
    what is parallel is 1 all the same.
    """
    written_sq, written_dot_delta, delta_sq = (float(value) for value in sums)
    if not isfinite(written_sq * delta_sq) or not lam * delta_sq:
        return None, None
    gain = written_dot_delta / (lam * delta_sq)
    if written_sq == 0:
        return gain, None
    cosine = copysign(1.0, lam) * written_dot_delta / (sqrt(written_sq) * sqrt(delta_sq))
    return gain, max(-1.0, min(1.0, cosine))


# ------------------------------------------------------------------------------------- levels


@dataclass(frozen=True)
class Records:
    """Names, numbers of values and sums of many tensors, in columns; iterated over as `Record`s."""

    names: list[str]
    numel: npt.NDArray[np.int64]
    sums: Any  # of statistics.layout
    strata: Sequence[Mapping[int, Strata]] = ()  # of pairs that were counted so
    clusters: Mapping[int, Mapping[Place, Clusters]] = field(default_factory=dict)  # of pairs

    @classmethod
    def of(cls, records: "Sequence[Record] | Records") -> "Records":
        if isinstance(records, Records):
            return records
        names, numels, sums = zip(*records, strict=True)
        held = b"".join([record.tobytes() for record in sums])
        return cls([*names], np.array(numels, np.int64), np.frombuffer(held, sums[0].dtype))

    def __iter__(self) -> Iterator[Record]:
        return zip(self.names, self.numel.tolist(), self.sums, strict=True)

    @cached_property
    def groups(self) -> dict[str, dict[str, list[int]]]:
        """The positions of tensors by the names of parts, modules, kinds and layers."""
        return {level: self._grouped(key) for level, key in GROUPS.items()}

    def _grouped(self, key: Callable[[str], str]) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            groups.setdefault(key(name) or NO_LAYER, []).append(i)
        return groups


def part_of(name: str) -> str:
    """Return whether a tensor is in a layer or outside of all."""
    return INSIDE if layer_of(name) else OUTSIDE


GROUPS: dict[str, Callable[[str], str]] = {
    "parts": part_of, "modules": module_of, "kinds": kind_of, "layers": layer_of
}  # fmt: skip


def places_of(name: str) -> list[Place]:
    """Return the rows above that of a tensor, which its sums are added to."""
    return [OVERALL, *((level, key(name) or NO_LAYER) for level, key in GROUPS.items())]


def by_level(
    records: Records, terms: Terms, row: Callable[[Sums, list[int], Place], Row]
) -> Levels:
    """Return `row` of all tensors, of each part, module, kind and layer, and of each tensor.

    Names are in natural order; `terms` are columns of what adds up, which `row` takes the sums of
    over tensors, with their positions. Rows of tensors are made when they are looked at.
    """
    names = records.names

    def grouped(level: str) -> list[Row]:
        groups = records.groups[level]
        each = _summed(terms, list(groups.values()))
        rows = zip(groups.items(), each, strict=True)
        return [{"name": name, **row(sums, members, (level, name))}
                for (name, members), sums in rows]  # fmt: skip

    def of_tensor(i: int) -> Row:
        name, sums = names[i], {key: column[i] for key, column in terms.items()}
        said = {"name": name, "layer": layer_of(name), "kind": kind_of(name)}
        with np.errstate(over="ignore", invalid="ignore"):  # squares that leave fp64
            return said | {"module": module_of(name), **row(sums, [i], ("tensors", name))}

    every = list(range(len(names)))
    return {
        "overall": row(_summed(terms, [every])[0], every, OVERALL),
        "parts": grouped("parts"),
        "modules": grouped("modules"),
        "kinds": grouped("kinds"),
        "layers": grouped("layers"),
        "tensors": Rows(len(names), of_tensor),
    }


def _summed(terms: Terms, groups: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the sums of columns over each of some groups of their rows, added up in order."""
    owner = np.empty(sum(map(len, groups)), np.intp)
    for number, members in enumerate(groups):
        owner[members] = number
    found: list[dict[str, Any]] = [{} for _ in groups]
    for key, column in terms.items():
        if column.ndim == 1:
            sums = np.bincount(owner, column, len(groups))
        else:
            sums = np.zeros((len(groups), *column.shape[1:]))
            for at, values in zip(owner.tolist(), column, strict=True):
                sums[at] += values
        for held, value in zip(found, sums, strict=True):
            held[key] = value
    return found


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


# -------------------------------------------------------------------------------------- vectors


def vector_levels(
    records: "Sequence[Record] | Records", i: int, subspaces: Sequence[Row],
    outputs: Sequence[Row] = (),
) -> Levels:  # fmt: skip
    """Return the numbers of vector `i` at every level.

    `records` are in natural order; `subspaces` holds what is known of each tensor's spectrum,
    `outputs` of what it does to outputs, if that was asked.
    """
    records = Records.of(records)
    held = records.sums["vectors"][:, i]
    terms = {"numel": records.numel} | {key: held[key] for key in held.dtype.names}
    whole = _summed({"square": held["square"]}, [range(len(held))])[0]["square"]

    def row(sums: Sums, members: list[int], _: Place) -> Row:
        known = vector_row(sums, whole) | group_row([subspaces[n] for n in members])
        return known | vector_outputs([outputs[n] for n in members]) if outputs else known

    return by_level(records, terms, row)


def vector_row(sums: Sums, whole: float) -> Row:
    """Return norm, density and rounding of one delta; `whole` is the squared norm of all of it."""
    square, moved = max(float(sums["square"]), 0.0), float(sums["moved"])
    steps = [float(count) for count in sums["steps"]] if moved else None
    gain, cosine = realised((sums["kept_sq"], sums["kept_dot"], sums["square"]), 1.0)
    return {
        "numel": int(sums["numel"]),
        "norm": sqrt(square),
        "rms": sqrt(square / sums["numel"]) if sums["numel"] else None,
        "energy_share": _ratio(square, whole),
        "density": _ratio(sums["support"], sums["numel"]),
        "steps": steps,
        "below_half_step": sum(steps[:2]) / moved if steps else None,
        "kept_gain": gain if moved else None,
        "kept_cosine": cosine if moved else None,
        "absorbed": _ratio(sums["absorbed"], moved),
    }


# ---------------------------------------------------------------------------------------- pairs


def pair_levels(
    records: "Sequence[Record] | Records", request: Request, n: int, subspaces: Sequence[Row],
    spreads: Spreads, control: Spreads | None = None, matrices: Sequence[int] = (),
    outputs: Sequence[Row] = (),
) -> PairLevels:  # fmt: skip
    """Return the numbers of the request's pair `n` at every level, and the forecast.

    `spreads` has the variances of its inner product for each row, `control` those of its control;
    tensors at the positions `matrices` are those that count one by one.
    """
    records = Records.of(records)
    strata, clusters = [held.get(n) for held in records.strata], records.clusters.get(n, {})
    terms = pair_terms(records.numel, records.sums, request, n, strata)

    def judged(sums: Sums, place: Place) -> Row:
        other = control.get(place) if control else None
        return pair_row(sums, spreads.get(place), other, clusters.get(place))

    alone = {}
    for m in matrices:
        sums = {key: terms[key][m] for key in ("product", "groups_sq", "groups", "shared")}
        size = sqrt(terms["square_a"][m]) * sqrt(terms["square_b"][m])
        if size > 0:
            place = "tensors", records.names[m]
            p = judge(float(sums["product"]), groups_of(sums), spreads.get(place))["p"]
            alone[m] = max(-1.0, min(1.0, float(sums["product"]) / size)), p

    def row(sums: Sums, members: list[int], place: Place) -> Row:
        found = judged(sums, place)
        if place[0] != "tensors":
            found |= matrix_means([alone[m] for m in members if m in alone])
        found |= group_row([subspaces[m] for m in members])
        return found | pair_outputs([outputs[m] for m in members]) if outputs else found

    levels = by_level(records, terms, row)
    outside = [levels["tensors"][i] for i in records.groups["layers"].get(NO_LAYER, ())]
    return {**levels, "forecast": forecast(levels, outside)}


@np.errstate(all="ignore")
def pair_terms(
    numel: Any, record: Any, request: Request, n: int, strata: Sequence[Strata | None] = ()
) -> dict[str, Any]:
    """Return of a tensor what adds up over tensors; of an array of records, columns of it.

    `strata` are those of each, where they were counted.
    """
    i, j = request.pairs[n]
    numel = np.asarray(numel)
    a, b = record["vectors"][..., i], record["vectors"][..., j]
    pair = record["pairs"][..., n]
    terms: dict[str, Any] = {"numel": numel}
    terms |= {key: pair[key] for key in statistics.PAIR}
    for side, vector in (("a", a), ("b", b)):
        terms |= {f"{key}_{side}": vector[key] for key in ("square", "support")}
    squared = pair["product"] ** 2
    terms["along"] = np.where(b["square"] > 0, squared / b["square"], 0.0)
    widths = [*map(statistics.group_width, numel.ravel().tolist())]
    groups = -(-numel // np.reshape(widths, numel.shape))
    spread = pair["groups_sq"] - np.where(groups > 0, squared / groups, 0)
    few, terms["groups"] = groups < 2, groups
    terms["variance"] = np.where(few, pair["groups_sq"], groups / (groups - 1) * spread)
    by_weight = n in request.by_weight
    terms |= support_terms(numel, a["support"], b["support"], strata, by_weight)
    if request.controls:  # one for each pair
        held = record["controls"][..., n]
        one = record["vectors"][..., request.controls[n][0]]
        terms |= {f"control_{key}": held[key] for key in statistics.CONTROL}
        terms["control_square"] = one["square"]
    return terms


def pair_row(
    sums: Sums, spread: Variances | None = None, control: Variances | None = None,
    clusters: Clusters | None = None,
) -> Row:  # fmt: skip
    """Return angle, support and meeting of two deltas from their summed terms.

    Angle and z are None where a delta is zero or squares leave fp64. `control` is of another vector
    in place of a, `clusters` what structure the supports have.
    """
    squares = [max(float(sums[f"square_{side}"]), 0.0) for side in "ab"]
    norms = [sqrt(square) for square in squares]
    numel, shared = int(sums["numel"]), float(sums["shared"])
    product = float(sums["product"])
    size = _size(product, *norms)
    cosine = max(-1.0, min(1.0, product / size)) if size > 0 else None
    judged = judge(product, groups_of(sums), spread if size > 0 else None)
    deviation = judged.pop("spread")
    union = sums["support_a"] + sums["support_b"] - shared
    found = {
        "numel": numel,
        "cosine": cosine,
        "cosine_se": sqrt(max(float(sums["variance"]), 0.0)) / size if size > 0 else None,
        "cosine_sd": deviation / size if deviation is not None and size > 0 else None,
        **judged,
        "z_isotropic": None if cosine is None else cosine * sqrt(numel),
        "p_isotropic": None if cosine is None else chance_of(cosine, numel),
        "norm_a": norms[0],
        "norm_b": norms[1],
        "norm_ratio": _ratio(norms[0], norms[1]),
        "density_a": _ratio(sums["support_a"], numel),
        "density_b": _ratio(sums["support_b"], numel),
        "jaccard": _ratio(shared, union),
        **support_row(sums, clusters),
        "along": _ratio(sums["along"], squares[0]),
    }
    for side in "ab":
        found[f"on_support_{side}"] = _ratio(sums[f"met_{side}"], sums[f"square_{side}"])
        found[f"conflict_{side}"] = _ratio(sums[f"clash_{side}"], sums[f"square_{side}"])
    if "control_product" in sums:
        held = float(sums["control_product"])
        size = _size(held, sqrt(max(float(sums["control_square"]), 0.0)), norms[1])
        units = Units(float(sums["control_groups_sq"]), int(sums["groups"]))
        found["control_cosine"] = held / size if size > 0 else None
        found["control_z"] = judge(held, units, control)["z"]
    elif spread is not None and spread.control is not None:
        found["control_cosine"] = spread.control / size if size > 0 else None
        found["control_z"] = spread.control / deviation if deviation else None
    return found


def _size(product: float, one: float, other: float) -> float:
    """Return the product of two norms, 0 where there is no cosine: min(1, nan) would be 1."""
    size = one * other
    return size if isfinite(size) and isfinite(product) else 0.0


def groups_of(sums: Sums) -> Units:
    """Return the groups of neighbours, of which no more than values that both change count."""
    return Units(float(sums["groups_sq"]), int(min(sums["groups"], sums["shared"])))


def hidden_product(records: Iterable[Record], i: int) -> float:
    """Return how far rounding its base moves the inner product of delta `i` with what ends there.

    The base was saved with an error e, uniform over a step s of its grid, and training went on from
    the unrounded weights. Of an update of (k + f) s, f below 1, rounding keeps k or k + 1 steps and
    E[v e] = -s^2 f (1 - f) / 2. Sparse deltas have k = 0 and f = p, the share of changed values: a
    changed value has -s^2 (1 - p) / 2; over all f the mean is -s^2 / 12. The sum of it, positive.
    """
    total = 0.0
    for _, numel, record in records:
        vector = record["vectors"][i]
        density = vector["moved"] / numel if numel else 1.0
        total += max(1 / 12, (1 - density) / 2) * float(vector["step_sq"])
    return total


# ------------------------------------------------------------------------------------ sentences


def forecast(pair: Levels, alone: Sequence[Row]) -> Forecast:
    """Return what adding a to a model that holds b meets there, and the layers to look at.

    The layers, and tensors `alone`, which are in none, are those in which most of a's energy lies
    along b, if p is clear of chance: below .01 over the number of rows (Bonferroni).
    """
    overall = pair["overall"]
    whole = overall["norm_a"] ** 2
    rows = [row for row in [*pair["layers"], *alone] if row["name"] != NO_LAYER]
    layers: list[ForecastLayer] = [
        {"name": row["name"], "share": row["along"] * row["norm_a"] ** 2 / whole,
         "cosine": row["cosine"], "z": row["z"], "p": row["p"], "conflict": row["conflict_a"]}
        for row in rows
        if row["along"] is not None and row["p"] is not None and row["p"] * len(rows) < RARE
    ]  # fmt: skip
    layers.sort(key=lambda row: -row["share"])
    return {
        "along": overall["along"],
        "on_support": overall["on_support_a"],
        "conflict": overall["conflict_a"],
        "in_subspace": overall.get("a_in_b"),
        "layers": layers[:5],
        "sentence": say_forecast(overall, [row["name"] for row in layers[:3]]),
    }


def say_forecast(overall: Row, names: Sequence[str]) -> str:
    """Return in words what adding a to a model that holds b meets; look at the layers `names`."""
    if overall["along"] is None:
        return "A is zero or not known: nothing can be said of adding it"
    if not isfinite(overall["along"]):
        return "squares of A or B leave fp64: nothing can be said of adding A"
    words = [f"{_percent(overall['along'])} of A's energy lies along B"]
    inside, chance, conflict = (overall.get(k) for k in ("a_in_b", "in_chance", "conflict_a"))
    if inside is not None and chance is not None:
        words.append(
            f"{_percent(inside)} in B's top singular directions (chance {_percent(chance)})"
        )
    if conflict is not None:
        words.append(f"{_percent(conflict)} meets weights that B moved the other way")
    look = f"; look at {', '.join(names)}" if names else "; no layer stands out"
    return f"adding A to a model that holds B: {', '.join(words)}{look}"


def sentence(pair: Levels, rounding: float | None = None) -> str:
    """Return what the numbers of a pair mean, overall and without what is outside of layers.

    `rounding` is a cosine that rounding may give.
    """
    overall, parts = pair["overall"], {row["name"]: row for row in pair["parts"]}
    cosine, z = overall["cosine"], overall["z"]
    if cosine and z is None:
        return f"cosine {cosine:+.4f}; squares of the sums leave fp64: no null can judge it"
    if cosine is None or z is None:
        if not (overall["norm_a"] and overall["norm_b"]):
            return "one of the deltas is zero: there is no angle to judge"
        if cosine is None:
            return "squares of the deltas leave fp64: there is no cosine"
        return "no value is changed by both: the deltas are exactly orthogonal"
    said = f"{_say_cosine(overall)}: {_say_relation(overall, rounding)}"
    inside = parts.get(INSIDE)
    if len(parts) > 1 and inside and inside["z"] is not None:
        said += f"; without embeddings, head and last norm {_say_cosine(inside)}, "
        said += f"{_say_relation(inside)}"
    return said


def _say_cosine(row: Row) -> str:
    return f"cosine {row['cosine']:+.4f}, by chance \u00b1 {min(1.0, 1.96 * row['cosine_sd']):.4f}"


def _say_relation(row: Row, rounding: float | None = None) -> str:
    """Return whether the cosine of a row is chance, by the null that holds for it."""
    by = f"z {row['z']:+.1f} by {NULLS[row['null']]}"
    if not is_related(row):
        return f"no more than unrelated updates of this structure show ({by})"
    cosine = row["cosine"]
    degree = "nearly orthogonal" if abs(cosine) < 0.1 else "aligned" if cosine > 0 else "opposed"
    known = f", of which rounding may give {rounding:+.4f}," if rounding is not None else ""
    link = "but" if degree == "nearly orthogonal" else "and"
    return f"{degree}{known} {link} not by chance ({by})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
