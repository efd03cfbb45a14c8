"""The page of orthogonality and norms: the answer, its map, the numbers of it, then the rest.

Vectors have letters everywhere; the page says once whose they are, and again wherever one points
at them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from skillvec.analysis.angle_answers import (
    Headline,
    in_letters,
    letter_of,
    letter_pairs,
    list_headlines,
    say_answer,
    say_relation,
)
from skillvec.analysis.angle_report import AngleReport, PairEntry, Row, SubspaceFacts
from skillvec.analysis.figures import draw_figures, is_map
from skillvec.analysis.maps import HeatMap, list_pair_cells, list_vector_cells, make_map
from skillvec.analysis.outputs import say_activations
from skillvec.analysis.page import Chart, Entry, draw_chart, render
from skillvec.analysis.statistics_table import (
    FORECAST,
    PAIRS,
    SECTIONS,
    VECTORS,
    Statistic,
    Table,
    pick,
    select_known,
    select_shown,
    typeset,
    write_number,
    write_numbers,
)

LEVELS = ("parts", "modules", "kinds", "layers", "tensors")


class Grid(NamedTuple):
    """A table: its caption, its heads as entries without a value, and rows of cells."""

    caption: str
    heads: list[Entry]
    rows: list[list[str]]


class Map(NamedTuple):
    """A heat map on the page: of whom it is, and where its numbers are among the embedded rows."""

    of: str
    source: str  # "pairs" or "norms"
    place: int
    held: HeatMap


def html(report: AngleReport) -> str:
    """Return the page for the dict of an orthogonality or norms report.

    Self-contained: about 60 kB, and some 150 bytes for each number of a tensor; opens from disk.
    Raises UsageError where jinja2 or vl_convert are missing.
    """
    names = _name_vectors(report)
    pairs, norms = _list_pair_maps(report), _list_vector_maps(report)
    return render(
        "angle_page.html.jinja",
        _pack(report, names),
        names,
        title=_title(report),
        answer=typeset_words(say_answer(report)),
        vectors=list(zip(names, report["vectors"], report["lineage"], strict=True)),
        maps=pairs or norms[0],
        strongest=_find_strongest(report),
        few=_list_numbers(report),
        overview=_list_overview(report),
        warnings=report["warnings"],
        pairs=_list_pairs(report),
        norms=_list_norms(report),
        vector_maps=norms if pairs else [],
        charts=_draw_charts(report),
        asked=_list_asked(report),
        sections=_list_sections(),
    )


def _name_vectors(report: AngleReport) -> dict[str, str]:
    """Return label and dtypes of the vectors by their letters."""
    both = zip(report["vectors"], report["lineage"], strict=True)
    return {letter_of(i): f"{label} ({lineage})" for i, (label, lineage) in enumerate(both)}


def typeset_words(text: str) -> str:
    """Return a sentence with true minus signs before its numbers."""
    return text.replace(" -", " −")


# ------------------------------------------------------------------------------------- its script


def _pack(report: AngleReport, names: Mapping[str, str]) -> dict[str, Any]:
    """Return all rows for the page's script: columns once, rows as lists."""
    sides = letter_pairs(len(names))
    return {
        "pairs": [
            {"own": own, "levels": _pack_levels(pair)}
            for own, pair in zip(sides, report["pairs"], strict=False)  # no pairs of norms
        ],
        "norms": [
            {"own": [letter], "levels": _pack_levels(entry)}
            for letter, entry in zip(names, report["norms"], strict=True)
        ],
        "letters": names,
        "numbers": {"pairs": _list_columns(PAIRS), "norms": _list_columns(VECTORS)},
    }


def _pack_levels(held: Mapping[str, Any]) -> dict[str, Any]:
    packed = {}
    for level in LEVELS:
        rows: Sequence[Row] = held[level]
        columns = list(dict.fromkeys(
            key for row in rows for key, value in row.items() if value is not None
        ))  # fmt: skip
        packed[level] = {"columns": columns,
                         "rows": [[row.get(key) for key in columns] for row in rows]}  # fmt: skip
    return packed


def _list_columns(table: Table) -> list[dict[str, Any]]:
    return [{"key": n.key, "title": n.title, "meaning": n.plain or n.meaning, "form": n.form,
             "first": "rows" in n.shown.split()} for n in table]  # fmt: skip


# ------------------------------------------------------------------------------------------- maps


