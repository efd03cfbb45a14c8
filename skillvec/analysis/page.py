"""A report as one HTML page, and its figures as files.

Hides jinja2, the template beside this file and Vega-Lite's renderers. The page loads nothing from
anywhere, and its own policy forbids it. Labels and tensor names come from files that strangers
wrote: they reach the page as escaped text or as JSON without "<", never as markup.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from math import isfinite
from typing import Any, NamedTuple

from skillvec.analysis.angle_report import AngleReport, PairEntry, Row, SubspaceFacts
from skillvec.analysis.figures import Figure, draw_figures, is_map, look_of, name_dtypes, typeset
from skillvec.analysis.outputs import say_activations
from skillvec.analysis.statistics_table import (
    FORECAST,
    PAIRS,
    SECTIONS,
    VECTORS,
    Table,
    pick,
    select_known,
    select_shown,
    write_number,
    write_numbers,
    write_spread,
)
from skillvec.errors import needs, printable

LEAST_NBYTES = 800_000  # of a page: the drawing library that it carries
Entry = tuple[str, str, str]  # title, tooltip, value


class _Grid(NamedTuple):
    """A table of the page; `tips` are tooltips of its heads."""

    heads: list[str]
    tips: list[str]
    rows: list[list[str]]


def check_available() -> None:
    """Raise UsageError where a package that draws the page is missing."""
    with needs("report", "the page"):
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401


def html(report: AngleReport) -> str:
    """Return the page for the dict of an orthogonality or norms report.

    Self-contained, about 1 MB plus the rows; opens from disk. Raises UsageError where jinja2 or
    vl_convert are missing.
    """
    drawn = list(draw_figures(report))
    return render(
        "page.html.jinja",
        {key: value for key, value in report.items() if key != "tensors"},
        drawn,
        {"numbers": {"pairs": _list_columns(PAIRS), "vectors": _list_columns(VECTORS)}},
        title=_title(report),
        warnings=report["warnings"],
        vectors=_list_vectors(report),
        asked=_list_asked(report),
        pairs=_list_pairs(report),
        answer=_list_answers(report["pairs"]),
        maps=[figure for figure in drawn if is_map(figure)],
        charts=[figure for figure in drawn if not is_map(figure)],
        sections=SECTIONS,
    )


def render(
    template: str, report: Mapping[str, Any], figures: Sequence[Figure],
    known: Mapping[str, Any] | None = None, **shown: Any,
) -> str:  # fmt: skip
    """Return a template of this folder as a page: what it shows, its figures, and its report.

    `known` is what its script finds beside the figures. Raises UsageError where jinja2 or
    vl_convert are missing.
    """
    check_available()
    import vl_convert
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def as_json(value: Any) -> Markup:
        text = json.dumps(_round(value), separators=(",", ":"), allow_nan=False)
        return Markup(text.replace("<", "\\u003c"))

    def finish(value: Any) -> Any:
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return printable(value) if plain else value

    def load(name: str) -> str:
        return files("skillvec.analysis").joinpath(name).read_text(encoding="utf-8")

    schemes = {name: look_of(name == "dark", "system-ui, sans-serif") for name in ("light", "dark")}
    # Ready-made without a snippet (the stub asks for one), bundled anew for seconds with it.
    library = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    environment = Environment(
        autoescape=True, finalize=finish, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, loader=FunctionLoader(load),
    )  # fmt: skip
    specs = {figure.name: figure.spec for figure in figures}
    return environment.get_template(template).render(
        shown,
        report=as_json(report),
        figures=as_json({"specs": specs, "config": schemes, **(known or {})}),
        vega=Markup(library),
    )


def figures(report: AngleReport) -> Iterator[tuple[str, bytes]]:
    """Yield file name and bytes of every figure of the page, as SVG and as PNG at 2.5 times scale.

    White background. Raises UsageError without vl_convert.
    """
    return draw(draw_figures(report))


def draw(drawn: Iterable[Figure]) -> Iterator[tuple[str, bytes]]:
    """Yield file name and bytes of figures, as `figures` does."""
    check_available()
    import vl_convert

    config = look_of(False, "Helvetica, Arial, sans-serif")
    for name, spec, _ in drawn:
        svg = vl_convert.vegalite_to_svg(_round(spec), config=config, allowed_base_urls=[])
        yield f"{name}.svg", svg.encode()
        yield f"{name}.png", vl_convert.svg_to_png(svg, scale=2.5)


def _round(value: Any) -> Any:
    """Return plain data with floats at six digits, and null where JSON has no number."""
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_round(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else None
    return value


# ------------------------------------------------------------------------- what the template shows


def _write_row(row: Any, numbers: Table) -> list[str]:
    """Return the numbers of a row, the cosine with what chance makes of it."""
    said = [typeset(text) for text in write_numbers(row, numbers)]
    for i, number in enumerate(numbers):
        if number.key == "cosine" and None not in (row.get("cosine"), row.get("cosine_sd")):
            said[i] += f", chance ± {typeset(write_spread(row))}"
    return said


def _make_grid(words: list[str], lines: Sequence[list[str]], numbers: Table) -> _Grid:
    """Return a table of lines: columns of words, then of numbers."""
    heads = [*words, *(number.title for number in numbers)]
    return _Grid(heads, [""] * len(words) + [number.meaning for number in numbers], list(lines))


def _list_numbers(row: Any, numbers: Table) -> list[Entry]:
    said = _write_row(row, numbers)
    return [(n.title, n.meaning, value) for n, value in zip(numbers, said, strict=True)]


def _list_columns(table: Table) -> list[dict[str, Any]]:
    """Return what the page's table of rows knows of its columns."""
    return [
        {"key": n.key, "title": n.title, "meaning": n.meaning, "first": "rows" in n.shown.split()}
        for n in table
    ]


