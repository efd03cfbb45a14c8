"""A report as one HTML page, and its figures as files.

Hides Vega-Lite, the page's template and its escaping. Every figure is one Vega-Lite spec, which the
page draws in the browser and `figures` draws into SVG and PNG: both show the same. The page loads
nothing from anywhere, and its own policy forbids it. Labels and tensor names come from files that
strangers wrote: they reach the page as escaped text or as JSON without "<", never as markup.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from math import ceil, exp, isfinite, pi, sqrt
from statistics import median
from typing import Any, NamedTuple

from skillvec.errors import UsageError, printable
from skillvec.names import NO_LAYER, natural_order

Row = dict[str, Any]
Spec = dict[str, Any]

# Numbers as key, title, form; the first of a pair's stand in the table of all pairs.
PAIR_NUMBERS = (
    ("cosine", "cosine ± 1.96 se", "+.3g"), ("z", "z", "+.3g"),
    ("z_groups", "z over groups", "+.3g"), ("p", "p", ".2g"),
    ("control_cosine", "control cosine", "+.3g"),
    ("control_z_groups", "control z over groups", "+.3g"),
    ("norm_ratio", "|A| / |B|", ".3g"), ("jaccard", "Jaccard", ".3g"),
    ("lift", "lift", ".3g"), ("sign_agreement", "sign agreement", "%"),
    ("p_flips", "p, sign flips", ".2g"), ("control_z", "control z", "+.3g"),
    ("density_a", "density A", "%"), ("density_b", "density B", "%"),
    ("overlap_left", "overlap left", ".3g"), ("overlap_right", "overlap right", ".3g"),
    ("overlap_chance", "overlap by chance", ".3g"), ("a_in_b", "A in B", "%"),
    ("b_in_a", "B in A", "%"), ("in_chance", "inside by chance", "%"),
    ("interference", "interference", ".3g"), ("sar_a", "alignment A", ".3g"),
    ("sar_b", "alignment B", ".3g"),
)  # fmt: skip
GLANCE = 10
LEAST_NBYTES = 800_000  # of a page: the drawing library that it carries
VECTOR_NUMBERS = (
    ("numel", "values", ",d"), ("norm", "norm", ".4g"), ("rms", "rms", ".3g"),
    ("density", "density", "%"), ("below_half_step", "below ½ step", "%"),
    ("absorbed", "absorbed", "%"), ("kept_gain", "kept gain", ".3f"),
    ("kept_cosine", "kept cosine", ".3f"), ("stable_rank", "stable rank", ".3g"),
    ("effective_rank", "effective rank", ".3g"), ("top_energy", "top energy", "%"),
    ("energy_in_w", "energy in W", "%"),
)  # fmt: skip
FORECAST_NUMBERS = (
    ("along", "along B", "%"), ("on_support", "on B's support", "%"), ("conflict", "conflict", "%"),
    ("in_subspace", "in B's subspace", "%"),
)  # fmt: skip
FORECAST_LAYERS = (
    ("share", "share", "%"), ("cosine", "cosine", "+.3g"), ("z_groups", "z over groups", "+.3g"),
    ("conflict", "conflict", "%"),
)  # fmt: skip
# Along the layers: key, title, note of a vector; name, title, keys, note of a pair.
VECTOR_LINES = (
    ("rms", "norm per value (rms)", "Root mean square of the delta in each layer."),
    ("density", "density", "Share of values that changed in each layer."),
    ("top_energy", "energy in the top directions",
     "Share of |v|² in the top K singular directions."),
    ("energy_in_w", "energy inside W", "Share of |v|² inside the top K singular subspaces of W."),
)  # fmt: skip
PAIR_LINES = (
    ("overlap", "subspace overlap", ("overlap_left", "overlap_right", "overlap_chance"),
     "Mean squared cosine of the principal angles between the top K subspaces."),
    ("inside", "energy inside the other", ("a_in_b", "b_in_a", "in_chance"),
     "Share of one delta's energy inside the top K subspaces of the other."),
)  # fmt: skip
Numbers = Sequence[tuple[str, str, str]]
Scale = Callable[[Sequence[float]], Spec]  # values -> colour scale and legend


class Figure(NamedTuple):
    """One chart: a safe file name without suffix, its Vega-Lite spec and a line of explanation."""

    name: str
    spec: Spec
    note: str


def check_available() -> None:
    """Raise UsageError where the plotting package is missing."""
    if find_spec("vl_convert") is None:
        raise UsageError("the page needs vl-convert-python: pip install 'skillvec[report]'")


def html(report: Row) -> str:
    """Return the page for the dict of an orthogonality or norms report.

    Self-contained, about 1 MB plus the rows; opens from disk. Raises UsageError without vl_convert.
    """
    check_available()
    import vl_convert

    drawn = list(_drawn(report))
    embedded = {key: value for key, value in report.items() if key != "tensors"}
    schemes = {name: _config(name == "dark", "system-ui, sans-serif") for name in ("light", "dark")}
    parts = {
        "title": _text(_title(report)),
        "inputs": _inputs(report),
        "answer": _answer(report),
        "maps": "".join(_slot(figure) for figure in drawn if _is_map(figure)),
        "charts": "".join(_slot(figure) for figure in drawn if not _is_map(figure)),
        "report": _json(embedded),
        "figures": _json({"specs": {f.name: f.spec for f in drawn}, "config": schemes}),
        # Ready-made without a snippet (the stub asks for one), bundled anew for seconds with it.
        "vega": vl_convert.javascript_bundle(),  # type: ignore[call-arg]
    }
    template = files("skillvec").joinpath("page.html").read_text(encoding="utf-8")
    # One pass, so that a label that looks like a slot stays a label.
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], template)


def figures(report: Row) -> Iterator[tuple[str, bytes]]:
    """Yield file name and bytes of every figure of the page, as SVG and as PNG at 2.5 times scale.

    White background. Raises UsageError without vl_convert.
    """
    check_available()
    import vl_convert

    config = _config(False, "Helvetica, Arial, sans-serif")
    for name, spec, _ in _drawn(report):
        svg = vl_convert.vegalite_to_svg(_rounded(spec), config=config, allowed_base_urls=[])
        yield f"{name}.svg", svg.encode()
        yield f"{name}.png", vl_convert.svg_to_png(svg, scale=2.5)


# ---------------------------------------------------------------------------------- text


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _json(value: Any) -> str:
    text = json.dumps(_rounded(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _rounded(value: Any) -> Any:
    """Return plain data with floats at six digits, and null where JSON has no number."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else None
    return value