def _list_pair_maps(report: AngleReport) -> list[Map]:
    """Return the maps of cosine and of z of every pair; none of tensors that there are not."""
    found = []
    names = letter_pairs(len(report["vectors"]))
    for i, (own, pair) in enumerate(zip(names, report["pairs"], strict=False)):
        if cells := list_pair_cells(pair["tensors"]):
            found += [
                Map(" and ".join(own), "pairs", i,
                    make_map(f"{number.key}-{i + 1}", number, "diverging", cells))
                for number in pick(PAIRS, "cosine", "z")
            ]  # fmt: skip
    return found


def _find_strongest(report: AngleReport) -> int:
    """Return the pair that is furthest from chance, whose map is shown first."""
    sizes = [abs(pair["overall"]["z"] or 0.0) for pair in report["pairs"]]
    return sizes.index(max(sizes)) if sizes else 0


def _list_vector_maps(report: AngleReport) -> list[list[Map]]:
    """Return the maps of size and of density of every vector."""
    found = []
    for i, entry in enumerate(report["norms"]):
        cells = list_vector_cells(entry["tensors"])
        found.append([
            Map(letter_of(i), "norms", i, make_map(f"{n.key}-{i + 1}", n, "heatmap", cells))
            for n in pick(VECTORS, "rms", "density") if cells
        ])  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------- numbers


def _entry(table: Table, number: Statistic, value: str = "", beside: str = "") -> Entry:
    return Entry(find_anchor(table, number), number.title, number.plain or number.meaning,
                 typeset(value), typeset(beside))  # fmt: skip


def find_anchor(table: Table, number: Statistic) -> str:
    """Return the anchor of a number, here and in docs/orthogonality.md."""
    if table is PAIRS:
        return f"pair-{number.key}"
    return f"{'forecast' if table is FORECAST else 'vector'}-{number.key}"


def _entries(table: Table, shown: Table, row: Row) -> list[Entry]:
    return [_entry(table, number, value)
            for number, value in zip(shown, write_numbers(row, shown), strict=True)]  # fmt: skip


def _list_numbers(report: AngleReport) -> list[Entry]:
    """Return the few numbers of the one pair or vector; none where several pairs are compared."""
    pairs, table = report["pairs"], PAIRS if report["pairs"] else VECTORS
    if len(pairs) > 1:
        return []
    row = pairs[0]["overall"] if pairs else report["norms"][0]["overall"]
    return [_entry(table, *headline) for headline in list_headlines([row], table)[0]]


def _list_overview(report: AngleReport) -> Grid | None:
    """Return the few numbers of several pairs as a table."""
    rows = [pair["overall"] for pair in report["pairs"]]
    if len(rows) < 2:
        return None
    names, headlines = letter_pairs(len(report["vectors"])), list_headlines(rows)
    lines = [
        [" and ".join(own), say_relation(row), *(_write_headline(one) for one in found)]
        for own, row, found in zip(names, rows, headlines, strict=True)
    ]
    heads = [_word("pair"), _word("relation"),
             *(_entry(PAIRS, one.number) for one in headlines[0])]  # fmt: skip
    return Grid("The pairs and their numbers", heads, lines)


def _write_headline(one: Headline) -> str:
    said = typeset(one.value)
    return f"{said} ({typeset(one.beside)})" if one.number.key == "cosine" and one.beside else said


def _word(title: str) -> Entry:
    """Return the head of a column of words."""
    return Entry("", title, "", "")


def _list_pairs(report: AngleReport) -> list[Row]:
    """Return of each pair what it means in words, its dtypes, its numbers, and the forecast."""
    rows = [pair["overall"] for pair in report["pairs"]]
    known = [n for n in select_known(select_shown(PAIRS, "page"), rows) if n.key != "numel"]
    found = []
    for own, pair in zip(letter_pairs(len(report["vectors"])), report["pairs"], strict=False):
        entries = [entry._replace(title=in_letters(entry.title, own))
                   for entry in _entries(PAIRS, known, pair["overall"])]  # fmt: skip
        control = f"; control in place of {own[0]}: {pair['control']}" if pair["control"] else ""
        found.append({
            "name": " and ".join(own), "said": _sentences(own, pair),
            "dtypes": f"{own[0]}: {pair['lineage_a']}, {own[1]}: {pair['lineage_b']}{control}",
            "numbers": entries, "own": own, **_forecast(own, pair),
        })  # fmt: skip
    return found


