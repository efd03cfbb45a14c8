"""The journal of a sweep: what it keeps of a run that ends at any byte, and whom it refuses."""

import json
import os
from pathlib import Path

import pytest

from skillvec.errors import FormatError, OutputError, UsageError
from skillvec.trials.journal import Journal

ASKED = {"target": "abc", "seed": 0, "include": ("*",)}


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ASKED) as journal:
        assert journal.found == []
        journal.add({"lam": 0.1, "name": "ä"})
        journal.add({"lam": -0.5})
    with Journal(path, ASKED) as journal:
        assert journal.found == [{"lam": 0.1, "name": "ä"}, {"lam": -0.5}]
        journal.add({"lam": 2})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("lam") for line in lines] == [None, 0.1, -0.5, 2]


def test_every_place_where_a_run_may_have_been_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ASKED) as journal:
        journal.add({"lam": 0.5})
        journal.add({"lam": 1.0})
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Journal(path, ASKED) as journal:
            assert len(journal.found) == max(0, sum(end <= cut for end in ends) - 1)
            journal.add({"lam": 7.0})
        with Journal(path, ASKED) as journal:
            assert journal.found[-1] == {"lam": 7.0}


def test_a_tail_that_a_power_failure_left_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ASKED) as journal:
        journal.add({"lam": 0.5})
    with open(path, "ab") as file:
        file.write(bytes(100))
    with Journal(path, ASKED) as journal:
        assert journal.found == [{"lam": 0.5}]


def test_a_broken_line_within_is_refused_and_force_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ASKED) as journal:
        journal.add({"lam": 0.5})
    path.write_bytes(path.read_bytes() + b"[1]\n" + b'{"lam":1.0}\n')
    with pytest.raises(FormatError, match=r"journal\.jsonl: line 3 is broken; --force"):
        Journal(path, ASKED)
    with Journal(path, ASKED, force=True) as journal:
        assert journal.found == []
    assert path.read_text().count("\n") == 1


def test_another_request_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, ASKED).close()
    with pytest.raises(UsageError) as error:
        Journal(path, {**ASKED, "seed": 1, "rows": "skip"})
    said = str(error.value)
    assert "seed: 0 then, 1 now" in said and 'rows: nothing then, "skip" now' in said
    assert "target" not in said and "--force" in said
    Journal(path, {**ASKED, "seed": 1}, force=True).close()
    assert json.loads(path.read_text())["seed"] == 1


def test_one_process_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ASKED) as journal:
        journal.add({"lam": 1})
        with pytest.raises(OutputError, match="another run is at work"):
            Journal(path, ASKED, force=True)
    with Journal(path, ASKED) as journal:  # nothing was taken away by who was refused
        assert journal.found == [{"lam": 1}]


def test_a_line_is_on_the_disk_when_it_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    path = tmp_path / "journal.jsonl"
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_bytes()))
    with Journal(path, ASKED) as journal:
        journal.add({"lam": 0.25})
        assert seen[-1].endswith(b'{"lam":0.25}\n')
