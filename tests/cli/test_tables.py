"""Tables on terminals of any width: nothing wider, no value lost, no column without a value."""

import re

import pytest
from rich.cells import cell_len

from skillvec.analysis.wording import Grid
from skillvec.cli.labels import CUT
from skillvec.cli.tables import draw

NAMES = [
    *(f"model.language_model.layers.{i}.self_attn.{kind}_proj.weight"
      for i in range(12) for kind in "qkv"),
    "model.language_model.embed_tokens.weight",
]  # fmt: skip
HEADS = ["tensor", "status", "values that changed", "norm", "gain", "cosine", "share of energy"]
ROWS = [[name, "applied", str(1000 + i), f"{i}.25e-05", f"+0.{100 + i}", f"-0.{200 + i}", f"{i} %"]
        for i, name in enumerate(NAMES)]  # fmt: skip
GRID = Grid(HEADS, ROWS)
CELLS = {cell for row in ROWS for cell in row[1:]}


@pytest.mark.parametrize("width", [40, 60, 80, 120, 400])
def test_no_line_is_wider_and_no_value_is_lost(width: int):
    text = draw(GRID, width)
    lines = text.split("\n")
    assert max(map(len, lines)) <= width
    assert {cell for cell in CELLS if cell in text} == CELLS
    assert all(line == line.rstrip() for line in lines)
    parts = text.split("\n\n")
    assert (len(parts) > 1) == (width < 80)
    for part in parts:  # with every name, each by a label of its own
        body = part.split("─\n")[1].split("\n")
        assert len(body) == len(NAMES)
        assert len({re.split(r"  +", line)[0] for line in body}) == len(NAMES)
    assert (CUT in text) == (width < 120)


def test_where_there_is_no_terminal_nothing_is_cut():
    text = draw(GRID, None)
    assert all(f"{name}  " in text or f"{name}\n" in text for name in NAMES)
    assert CUT not in text and "\n\n" not in text


def test_columns_without_a_value_are_left_out():
    heads = ["tensor", "blank", "unknown", "zero", "rarely", "bars"]
    rows = [["a", "", "-", "0", "-", ""], ["b", "", "-", "0", "1.5", "██"]]
    text = draw(Grid(heads, rows, "bars"), 80)
    assert text.split("\n")[0].split() == ["tensor", "zero", "rarely", "bars"]
    assert [line.split() for line in text.split("\n")[2:]] == [
        ["a", "0", "-"], ["b", "0", "1.5", "██"],
    ]  # fmt: skip
    assert draw(Grid(heads, []), 80).split("\n")[0].split() == heads


def test_numbers_stand_to_the_right_and_names_and_bars_to_the_left():
    rows = [["a", "1", "█"], ["longer", "1000", "███"]]
    body = draw(Grid(["", "count", "bars"], rows, "bars"), 80).split("\n")[2:]
    assert body == ["a           1  █", "longer   1000  ███"]


def test_control_characters_of_a_name_are_written_out():
    assert "\x1b" not in draw(Grid(["tensor", "x"], [["a\x1b[0m", "1"]]), 80)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_letters_that_take_two_places_count_as_two(width: int):
    names = ["模型.层.0.注意力.权重", "模型.层.1.注意力.权重", "模" * 90, "w" * 200, "😀.weight"]
    text = draw(Grid(HEADS[:3], [[name, "applied", "1234"] for name in names]), width)
    for part in text.split("\n\n"):
        lines = part.split("\n")
        assert {cell_len(line) for line in lines[1:]} == {cell_len(lines[-1])}
        assert cell_len(lines[-1]) <= width
    assert text.count(CUT) >= 2  # of the long ones


def test_a_name_with_markup_stands_as_it_is():
    names = ["[red]x[/red]", "[bold]", "[/red]", "a[0].weight", ":smile:"]
    body = draw(Grid(["tensor", "x"], [[name, "1"] for name in names]), 80).split("\n")[2:]
    assert [line.split()[0] for line in body] == names