def _number(value: float | None, form: str) -> str:
    """Return a number as a person reads it; the form "%" is a share at three digits."""
    if value is None or not isfinite(value):
        return "–"
    if form == "%":
        return f"{100 * value:.3g} %"
    return format(int(value) if form.endswith("d") else value, form).replace("-", "−")


def _said(row: Row, numbers: Numbers) -> list[str]:
    """Return the numbers of a row as a person reads them."""
    said = [_number(row.get(key), form) for key, _, form in numbers]
    for i, (key, _, _) in enumerate(numbers):
        if key == "cosine" and None not in (row.get(key), row.get("cosine_se")):
            said[i] += f" ± {_number(1.96 * row['cosine_se'], '.2g')}"
        elif key == "p" and row.get(key) == 0:
            said[i] = "< 1e−300"
    return said


def _present(rows: Sequence[Row], numbers: Numbers) -> Numbers:
    """Return the numbers that at least one of the rows has."""
    return [number for number in numbers if any(row.get(number[0]) is not None for row in rows)]


def _titles(numbers: Numbers) -> list[str]:
    return [title for _, title, _ in numbers]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """Return a table whose first `words` columns are text and whose others are numbers."""

    def line(tag: str, row: Sequence[str]) -> str:
        cells = ""
        for i, cell in enumerate(row):
            kind = "" if i >= words else "word long" if len(cell) > 24 else "word"
            cells += f'<{tag} class="{kind}">{_text(cell)}</{tag}>'
        return f"<tr>{cells}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{line("th", heads)}{body}</table></div>'


def _list(name: str, titles: Iterable[str], values: Iterable[object]) -> str:
    """Return titles with their values as a definition list."""
    cells = (f"<div><dt>{_text(title)}</dt><dd>{_text(value)}</dd></div>"
             for title, value in zip(titles, values, strict=True))  # fmt: skip
    return f'<dl class="{name}">{"".join(cells)}</dl>'


