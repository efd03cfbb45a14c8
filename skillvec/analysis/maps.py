"""Heat maps of a report, layers by module kinds: cells with numbers, their shades and words.

The page shows a map as a table, whose cells hold the number that the shade says; `figures` draws
the same cells. A cell is a layer and a kind; the experts of a layer are one cell.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, hypot, isfinite, log1p, log10, sqrt
from statistics import median
from typing import NamedTuple

from skillvec.analysis.angle_report import Row
from skillvec.analysis.colours import SHADES
from skillvec.analysis.statistics_table import Statistic, typeset, write_number
from skillvec.errors import printable
from skillvec.ops.names import NO_LAYER, natural_order

TOWERS = 8  # times the median: from there on a few cells would leave no shade for the others
SPANS = 30  # largest over smallest: from there on shades are logarithmic
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """The tensors of one layer and kind, and their numbers by key."""

    layer: str  # NO_LAYER for none
    kind: str
    rows: Sequence[Row]
    numbers: Mapping[str, float | None]

    @property
    def numel(self) -> int:
        return sum(row["numel"] for row in self.rows)


class Shade(NamedTuple):
    """A cell of a map: its shade, None where it has no value, and its number in few characters."""

    step: int | None
    text: str


class Stack(NamedTuple):
    """One stack of layers: its name, its kinds, and of each layer name, short name and cells.

    `void` are kinds that have no value in any layer, and no column.
    """

    name: str
    kinds: list[str]
    layers: list[tuple[str, str, list[Shade | None]]]
    void: list[str]


class HeatMap(NamedTuple):
    """A map as tables: `unit` says what its texts count in, `legend` has a word for some shades.

    `outside` are kinds outside of all layers.
    """

    name: str
    number: Statistic
    unit: str
    ramp: str
    stacks: list[Stack]
    outside: list[tuple[str, Shade]]
    legend: list[tuple[int, str]]


# ------------------------------------------------------------------------------------------ cells


def list_pair_cells(tensors: Sequence[Row]) -> list[Cell]:
    """Return the cells of a pair with cosine, z and both norms."""
    found = []
    for (layer, kind), rows in _gather(tensors).items():
        a, b = _join(rows, "norm_a"), _join(rows, "norm_b")
        angles = [row for row in rows if row.get("cosine") is not None] if a and b else []
        # shares of the cell's own norms: products of norms may leave fp64
        shares = [(row["norm_a"] / a) * (row["norm_b"] / b) for row in angles if a and b]
        both = list(zip(angles, shares, strict=True))
        cosine = sum(row["cosine"] * share for row, share in both)
        spread = hypot(*((row["cosine_sd"] or 0.0) * share for row, share in both))
        numbers = {"cosine": cosine if angles else None, "z": cosine / spread if spread else None,
                   "norm_a": a, "norm_b": b}  # fmt: skip
        found.append(Cell(layer, kind, rows, numbers))
    return found


def list_vector_cells(tensors: Sequence[Row]) -> list[Cell]:
    """Return the cells of a vector with norm, root mean square and density."""
    found = []
    for (layer, kind), rows in _gather(tensors).items():
        numel, norm = sum(row["numel"] for row in rows), _join(rows, "norm")
        dense = [row["density"] * row["numel"] for row in rows if row.get("density") is not None]
        numbers = {
            "norm": norm, "rms": norm / sqrt(numel) if numel and norm is not None else None,
            "density": sum(dense) / numel if numel and len(dense) == len(rows) else None,
        }  # fmt: skip
        found.append(Cell(layer, kind, rows, numbers))
    return found


def _gather(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return tensor rows by (layer, kind): more than one where a layer has experts."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: natural_order(row["name"])):
        kind = printable(row["kind"]).removesuffix(".weight")
        cells.setdefault((printable(row["layer"]) or NO_LAYER, kind), []).append(row)
    return cells


def _join(rows: Sequence[Row], key: str) -> float | None:
    """Return the norm of several tensors together; None where one of theirs leaves fp64."""
    norms = [row.get(key) for row in rows]
    joined = hypot(*(norm for norm in norms if norm is not None))
    return joined if None not in norms and isfinite(joined) else None


def name_layers(layers: Iterable[str]) -> dict[str, str]:
    """Return layers in their order with short names: numbers where there is one stack."""
    ordered = sorted(set(layers), key=lambda layer: (layer == NO_LAYER, natural_order(layer)))
    stacks = {layer.rpartition(".")[0] for layer in ordered if layer != NO_LAYER}
    return {layer: layer if layer == NO_LAYER or len(stacks) > 1 else layer.rpartition(".")[2]
            for layer in ordered}  # fmt: skip


# ----------------------------------------------------------------------------------------- tables


def make_map(name: str, number: Statistic, ramp: str, cells: Sequence[Cell]) -> HeatMap:
    """Return the map of a number of cells."""
    known = [value for cell in cells if (value := cell.numbers[number.key]) is not None]
    shade_of, legend = (_diverging if ramp == "diverging" else _rising)(known, number)
    write, unit = _writer(known, number)

    def shade(cell: Cell) -> Shade:
        value = cell.numbers[number.key]
        return Shade(None, "–") if value is None else Shade(shade_of(value), write(value))

    stacks: dict[str, dict[str, dict[str, Shade]]] = {}
    for layer in name_layers(cell.layer for cell in cells):
        if layer != NO_LAYER:
            held = {cell.kind: shade(cell) for cell in cells if cell.layer == layer}
            stacks.setdefault(layer.rpartition(".")[0], {})[layer] = held
    made = []
    for stack, layers in stacks.items():
        every = list(dict.fromkeys(kind for held in layers.values() for kind in held))
        full = {kind for held in layers.values() for kind, one in held.items()
                if one.step is not None}  # fmt: skip
        kinds = [kind for kind in every if kind in full]
        rows = [(layer, layer.rpartition(".")[2], [held.get(kind) for kind in kinds])
                for layer, held in layers.items()]  # fmt: skip
        void = [kind for kind in every if kind not in full]
        made.append(Stack(stack, kinds, rows, void))
    outside = [(cell.kind, shade(cell)) for cell in cells if cell.layer == NO_LAYER]
    return HeatMap(name, number, unit, ramp, made, outside, legend)


Shading = tuple[Callable[[float], int], list[tuple[int, str]]]


def _diverging(values: Sequence[float], number: Statistic) -> Shading:
    """Return what shades values around 0, and its legend: by log(1 + size) where a few tower."""
    middle = SHADES["diverging"] // 2
    sizes = [abs(value) for value in values if value]
    top, usual = max(sizes, default=1.0), median(sizes or [1.0])
    rate = 1 / usual if top > TOWERS * usual else 0.0
    whole = log1p(rate * top) if rate else top

    def shade(value: float) -> int:
        size = log1p(rate * abs(value)) if rate else abs(value)
        return middle + round(middle * size / whole) * (-1 if value < 0 else 1)

    return shade, [(0, _write(-top, number)), (middle, "0"), (2 * middle, _write(top, number))]


def _rising(values: Sequence[float], number: Statistic) -> Shading:
    """Return what shades values from 0 on, and its legend: logarithmic where they span much."""
    last = SHADES["heatmap"] - 1
    sizes = [value for value in values if value > 0]
    low, top = min(sizes, default=0.0), max(sizes, default=1.0)
    is_log = top > SPANS * low > 0

    def shade(value: float) -> int:
        if not is_log:
            return round(last * value / top)
        return 0 if value < low else round(last * log10(value / low) / log10(top / low))

    return shade, [(0, _write(low if is_log else 0, number)), (last, _write(top, number))]


def _write(value: float, number: Statistic) -> str:
    """Return a number as a legend has it."""
    form = number.form if number.form == "%" else ".2g" if abs(value) < 1000 else ".3g"
    return typeset("0" if value == 0 else write_number(value, form))


def _writer(values: Sequence[float], number: Statistic) -> tuple[Callable[[float], str], str]:
    """Return what writes values in few characters, and the unit of that: "" for 1.

    One digit of a usual value and two of the largest at least, four at most.
    """
    sizes = [abs(value) for value in values if value and isfinite(value)]
    if not sizes:
        return lambda value: typeset(f"{value:.0f}"), ""
    usual, largest = -floor(log10(median(sizes))), 1 - floor(log10(max(sizes)))
    power = 0 if number.key == "z" else max(0, usual, largest)
    if power == 1:
        power = 2  # hundredths are a word that people have
    power = min(power, floor(log10(9999 / max(sizes))))
    unit = {0: "", 2: "hundredths", 3: "thousandths", 6: "millionths"}.get(
        power, f"10{str(-power).translate(SUPERSCRIPTS)}"
    )
    if number.form == "%" and power == 2:
        unit = "percent"

    def write(value: float) -> str:
        said = f"{value * 10.0**power:.0f}"
        return typeset("0" if said == "-0" else said)

    return write, unit
