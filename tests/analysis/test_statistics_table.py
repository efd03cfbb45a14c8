"""The one table of numbers: complete, and what docs/orthogonality.md shows.

`python tests/analysis/test_statistics_table.py` rewrites the tables of that page.
"""

import re
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest

from skillvec.analysis import statistics_table
from skillvec.analysis.angle_page import find_anchor, html
from skillvec.analysis.levels import pair_levels, vector_levels
from skillvec.analysis.statistics_table import (
    FORECAST,
    PAIRS,
    SECTIONS,
    VECTORS,
    Statistic,
    pick,
    select_shown,
    write_number,
    write_numbers,
)
from skillvec.ops.statistics import Request, layout
from skillvec.ops.svd import decompose
from skillvec.verbs.spectra import Own, describe_spectrum, relate_parts, relate_spectra
from skillvec.verbs.spikes import find_spikes

PAGE = Path(__file__).parents[2] / "docs" / "orthogonality.md"
PLACES = {"answer", "page", "rows", "lines", "screen"}


def table_of(numbers: tuple[Statistic, ...]) -> str:
    """Return a table of numbers in Markdown, each with the anchor that the page links to."""
    by_chance = any(number.chance for number in numbers)
    rows = [["number", "title", "meaning", "by chance"], ["---"] * 4]
    rows += [[f'<a id="{anchor_of(n)}"></a>`{n.key}`', *map(marked, (n.title, n.meaning, n.chance))]
             for n in numbers]  # fmt: skip
    return "".join(f"| {' | '.join(row if by_chance else row[:3])} |\n" for row in rows)


def anchor_of(number: Statistic) -> str:
    tables = (PAIRS, VECTORS, FORECAST)  # some numbers are alike in two of them
    return find_anchor(next(t for t in tables if any(n is number for n in t)), number)


def marked(text: str) -> str:
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)
    return text.replace("|", "\\|")


def with_tables(page: str) -> str:
    """Return the page with every table as the module has it."""
    return re.sub(
        r"<!-- ([A-Z_]+) -->\n.*?<!-- end -->",
        lambda found: (
            f"<!-- {found[1]} -->\n\n{table_of(getattr(statistics_table, found[1]))}\n<!-- end -->"
        ),
        page,
        flags=re.DOTALL,
    )


def test_the_tables_of_the_page_are_those_of_the_module() -> None:
    page = PAGE.read_text()
    assert page == with_tables(page), "run: python tests/analysis/test_statistics_table.py"
    shown = [number for numbers in SECTIONS.values() for number in numbers]
    assert {*PAIRS, *VECTORS, *FORECAST} == set(shown)
    for number in shown:
        assert f"`{number.key}` | {marked(number.title)} | {marked(number.meaning)}" in page
    anchors = re.findall(r'<a id="([^"]+)">', page)
    assert len(anchors) == len(set(anchors)) == len(shown)


def test_every_number_has_one_row() -> None:
    """What is computed and what has a row are the same: nothing is shown that has no meaning."""
    request = Request((1.0, 1.0), ((0, 1),), ((0, 1),))
    sums = np.zeros(1, layout(request))[0]
    matrix = np.eye(6, 4, dtype=np.float32)
    one = decompose(matrix, 2, "cpu", 0)
    pair = {"energy_a": 1.0, "sar_a": 1.0, "a_in_b": 1.0}
    pair |= {"energy_b": 1.0, "sar_b": 1.0, "b_in_a": 1.0} | relate_spectra(one, one, 2)
    own = Own(one, find_spikes(matrix, one, "cpu", 0))
    pair["sums"] |= relate_parts(own, own, 4.0, 8.0)
    records = [("w", 24, sums)]
    levels = pair_levels(records, request, 0, [pair], {}, None, [0], [{}])
    vector = vector_levels(records, 0, [describe_spectrum(*own, 0.5)], [{}])
    for found, table in ((levels, PAIRS), (vector, VECTORS)):
        assert set(found["overall"]) == {number.key for number in table}
        assert len({number.key for number in table}) == len(table)
    forecast = {*levels["forecast"], "share"} - {"sentence", "layers"}
    assert forecast == {number.key for number in FORECAST}
    for number in (*PAIRS, *VECTORS, *FORECAST):
        assert ("answer" in number.shown.split()) == bool(number.plain), number.key
        assert set(number.shown.split()) <= PLACES, number.key
        if number.form != "list":
            write_number("w" if number.form == "word" else 0.5, number.form)


def test_a_new_row_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row is all that the page wants of a new number."""
    from test_page import fake_report
    from webpage import Parsed

    new = Statistic("kurtosis", "tails", ".1f", "fourth moment of the values", "3", "page lines")
    table = (*VECTORS, new)
    for module in ("angle_page", "figures"):
        monkeypatch.setattr(f"skillvec.analysis.{module}.VECTORS", table)
    report = fake_report(labels=("a", "b"))
    for entry in report["norms"]:
        for row in [entry["overall"], *entry["layers"]]:
            row["kurtosis"] = 4.25
    text = html(report)
    parsed = Parsed(text)
    assert "tails" in parsed.text and "4.2" in parsed.text
    assert 'title="fourth moment of the values"' in text
    assert "<h4>tails</h4>" in text  # its chart along the layers
    assert parsed.json("report")["numbers"]["norms"][-1]["title"] == "tails"


def test_numbers_are_written_by_their_form() -> None:
    assert write_number(0.12345, "%") == "12.3 %" and write_number(1234.0, ",d") == "1,234"
    assert {write_number(value, ".3g") for value in (None, nan, inf)} == {"-"}
    said = write_numbers({"p": 0.0, "z": -1.25}, pick(PAIRS, "p", "z", "lift"))
    assert said == ["< 1e-300", "-1.2", "-"]
    assert [n.key for n in select_shown(VECTORS, "screen")] == [
        "norm", "rms", "energy_share", "density",
    ]  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