def _title(report: Row) -> str:
    what = "Norms" if report["verb"] == "norms" else "Orthogonality"
    count = len(report["vectors"])
    return f"{what} of {count} skill vector{'' if count == 1 else 's'}"


def _inputs(report: Row) -> str:
    """Return the warnings, the vectors with their own numbers, and what was asked."""
    overall = [entry["overall"] for entry in report["norms"]]
    known = _present(overall, VECTOR_NUMBERS)
    warnings = "".join(f"<li>{_text(line)}</li>" for line in report["warnings"])
    vectors = zip(report["vectors"], report["lineage"], overall, strict=True)
    rows = [[label, lineage, *_said(numbers, known)] for label, lineage, numbers in vectors]
    asked = {"weights W": report.get("against") or "none given"}
    if report["verb"] != "norms":
        asked |= {key.replace("_", " "): str(report.get(key) or "none")
                  for key in ("control", "sign_flips")}  # fmt: skip
        asked["seed"] = str(report.get("seed"))
    asked["subspace"] = _subspace(report.get("subspace"))
    asked["tensors"] = ", ".join(f"{n} {status}" for status, n in report["counts"].items())
    return (
        (f'<ul class="warnings" role="note">{warnings}</ul>' if warnings else "")
        + _table(["vector", "dtypes", *_titles(known)], rows, 2)
        + _list("facts", asked, asked.values())
    )


def _subspace(asked: Row | None) -> str:
    if not asked:
        return "none"
    kinds = [key for key in ("exact", "randomised", "left_out") if asked.get(key)]
    counts = ", ".join(f"{asked[key]} {key.replace('_', ' ')}" for key in kinds)
    return (
        f"top {asked['k']} directions, on {asked.get('device')}; matrices: {counts or 'none'};"
        f" worst error {_number(asked.get('error'), '.2g')}"
    )


def _dtypes(pair: Row) -> str:
    return f"A: {pair['lineage_a']}, B: {pair['lineage_b']}"


def _answer(report: Row) -> str:
    """Return the table of all pairs where there are several, then each pair in words."""
    pairs = report["pairs"]
    rows = [pair["overall"] for pair in pairs]
    table, known = _present(rows, PAIR_NUMBERS[:GLANCE]), _present(rows, PAIR_NUMBERS)
    lines = [
        [*(f"{pair[side]}\n{pair[f'lineage_{side}']}" for side in "ab"), *_said(row, table)]
        for pair, row in zip(pairs, rows, strict=True)
    ]
    text = "<h2>Answer</h2>" if pairs else ""
    if len(pairs) > 1:
        text += _table(["A, dtypes", "B, dtypes", *_titles(table)], lines, 2)
    return text + "".join(_card(pair, known) for pair in pairs)


def _card(pair: Row, known: Numbers) -> str:
    """Return a pair: what it means in words, its dtypes, its numbers, and the forecast."""
    forecast = pair.get("forecast") or {}
    said = [line for line in (pair.get("sentence"), forecast.get("sentence")) if line]
    control = f" Control in place of A: {pair['control']}." if pair.get("control") else ""
    text = (
        f"<article><h3><i>A</i> {_text(pair['a'])} <i>and B</i> {_text(pair['b'])}</h3>"
        + "".join(f"<p>{_text(line[:1].upper() + line[1:])}</p>" for line in said)
        + f'<p class="lineage">Dtypes of tuned − base: {_text(_dtypes(pair) + "." + control)}</p>'
        + _list("numbers", _titles(known), _said(pair["overall"], known))
    )
    if forecast:
        numbers = _present([forecast], FORECAST_NUMBERS)
        layers = [[row["name"], *_said(row, FORECAST_LAYERS)] for row in forecast["layers"]]
        text += (
            "<details><summary>If A were added to a model that holds B</summary>"
            + _list("numbers", _titles(numbers), _said(forecast, numbers))
            + (_table(["layer", *_titles(FORECAST_LAYERS)], layers, 1) if layers else "")
            + "</details>"
        )
    return text + "</article>"


def _is_map(figure: Figure) -> bool:
    return figure.spec.get("name") == "cells"


