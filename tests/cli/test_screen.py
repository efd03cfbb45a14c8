"""What the screen does with sentences, documents and tables, on terminals of any width."""

import pytest

from skillvec.analysis.wording import LINE_WIDTH, Grid, fill, wrap
from skillvec.cli.screen import Screen, fold
from skillvec.report import Report
from skillvec.verbs import sentences

CARD = "| a table of Markdown | which is wider than any narrow terminal |\n|---|---|\n\n> quoted"


def test_a_card_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    Screen().show(Report("push", {"url": "u", "card": CARD}))
    assert capsys.readouterr().out == f"{CARD}\n"
    Screen().show(Report("push", {"url": "u", "card": CARD, "commit": "c"}))
    assert capsys.readouterr().out == "u\n"


def test_a_blank_line_parts_two_tables(monkeypatch: pytest.MonkeyPatch, capsys):
    grid = Grid(["name", "count"], [["a", "1"]])
    monkeypatch.setitem(sentences.ANSWERS, "inspect", lambda report: ["text", grid, grid, "end"])
    Screen().show(Report("inspect"))
    lines = capsys.readouterr().out.split("\n")
    assert [line.split()[:1] for line in lines] == [
        ["text"], ["name"], ["─" * len(lines[2])], ["a"], [], ["name"], ["─" * len(lines[2])],
        ["a"], ["end"], [],
    ]  # fmt: skip


def test_the_width_of_a_terminal_is_that_of_one_answer(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setitem(sentences.ANSWERS, "push", lambda report: [wrap("word " * 12)])
    before = LINE_WIDTH.get()
    Screen().show(Report("push"))
    assert [len(line) <= 40 for line in capsys.readouterr().out.splitlines()] == [True, True]
    assert LINE_WIDTH.get() == before > 60


def test_lines_are_broken_between_words_below_where_they_begin():
    text = "  stored   208 packed of 29.6 kB, and some of which 100 % are zero"
    assert fold(text, 30).split("\n") == [
        "  stored   208 packed of", "           29.6 kB, and some", "           of which 100 % are",
        "           zero",
    ]  # fmt: skip
    assert fold("warning: one two three", 16) == "warning: one two\n         three"
    digest = "0123456789abcdef" * 2  # what stays whole stands further to the left if it has to
    assert fold(f"  content  of base: {digest}", 40).split("\n") == [
        "  content  of base:", f"        {digest}",
    ]  # fmt: skip
    assert fold(f"error: {digest} {digest} b", 30).endswith(f"\n       {digest}\n       b")
    command = "  skillvec diff a/long/path another/long/path -o out"
    assert fold(command, 20) == command and fold(text, None) == text


def test_numbers_keep_their_units():
    for words in ("12.5 kB", "3 %", "1.2 M", "7 TB"):
        for width in range(8, 20):
            assert words in fill(f"it takes {words} of it", width, "")
    assert fill("a 3 Bears", 4, "") == "a 3\nBears"