def _title(report: AngleReport) -> str:
    what = "Norms" if report["verb"] == "norms" else "Orthogonality"
    count = len(report["vectors"])
    return f"{what} of {count} skill vector{'' if count == 1 else 's'}"


def _list_vectors(report: AngleReport) -> _Grid:
    """Return the vectors with their own numbers."""
    overall = [entry["overall"] for entry in report["norms"]]
    known = select_known(select_shown(VECTORS, "page"), overall)
    vectors = zip(report["vectors"], report["lineage"], overall, strict=True)
    lines = [[label, lineage, *_write_row(row, known)] for label, lineage, row in vectors]
    return _make_grid(["vector", "dtypes"], lines, known)


def _list_asked(report: AngleReport) -> list[Entry]:
    """Return what was asked."""
    asked = {"weights W": report["against"] or "none given"}
    if report["verb"] != "norms":
        asked["control"] = report["control"] or "none"
        asked["seed"] = str(report["seed"])
    asked["subspace"] = _say_subspace(report["subspace"])
    asked["activations"] = say_activations(report["activations"]) or "none"
    asked["tensors"] = ", ".join(f"{n} {status}" for status, n in report["counts"].items())
    return [(title, "", value) for title, value in asked.items()]


def _say_subspace(asked: SubspaceFacts | None) -> str:
    if not asked:
        return "none"
    found = {"exact": asked["exact"], "randomised": asked["randomised"],
             "left out": asked["left_out"]}  # fmt: skip
    counts = ", ".join(f"{count} {kind}" for kind, count in found.items() if count)
    return (
        f"top {asked['k']} directions, on {asked['device']}; matrices: {counts or 'none'};"
        f" worst error {typeset(write_number(asked['error'], '.2g'))}"
    )


def _list_answers(pairs: Sequence[PairEntry]) -> _Grid:
    """Return the table of all pairs."""
    rows = [pair["overall"] for pair in pairs]
    numbers = select_known(select_shown(PAIRS, "pairs"), rows)
    lines = [
        [f"{pair['a']}\n{pair['lineage_a']}", f"{pair['b']}\n{pair['lineage_b']}",
         *_write_row(row, numbers)]
        for pair, row in zip(pairs, rows, strict=True)
    ]  # fmt: skip
    return _make_grid(["A, dtypes", "B, dtypes"], lines, numbers)


def _list_pairs(report: AngleReport) -> list[Row]:
    """Return of each pair what it means in words, its dtypes, its numbers, and the forecast."""
    rows = [pair["overall"] for pair in report["pairs"]]
    known = [n for n in select_known(select_shown(PAIRS, "page"), rows) if n.key != "numel"]
    layer_numbers = [*pick(FORECAST, "share"), *pick(PAIRS, "cosine", "z", "p"),
                     *pick(FORECAST, "conflict")]  # fmt: skip
    found = []
    for pair in report["pairs"]:
        forecast = pair["forecast"]
        said = [line for line in (pair["sentence"], forecast and forecast["sentence"]) if line]
        control = f" Control in place of A: {pair['control']}." if pair["control"] else ""
        shown: Row = {"a": pair["a"], "b": pair["b"], "said": [s[:1].upper() + s[1:] for s in said],
                 "dtypes": f"{name_dtypes(pair)}.{control}",
                 "numbers": _list_numbers(pair["overall"], known), "forecast": None}  # fmt: skip
        if forecast:
            numbers = select_known(select_shown(FORECAST, "page"), [forecast])
            lines = [[row["name"], *_write_row(row, layer_numbers)] for row in forecast["layers"]]
            grid = _make_grid(["layer"], lines, layer_numbers)
            grid.heads[2] = layer_numbers[1].title  # whose spread is not known
            shown |= {"forecast": _list_numbers(forecast, numbers), "layers": grid}
        found.append(shown)
    return found