def _slot(figure: Figure) -> str:
    return (
        f'<figure><div class="chart" data-figure="{figure.name}"></div>'
        f"<figcaption>{_text(figure.note)}</figcaption></figure>"
    )


# ------------------------------------------------------------------------------- figures


def _drawn(report: Row) -> Iterator[Figure]:
    """Yield every figure: maps of the pairs, maps of the vectors, then distributions and lines."""
    norms, names = report["norms"], _shortened([entry["label"] for entry in report["norms"]])
    short = {entry["label"]: name for entry, name in zip(norms, names, strict=True)}
    pairs = []
    for i, pair in enumerate(report["pairs"], 1):
        sides = {side: short.get(pair[side]) or _short(pair[side]) for side in "ab"}
        head = [
            f"{side.upper()} = {name}, {pair[f'lineage_{side}']}" for side, name in sides.items()
        ]
        pairs.append((i, pair, head))
    for i, pair, head in pairs:
        yield from _pair_maps(i, pair, head)
    for i, (entry, name) in enumerate(zip(norms, names, strict=True), 1):
        yield from _vector_maps(i, entry, [f"{name}, {entry['lineage']}"])
    for i, pair, head in pairs:
        yield from _z_histogram(f"histogram-{i}", pair, head)
    yield from _steps(report.get("step_edges") or [], norms, names)
    lineage = [f"{name}: {entry['lineage']}" for entry, name in zip(norms, names, strict=True)]
    for key, title, note in VECTOR_LINES:
        series = {name: (entry["layers"], key) for entry, name in zip(norms, names, strict=True)}
        yield from _lines(f"{key.replace('_', '-')}-layers", title, lineage, series, note)
    for i, pair, head in pairs:
        for name, title, keys, note in PAIR_LINES:
            series = {title: (pair["layers"], key) for key, title, _ in PAIR_NUMBERS if key in keys}
            yield from _lines(f"{name}-{i}", title, head, series, note)


def _short(label: str, limit: int = 36) -> str:
    label = printable(label).replace("\n", " ")
    return label if len(label) <= limit else f"…{label[1 - limit :]}"


