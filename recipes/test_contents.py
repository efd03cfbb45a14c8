"""Stages know what they made and read by its content: edits are kept and noticed."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skillvec.recipes.contents import Contents
from skillvec.recipes.dry_run import show_stages
from skillvec.recipes.stages import Pipeline, run_stages, states
from skillvec.recipes.test_past import write_model

# -------------------------------------------------------------------------------- digests


def test_a_file_is_read_again_when_its_time_or_size_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, index = tmp_path / "file", tmp_path / "stages" / "contents.json"
    file.write_text("one")
    contents = Contents(index)
    first = contents.digest(file)
    assert not index.exists()  # a dry run writes nothing
    contents.save()
    opened: list[Path] = []
    read = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: opened.append(path) or read(path, *a, **k)
    )
    assert Contents(index).digest(file) == first and file not in opened
    os.utime(file, ns=(1, 1))
    assert Contents(index).digest(file) == first and file in opened  # as of a copy
    file.write_text("two")
    assert Contents(index).digest(file) != first
    file.unlink()
    contents.save()
    assert json.loads(index.read_text()) == {} and contents.digest(file) is None


def test_the_digest_of_a_folder_is_of_names_and_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "below").mkdir(parents=True)
    (one / "below" / "file").write_text("text")
    shutil.copytree(one, other)
    contents = Contents(tmp_path / "index.json")
    assert contents.digest(one) == contents.digest(other)
    for aside in ("checkpoint-10", "runs", "README.md"):  # no part of a model
        (other / aside).mkdir()
        (other / aside / "file").write_text("aside")
    assert contents.digest(one) == contents.digest(other)
    (other / "below" / "file").rename(other / "below" / "renamed")
    assert contents.digest(one) != contents.digest(other)
    assert contents.files(other, {other / "below"}) == {}


def test_long_files_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("skillvec.recipes.contents.LONG", 2)
    (tmp_path / "file").write_text("long")
    Contents(tmp_path / "index.json").digest(tmp_path / "file")
    assert capsys.readouterr().out == f"reading {tmp_path / 'file'} (0.0 GB) for its digest\n"


# -------------------------------------------------------------------------------- edits


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A stage that writes two files, one that joins them, one that reads one of them."""

    def prepare(arguments: Sequence[str]) -> int:
        out = Path(arguments[1])
        out.mkdir()
        for name in ("a", "b"):
            (out / name).write_text(name)
        return 0

    def join(arguments: Sequence[str]) -> int:
        words = [Path(word).read_text() for word in arguments[3:]]
        Path(arguments[1]).write_text("".join(words))
        return 0

    monkeypatch.setitem(sys.modules, "fake.prepare", SimpleNamespace(main=prepare))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "fake.join", SimpleNamespace(main=join))  # type: ignore[arg-type]
    return three(tmp_path)


def three(tmp_path: Path, **options: Any) -> Pipeline:
    line = Pipeline(tmp_path / "out", "base")
    made = line.module("made", "fake.prepare", options)
    line.module("both", "fake.join", {"of": [str(made / "a"), str(made / "b")]})
    line.module("one", "fake.join", {"of": [str(made / "a")]})
    return line


def test_edited_data_is_kept_and_what_reads_it_runs_again(
    line: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stages(line)
    edited = tmp_path / "out" / "made" / "b"
    edited.write_text("edited")
    found = {stage.name: (state, changed) for stage, state, changed in states(line)}
    assert found == {"made": ("done", ["b"]), "both": ("to do", []), "one": ("done", [])}
    capsys.readouterr()
    show_stages(line)
    sentence = (
        f"{edited} changed after made made it: the change is kept, and what reads it runs again"
    )
    assert sentence in " ".join(capsys.readouterr().out.split())
    run_stages(line)
    shown = capsys.readouterr().out
    assert sentence in shown and "one: done before" in shown and "both: done" not in shown
    assert edited.read_text() == "edited"
    assert (tmp_path / "out" / "both").read_text() == "aedited"
    run_stages(line)
    assert "both: done before" in capsys.readouterr().out


def test_edits_are_not_removed_by_a_stage_that_runs_again(line: Pipeline, tmp_path: Path) -> None:
    run_stages(line)
    edited = tmp_path / "out" / "made" / "b"
    edited.write_text("edited")
    other = three(tmp_path, seed=1)
    with pytest.raises(
        ValueError, match=r"made has to run again, which would remove .*made/b; move"
    ):
        run_stages(other)
    assert edited.read_text() == "edited"
    edited.write_text("b")  # taken back
    run_stages(other)
    assert [state for _, state, _ in states(other)] == ["done"] * 3


def test_files_that_are_gone_are_made_again(line: Pipeline, tmp_path: Path) -> None:
    run_stages(line)
    (tmp_path / "out" / "made" / "a").unlink()
    assert [state for _, state, _ in states(line)] == ["to do"] * 3
    before = (tmp_path / "out" / "both").stat().st_mtime_ns
    run_stages(line)
    # the same bytes came out: what reads them did not run
    assert (tmp_path / "out" / "both").stat().st_mtime_ns == before


def test_a_stage_that_runs_again_and_makes_the_same_stops_there(
    line: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stages(line)
    capsys.readouterr()
    run_stages(three(tmp_path, seed=1))
    assert capsys.readouterr().out.count("done before") == 2


def test_records_of_an_earlier_version_are_made_anew(
    line: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stages(line)
    for name in ("made", "both", "one"):
        path = tmp_path / "out" / "stages" / f"{name}.json"
        marker = json.loads(path.read_text())
        del marker["made"]
        path.write_text(json.dumps(marker))
    assert [state for _, state, _ in states(line)] == ["to do"] * 3
    show_stages(line)
    assert capsys.readouterr().out.count("made by an earlier version") == 3
    run_stages(line)
    assert capsys.readouterr().out.count("an earlier version of skillvec did not record") == 3


def test_checkpoints_may_be_removed(tmp_path: Path, line: Pipeline) -> None:
    run_stages(line)
    (tmp_path / "out" / "made" / "checkpoint-5").mkdir()
    (tmp_path / "out" / "made" / "checkpoint-5" / "optimizer.pt").write_text("large")
    assert [changed for _, _, changed in states(line)] == [[], [], []]


# -------------------------------------------------------------------------------- a skill of zeros


def test_a_skill_that_is_zero_stops_the_pipeline(tmp_path: Path) -> None:
    for name in ("sft", "rl"):
        write_model(tmp_path / name, {"model.norm.weight": torch.ones(8)})
    line = Pipeline(tmp_path / "out", "base")
    line.diff("skill.safetensors", tmp_path / "rl", tmp_path / "sft", "grpo")
    for _ in range(2):  # the second time it is done, and as empty as before
        with pytest.raises(ValueError, match=r"the skill is zero .* docs/past.md, \"RL has no rew"):
            run_stages(line)
    allowed = Pipeline(tmp_path / "out", "base", allow_no_reward=True)
    allowed.diff("skill.safetensors", tmp_path / "rl", tmp_path / "sft", "grpo")
    run_stages(allowed)
    write_model(tmp_path / "rl", {"model.norm.weight": torch.full((8,), 1.5)})
    run_stages(line)
