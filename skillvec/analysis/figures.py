"""The figures of a report: Vega-Lite specs, which `page.figures` makes files of.

The page has the charts among them; of the maps it has tables, made of the same cells. Hides layout
and scales.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import ceil, exp, pi, sqrt
from statistics import median
from typing import Any, NamedTuple

from skillvec.analysis.angle_report import AngleReport, PairEntry, Row, VectorEntry
from skillvec.analysis.maps import Cell, list_pair_cells, list_vector_cells, name_layers
from skillvec.analysis.statistics_table import (
    PAIRS,
    VECTORS,
    Statistic,
    pick,
    select_shown,
)
from skillvec.errors import printable
from skillvec.ops.names import NO_LAYER

Spec = dict[str, Any]
Scale = Callable[[Sequence[float]], Spec]  # values -> colour scale and legend

PAIR_LINES = (  # along the layers: name, title, keys, note
    ("overlap", "subspace overlap", ("overlap_left", "overlap_right", "overlap_chance"),
     "Mean squared cosine of the principal angles between the top K subspaces."),
    ("inside", "energy inside the other", ("a_in_b", "b_in_a", "in_chance"),
     "Share of one delta's energy inside the top K subspaces of the other."),
)  # fmt: skip


class Figure(NamedTuple):
    """One chart: a safe file name without suffix, its Vega-Lite spec and a line of explanation."""

    name: str
    spec: Spec
    note: str


def _caption(number: Statistic) -> str:
    return f"{number.meaning[:1].upper()}{number.meaning[1:]}."


def is_map(figure: Figure) -> bool:
    """Return whether a figure is a heat map of layers and modules."""
    return figure.spec.get("name") == "cells"


def draw_figures(report: AngleReport) -> Iterator[Figure]:
    """Yield every figure: maps of the pairs, maps of the vectors, then distributions and lines."""
    norms, names = report["norms"], _shortened([entry["label"] for entry in report["norms"]])
    short = {entry["label"]: name for entry, name in zip(norms, names, strict=True)}
    pairs = []
    for i, pair in enumerate(report["pairs"], 1):
        sides = (("A", pair["a"], pair["lineage_a"]), ("B", pair["b"], pair["lineage_b"]))
        head = [f"{side} = {short.get(label) or shorten(label)}, {lineage}"
                for side, label, lineage in sides]  # fmt: skip
        pairs.append((i, pair, head))
    for i, pair, head in pairs:
        yield from _pair_maps(i, pair, head)
    for i, (entry, name) in enumerate(zip(norms, names, strict=True), 1):
        yield from _vector_maps(i, entry, [f"{name}, {entry['lineage']}"])
    for i, pair, head in pairs:
        yield from _z_histogram(f"histogram-{i}", pair, head)
    yield from _steps(report["step_edges"], norms, names)
    dtypes = [f"{name}: {entry['lineage']}" for entry, name in zip(norms, names, strict=True)]
    for number in select_shown(VECTORS, "lines"):
        series = {name: (entry["layers"], number.key)
                  for entry, name in zip(norms, names, strict=True)}  # fmt: skip
        name = f"{number.key.replace('_', '-')}-layers"
        yield from _lines(name, number.title, number.form, dtypes, series, _caption(number))
    for i, pair, head in pairs:
        for name, title, keys, note in PAIR_LINES:
            numbers = pick(PAIRS, *keys)
            series = {n.title: (pair["layers"], n.key) for n in numbers}
            yield from _lines(f"{name}-{i}", title, numbers[0].form, head, series, note)


def shorten(label: str, limit: int = 36) -> str:
    """Return a label on one line, long ones without their beginning."""
    label = printable(label).replace("\n", " ")
    return label if len(label) <= limit else f"…{label[1 - limit :]}"


def _shortened(labels: Sequence[str]) -> list[str]:
    """Return labels that fit a legend, all different."""
    names = [shorten(label) for label in labels]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _pair_maps(i: int, pair: PairEntry, head: list[str]) -> Iterator[Figure]:
    cells = list_pair_cells(pair["tensors"])
    notes = (
        "Red: same direction, blue: opposite. Small tensors reach larger cosines by chance.",
        "The cosine over its spread by the null that holds: comparable between tensors.",
    )
    for number, note in zip(pick(PAIRS, "cosine", "z"), notes, strict=True):
        yield from _map(f"{number.key}-{i}", number, head, cells, _diverging, note)


def _vector_maps(i: int, entry: VectorEntry, head: list[str]) -> Iterator[Figure]:
    cells = list_vector_cells(entry["tensors"])
    for number in pick(VECTORS, "rms", "density"):
        yield from _map(f"{number.key}-{i}", number, head, cells, _sequential, _caption(number))


def _diverging(values: Sequence[float]) -> Spec:
    """Return scale and legend of colours centred at 0: symlog where a few cells tower."""
    sizes = sorted(abs(value) for value in values if value)
    top = sizes[-1] if sizes else 1.0
    scale: Spec = {"domain": [-top, top], "domainMid": 0, "range": "diverging"}
    if not sizes or top <= 8 * median(sizes):
        return {"scale": scale, "legend": {"tickCount": 4}}
    powers = _powers(median(sizes), top)[-3:]
    ticks = [-power for power in reversed(powers)] + [0, *powers]
    scale |= {"type": "symlog", "constant": median(sizes)}
    return {"scale": scale, "legend": {"values": ticks}}


def _sequential(values: Sequence[float]) -> Spec:
    """Return scale and legend of colours from 0, logarithmic where values span over 30 times."""
    sizes = [value for value in values if value > 0]
    if sizes and max(sizes) > 30 * min(sizes):
        scale: Spec = {"type": "log", "domain": [min(sizes), max(sizes)]}
    else:
        scale = {"domain": [0, max(sizes, default=1.0)]}
    return {"scale": scale | {"range": "heatmap"}, "legend": {"tickCount": 3}}


def _labels(number_form: str, values: Sequence[float]) -> Spec:
    """Return how the numbers of an axis or a legend are written."""
    form = ".2~g" if max(map(abs, values), default=1.0) >= 1e-3 else ".2~e"
    if number_form == "%":
        form = ".2~p"
    return {"labelExpr": f"datum.value === 0 ? '0' : format(datum.value, '{form}')"}


def _powers(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(-30, 30) if low <= 10.0**power <= high]


def _of(field: str, kind: str = "nominal", **more: Any) -> Spec:
    return {"field": field, "type": kind, **more}


def _map(
    name: str, number: Statistic, head: list[str], cells: list[Cell], colours: Scale, note: str
) -> Iterator[Figure]:
    """Yield a heat map, layers down and module kinds across: one rectangle for each cell."""
    if not cells:
        return
    known = [value for cell in cells if (value := cell.numbers[number.key]) is not None]
    look = colours(known)
    names = name_layers(cell.layer for cell in cells)
    inside = [cell.kind for cell in cells if cell.layer != NO_LAYER]
    kinds = list(dict.fromkeys(inside + [cell.kind for cell in cells]))
    values = [{"layer": names[cell.layer], "kind": cell.kind, "value": cell.numbers[number.key]}
              for cell in cells]  # fmt: skip
    empty = "!isValid(datum.value)"
    if look["scale"].get("type") == "log":
        empty += " || datum.value <= 0"
    spec = {
        "name": "cells",
        "title": {"text": number.title, "subtitle": head},
        "width": {"step": 27},
        "height": {"step": 20 if len(names) <= 12 else 14 if len(names) <= 48 else 10},
        "data": {"values": values},
        "mark": {"type": "rect", "invalid": "show", "strokeDash": [2, 2]},
        "encoding": {
            "x": _of("kind", sort=kinds, title=None),
            "y": _of("layer", sort=list(names.values()), title=None),
            "color": {
                "condition": {"test": empty, "value": "transparent"},
                **_of("value", "quantitative", scale=look["scale"] | {"interpolate": "rgb"}),
                "legend": {"title": None, **_labels(number.form, known), **look["legend"]},
            },
            "stroke": {"condition": {"test": empty, "value": "#888"}, "value": None},
        },
    }
    yield Figure(name, spec, note)


def _z_histogram(name: str, pair: PairEntry, head: list[str]) -> Iterator[Figure]:
    """Yield the histogram of the tensors' z, with the control's and what chance gives."""
    zs = [row["z"] for row in pair["tensors"] if row.get("z") is not None]
    control = [row["control_z"] for row in pair["tensors"] if row.get("control_z") is not None]
    if not zs:
        return
    # Past 8 the normal curve has nothing left to show: what lies beyond is counted at the edge.
    edge = min(8, max(4, ceil(max(abs(z) for z in zs + control))))

    def counted(values: list[float]) -> list[Row]:
        counts = Counter(max(0, min(4 * edge - 1, int((z + edge) * 2))) for z in values)
        return [{"z": i / 2 - edge, "to": (i + 1) / 2 - edge, "tensors": counts[i]}
                for i in range(4 * edge + 1)]  # fmt: skip

    curve = [{"z": z, "tensors": len(zs) / 2 * exp(-z * z / 2) / sqrt(2 * pi)}
             for z in (i / 8 - edge for i in range(16 * edge + 1))]  # fmt: skip
    series = ["this pair", *(["control"] if control else []), "chance"]
    x, y = _of("z", "quantitative", title="z"), _of("tensors", "quantitative", title="tensors")

    def layer(mark: Spec, values: list[Row], label: str, **more: Spec) -> Spec:
        colour = {"datum": label, "type": "nominal", "scale": {"domain": series}, "title": None}
        return {"data": {"values": values}, "mark": mark,
                "encoding": {"x": x, "y": y, "color": colour, **more}}  # fmt: skip

    layers = [
        layer({"type": "bar", "binSpacing": 1, "opacity": 0.75},
              counted(zs)[:-1], "this pair", x=x | {"bin": "binned"}, x2={"field": "to"}),
        layer({"type": "line", "interpolate": "step-after"}, counted(control), "control"),
        layer({"type": "line"}, curve, "chance"),
    ]  # fmt: skip
    note = "z of every tensor by the null that holds; the curve is what chance gives."
    if beyond := sum(abs(z) > edge for z in zs):
        note += f" {beyond} of {len(zs)} lie beyond ±{edge} and are counted in the outermost bars."
    yield Figure(name, {"title": {"text": "z of the tensors", "subtitle": head},
                        "layer": layers if control else [layers[0], layers[2]]}, note)  # fmt: skip


def _steps(
    edges: Sequence[float], norms: Sequence[VectorEntry], names: Sequence[str]
) -> Iterator[Figure]:
    """Yield the histogram of |delta| in steps of the 16-bit grid, of vectors that have it."""
    bins = [f"{low:g}–{high:g}" for low, high in pairwise(edges)]
    bins = [f"< {edges[0]:g}", *bins, f"≥ {edges[-1]:g}"] if edges else []
    values, head = [], []
    for entry, name in zip(norms, names, strict=True):
        counts = entry["overall"].get("steps") or []
        if total := sum(counts):
            head.append(f"{name}: {entry['lineage']}")
            values += [{"vector": name, "steps": label, "share": count / total}
                       for label, count in zip(bins, counts, strict=True)]  # fmt: skip
    if not values:
        return
    spec = {
        "title": {"text": "size of the changes, in steps of the 16-bit grid", "subtitle": head},
        "data": {"values": values},
        "mark": "bar",
        "encoding": {
            "x": _of("steps", sort=bins, title="|delta| / step"),
            "xOffset": _of("vector", sort=list(names)),
            "y": _of("share", "quantitative", title="share of changed values",
                     axis={"format": ".2~p"}),
            "color": _of("vector", sort=list(names), title=None),
        },
    }  # fmt: skip
    yield Figure("steps", spec, "Changes under half a step vanish where a sum is rounded.")


def _lines(
    name: str,
    title: str,
    form: str,
    head: list[str],
    series: dict[str, tuple[list[Row], str]],
    note: str,
) -> Iterator[Figure]:
    """Yield one number along the layers, a line for each series; nothing for fewer than two."""
    rows = [
        {"series": label, "layer": printable(row["name"]), "value": row[key]}
        for label, (levels, key) in series.items()
        for row in levels
        if row["name"] not in ("", NO_LAYER) and row.get(key) is not None
    ]
    names = name_layers(row["layer"] for row in rows)
    sizes = [row["value"] for row in rows if row["value"] > 0]
    if len(names) < 2:
        return
    tall = bool(sizes) and max(sizes) > 30 * min(sizes)
    rows = [row | {"layer": names[row["layer"]]} for row in rows if row["value"] > 0 or not tall]
    shown = [label for label in series if any(row["series"] == label for row in rows)]
    ticks = {"values": _powers(min(sizes) / 2, 2 * max(sizes))} if tall else {"tickCount": 5}
    spec = {
        "title": {"text": title, "subtitle": head},
        "data": {"values": rows},
        "mark": {"type": "line", "point": {"size": 16}},
        "encoding": {
            "x": _of("layer", "ordinal", sort=list(names.values()), title="layer",
                     axis={"labelOverlap": True, "labelAngle": 0}),
            "y": _of("value", "quantitative", title=None, scale={"type": "log"} if tall else {},
                     axis=_labels(form, sizes) | ticks),
            "color": _of("series", sort=shown, title=None),
        },
    }  # fmt: skip
    yield Figure(name, spec, note)