def _shortened(labels: Sequence[str]) -> list[str]:
    """Return labels that fit a legend, all different."""
    names = [_short(label) for label in labels]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _cells(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return tensor rows by (layer, kind): more than one where a layer has experts."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: natural_order(row["name"])):
        kind = printable(row["kind"]).removesuffix(".weight")
        cells.setdefault((printable(row["layer"]) or NO_LAYER, kind), []).append(row)
    return cells


def _root(rows: Sequence[Row], key: str) -> float:
    return sqrt(sum((row.get(key) or 0.0) ** 2 for row in rows))


def _pair_maps(i: int, pair: Row, head: list[str]) -> Iterator[Figure]:
    maps: dict[str, list[Row]] = {"cosine": [], "z": []}
    for place, rows in _cells(pair["tensors"]).items():
        numel = sum(row["numel"] for row in rows)
        a, b = _root(rows, "norm_a"), _root(rows, "norm_b")
        angles = [row for row in rows if row.get("cosine") is not None]
        dot = sum(row["cosine"] * row["norm_a"] * row["norm_b"] for row in angles)
        cosine = dot / (a * b) if angles and a * b > 0 else None
        found = {"cosine": cosine, "z": None if cosine is None else cosine * sqrt(numel)}
        tip = {key: _number(value, "+.3g") for key, value in found.items()}
        tip |= {"norm A": _number(a, ".3g"), "norm B": _number(b, ".3g"), "dtypes": _dtypes(pair)}
        for key, cells in maps.items():
            cells.append(_cell(place, rows, found[key], tip))
    notes = (
        "Red: same direction, blue: opposite. Small tensors reach larger cosines by chance.",
        "The cosine over its spread for unrelated directions: comparable between tensors.",
    )
    for (key, cells), note in zip(maps.items(), notes, strict=True):
        yield from _map(f"{key}-{i}", key, head, cells, _diverging, note)


def _vector_maps(i: int, entry: Row, head: list[str]) -> Iterator[Figure]:
    maps: dict[str, list[Row]] = {"rms": [], "density": []}
    for place, rows in _cells(entry["tensors"]).items():
        numel, norm = sum(row["numel"] for row in rows), _root(rows, "norm")
        dense = [row["density"] * row["numel"] for row in rows if row.get("density") is not None]
        found = {
            "rms": norm / sqrt(numel) if numel else None,
            "density": sum(dense) / numel if numel and len(dense) == len(rows) else None,
        }
        tip = {"norm": _number(norm, ".3g"), "rms": _number(found["rms"], ".3g"),
               "density": _number(found["density"], "%"), "dtypes": entry["lineage"]}  # fmt: skip
        for key, cells in maps.items():
            cells.append(_cell(place, rows, found[key], tip))
    titles = ("norm per value (rms)", "density")
    notes = ("Norm over the root of the number of values.", "Share of values that changed.")
    for (key, cells), title, note in zip(maps.items(), titles, notes, strict=True):
        yield from _map(f"{key}-{i}", title, head, cells, _sequential, note)


def _cell(place: tuple[str, str], rows: Sequence[Row], value: float | None, tip: Row) -> Row:
    """Return a cell of a map: where it stands, its value, and what its tooltip says, in order."""
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return {"tensor": _short(rows[0]["name"], 72) + more, "layer": place[0], "kind": place[1],
            "values": f"{sum(row['numel'] for row in rows):,}", **tip, "value": value}  # fmt: skip


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


def _labels(title: str, values: Sequence[float]) -> Spec:
    """Return how the numbers of an axis or a legend are written."""
    form = ".2~g" if max(map(abs, values), default=1.0) >= 1e-3 else ".2~e"
    if title.startswith(("density", "energy")):
        form = ".2~p"
    return {"labelExpr": f"datum.value === 0 ? '0' : format(datum.value, '{form}')"}


def _powers(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(-30, 30) if low <= 10.0**power <= high]


def _layer_names(layers: Iterable[str]) -> dict[str, str]:
    """Return layers in their order with short names: numbers where there is one stack."""
    ordered = sorted(set(layers), key=lambda layer: (layer == NO_LAYER, natural_order(layer)))
    stacks = {layer.rpartition(".")[0] for layer in ordered if layer != NO_LAYER}
    return {layer: layer if layer == NO_LAYER or len(stacks) > 1 else layer.rpartition(".")[2]
            for layer in ordered}  # fmt: skip


def _of(field: str, kind: str = "nominal", **more: Any) -> Spec:
    return {"field": field, "type": kind, **more}


def _map(
    name: str, title: str, head: list[str], cells: list[Row], colours: Scale, note: str
) -> Iterator[Figure]:
    """Yield a heat map, layers down and module kinds across: one rectangle for each cell."""
    if not cells:
        return
    known = [cell["value"] for cell in cells if cell["value"] is not None]
    look = colours(known)
    names = _layer_names(cell["layer"] for cell in cells)
    inside = [cell["kind"] for cell in cells if cell["layer"] != NO_LAYER]
    kinds = list(dict.fromkeys(inside + [cell["kind"] for cell in cells]))
    empty = "!isValid(datum.value)"
    if look["scale"].get("type") == "log":
        empty += " || datum.value <= 0"
    spec = {
        "name": "cells",
        "title": {"text": title, "subtitle": head},
        "width": {"step": 27},
        "height": {"step": 20 if len(names) <= 12 else 14 if len(names) <= 48 else 10},
        "data": {"values": [cell | {"layer": names[cell["layer"]]} for cell in cells]},
        "mark": {"type": "rect", "invalid": "show", "strokeDash": [2, 2]},
        "encoding": {
            "x": _of("kind", sort=kinds, title=None),
            "y": _of("layer", sort=list(names.values()), title=None),
            "color": {
                "condition": {"test": empty, "value": "transparent"},
                **_of("value", "quantitative", scale=look["scale"] | {"interpolate": "rgb"}),
                "legend": {"title": None, **_labels(title, known), **look["legend"]},
            },
            "stroke": {"condition": {"test": empty, "value": "#888"}, "value": None},
            "tooltip": [_of(key) for key in cells[0] if key != "value"],
        },
    }
    yield Figure(name, spec, note)


def _z_histogram(name: str, pair: Row, head: list[str]) -> Iterator[Figure]:
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
        layer({"type": "bar", "binSpacing": 1, "opacity": 0.75, "tooltip": True},
              counted(zs)[:-1], "this pair", x=x | {"bin": "binned"}, x2={"field": "to"}),
        layer({"type": "line", "interpolate": "step-after"}, counted(control), "control"),
        layer({"type": "line"}, curve, "chance"),
    ]  # fmt: skip
    note = "z of every tensor; the curve is what unrelated directions give."
    if beyond := sum(abs(z) > edge for z in zs):
        note += f" {beyond} of {len(zs)} lie beyond ±{edge} and are counted in the outermost bars."
    yield Figure(name, {"title": {"text": "z of the tensors", "subtitle": head},
                        "layer": layers if control else [layers[0], layers[2]]}, note)  # fmt: skip