def _sentences(own: tuple[str, str], pair: PairEntry) -> list[str]:
    """Return what report.json says of a pair in words."""
    forecast = pair["forecast"]
    said = [pair["sentence"], *([in_letters(forecast["sentence"], own)] if forecast else [])]
    return [typeset_words(f"{line[:1].upper()}{line[1:]}") for line in said if line]


def _forecast(own: tuple[str, str], pair: PairEntry) -> Row:
    """Return the numbers of a forecast, and the layers to look at."""
    forecast = pair["forecast"]
    if not forecast:
        return {"forecast": [], "layers": None}
    shown = select_known(select_shown(FORECAST, "page"), [forecast])
    entries = [entry._replace(title=in_letters(entry.title, own))
               for entry in _entries(FORECAST, shown, dict(forecast))]  # fmt: skip
    columns: list[tuple[Table, Statistic]]
    columns = [(FORECAST, n) for n in pick(FORECAST, "share")]
    columns += [(PAIRS, n) for n in pick(PAIRS, "cosine", "z", "p")]
    columns += [(FORECAST, n) for n in pick(FORECAST, "conflict")]
    lines = [[row["name"], *map(typeset, write_numbers(row, [n for _, n in columns]))]
             for row in forecast["layers"]]  # fmt: skip
    heads = [_word("layer"), *(_entry(table, number) for table, number in columns)]
    caption = f"Layers in which most of {own[0]} lies along {own[1]}"
    return {"forecast": entries, "layers": Grid(caption, heads, lines) if lines else None}


def _list_norms(report: AngleReport) -> Grid:
    """Return the vectors with their own numbers."""
    rows = [entry["overall"] for entry in report["norms"]]
    known = select_known(select_shown(VECTORS, "page"), rows)
    lines = [[letter_of(i), entry["lineage"], *map(typeset, write_numbers(entry["overall"], known))]
             for i, entry in enumerate(report["norms"])]  # fmt: skip
    heads = [_word("vector"), _word("dtypes"), *(_entry(VECTORS, number) for number in known)]
    return Grid("The numbers of each vector", heads, lines)


def _draw_charts(report: AngleReport) -> list[Chart]:
    """Return the charts, vectors by their letters."""
    letters = [letter_of(i) for i in range(len(report["vectors"]))]
    norms = [{**entry, "label": letter}
             for letter, entry in zip(letters, report["norms"], strict=True)]  # fmt: skip
    sides = letter_pairs(len(letters))
    pairs = [{**pair, "a": a, "b": b} for (a, b), pair in zip(sides, report["pairs"], strict=False)]
    drawn: Any = {**report, "norms": norms, "pairs": pairs}
    found = []
    for figure in draw_figures(drawn):
        if is_map(figure):
            continue  # a table of this page
        chart = draw_chart(figure)
        number = figure.name.rpartition("-")[2]
        if number.isdecimal():  # of a pair
            chart = chart._replace(title=f"{chart.title}: {' and '.join(sides[int(number) - 1])}")
        found.append(chart)
    return found


# ------------------------------------------------------------------------------------------ words


def _title(report: AngleReport) -> str:
    count = len(report["vectors"])
    if report["verb"] == "norms":
        return "Norms of a skill vector"
    return f"Orthogonality of {count} skill vectors"


def _list_asked(report: AngleReport) -> list[tuple[str, str]]:
    """Return what was asked."""
    asked = {"weights W": report["against"] or "none given"}
    if report["verb"] != "norms":
        asked["control"] = report["control"] or "none"
        asked["seed"] = str(report["seed"])
    asked["subspace"] = _say_subspace(report["subspace"])
    asked["activations"] = say_activations(report["activations"]) or "none"
    asked["tensors"] = ", ".join(f"{n} {status}" for status, n in report["counts"].items())
    return list(asked.items())


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


def _list_sections() -> list[tuple[str, list[tuple[str, Statistic]]]]:
    """Return every number with its anchor, in sections."""

    def table_of(number: Statistic) -> Table:  # some are alike in two of them
        return next(t for t in (PAIRS, VECTORS, FORECAST) if any(n is number for n in t))

    return [
        (title, [(find_anchor(table_of(number), number), number) for number in numbers])
        for title, numbers in SECTIONS.items()
    ]