def _steps(edges: Sequence[float], norms: Sequence[Row], names: Sequence[str]) -> Iterator[Figure]:
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
        "mark": {"type": "bar", "tooltip": True},
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
    name: str, title: str, head: list[str], series: dict[str, tuple[list[Row], str]], note: str
) -> Iterator[Figure]:
    """Yield one number along the layers, a line for each series; nothing for fewer than two."""
    rows = [
        {"series": label, "layer": printable(row["name"]), "value": row[key]}
        for label, (levels, key) in series.items()
        for row in levels
        if row["name"] not in ("", NO_LAYER) and row.get(key) is not None
    ]
    names = _layer_names(row["layer"] for row in rows)
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
                     axis=_labels(title, sizes) | ticks),
            "color": _of("series", sort=shown, title=None),
            "tooltip": [_of("series"), _of("layer"), _of("value", "quantitative", format=".3~g")],
        },
    }  # fmt: skip
    yield Figure(name, spec, note)


def _config(dark: bool, font: str) -> Spec:
    """Return the look: Okabe-Ito colours, one-hue ramps, and a centre that recedes."""
    light_or_dark: dict[str, tuple[Any, Any]] = {
        "ink": ("#1c1d1f", "#e6e6e3"), "soft": ("#55585e", "#a9adb5"),
        "line": ("#d9dadd", "#3a3f48"), "paper": ("#ffffff", "#15171b"),
        "category": ("#0072b2 #d55e00 #009e73 #cc79a7 #8a6d00 #56b4e9",
                     "#56b4e9 #e69f00 #3fc6a0 #d88fb8 #f0e442 #ff8552"),
        "diverging": ("#0b4a8f #4d93c9 #b3d3e8 #f4f4f2 #f6c3ac #d9694f #9a1026",
                      "#8cc8ff #3f87c9 #244a6b #24272d #74382f #d0604b #ffb09c"),
        "heatmap": ("#eef2f6 #b9d2e8 #6ba4d0 #2a6ca8 #08306b",
                    "#1e242c #27486b #3b7cb8 #7fbdf0 #d6ecff"),
    }  # fmt: skip
    look = {key: colours[dark] for key, colours in light_or_dark.items()}
    soft, line = look["soft"], look["line"]
    ranges = {key: look[key].split() for key in ("category", "diverging", "heatmap")}
    return {
        "background": look["paper"], "font": font, "padding": 4, "aria": False, "range": ranges,
        "view": {"stroke": None, "continuousWidth": 380, "discreteWidth": 380,
                 "continuousHeight": 180},
        "title": {"anchor": "start", "frame": "group", "fontSize": 13, "fontWeight": 600,
                  "color": look["ink"], "subtitleColor": soft, "subtitleFontSize": 11,
                  "subtitlePadding": 3, "offset": 8},
        "axis": {"labelColor": soft, "titleColor": soft, "labelFontSize": 10, "titleFontSize": 11,
                 "titleFontWeight": "normal", "domainColor": line, "tickColor": line,
                 "gridColor": line, "labelLimit": 220},
        "axisDiscrete": {"ticks": False, "domain": False, "labelPadding": 4},
        "axisX": {"grid": False},
        "legend": {"orient": "top", "labelColor": soft, "labelFontSize": 11, "labelLimit": 300,
                   "gradientLength": 200, "gradientThickness": 8, "columns": 1,
                   "symbolType": "square"},
    }  # fmt: skip
