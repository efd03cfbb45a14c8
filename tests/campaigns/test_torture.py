"""A short form of the crash campaign (torture.py): every kind of trouble, a few points each.

The campaign runs in a process of its own, for it forks.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torture
from torture import Disk, File, Folder

# Scenarios in turn, so that each kind of trouble meets every way of writing in the long form alone.
FORMS = {
    "kill": "diff,shards,apply-over",
    "power,after": "shards-over,apply,combine",
    "error,full": "apply-moved,export-patch",
    "fsync,time": "wide,fused",
    "lost,read": "diff-over,import-patch",
    "short,timer,small": "shards,apply",
    "several": "shards,apply-over",
    "damage": "diff,fused",
    "command,inputs,change": "combine,apply",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    torture.make_inputs(folder)
    return folder


def campaign(rows: str, names: str, inputs: Path, output: Path, points: int, broken: str = "pass"):
    """Run the campaign in a process of its own; return it and the points."""
    text = "import sys, torture\nfrom skillvec.engine import runner\n"
    text += f"from skillvec.files import output_file, rows, staging\n{broken}\n"
    text += "sys.exit(torture.main())"
    command = [sys.executable, "-c", text, "--rows", rows, "--scenarios", names]
    command += ["--points", str(points), "--inputs", str(inputs), "--json", str(output)]
    where = Path(torture.__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=where)
    assert output.exists(), done.stderr
    return done, json.loads(output.read_text())


@pytest.mark.parametrize("rows", list(FORMS))
def test_no_fault_leaves_wrong_bytes_and_the_same_command_goes_on(
    rows: str, tmp_path: Path, inputs: Path
):
    done, found = campaign(rows, FORMS[rows], inputs, tmp_path / "points", 18)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    outcomes = Counter(point["outcome"] for point in found)
    assert len(found) >= 12 and not any(point["wrong"] for point in found)
    if rows.startswith("short"):
        assert outcomes["endured"] >= 8
    elif rows.startswith("command"):
        assert outcomes["refused"] >= 3
    else:  # some went on from claims, and not all
        assert outcomes["resumed"] >= 3 and outcomes["resumed"] < len(found)
    for row in set(rows.split(",")) & {"kill", "power", "after", "several"}:
        assert any(point["interrupted"] for point in found if point["row"] == row)


# ------------------------------------------------------------------- the campaign's own judgement


BROKEN = {
    "power": "output_file.OutputFile.flush = lambda self: None",
    "damage": "rows.RowWriter._confirm = lambda self, *rest: None",
    "change": "runner.refuse_changed = lambda before: None",
    "after": "staging.fsync_path = lambda path: None",
}


@pytest.mark.parametrize("row", list(BROKEN))
def test_the_campaign_sees_what_is_broken(row: str, tmp_path: Path, inputs: Path):
    done, found = campaign(row, "shards", inputs, tmp_path / "points", 16, BROKEN[row])
    wrong = [point for point in found if point["wrong"]]
    assert done.returncode == 1 and 0 < len(wrong) <= len(found) == 16


def test_every_row_and_scenario_is_in_the_long_form_and_every_row_in_the_short_one():
    short = {row for rows in FORMS for row in rows.split(",")}
    assert short == set(torture.ROWS)
    used = {name for names in FORMS.values() for name in names.split(",")}
    assert used == set(torture.SCENARIOS) - {"stream", "extract-lora"}  # these take seconds


def test_power_takes_what_was_not_fsynced_and_nothing_else():
    rng, file = random.Random(0), File(b"a" * 2000)
    file.pending = [(0, b"b" * 1000), (1500, b"c" * 1000), (100, None), (3000, b"")]
    assert file.left(rng, "none") == b"a" * 2000
    assert file.left(rng, "all") == b"b" * 100 + bytes(2900)
    file.pending = [(0, b"b" * 2000)]
    torn = {file.left(random.Random(seed), "torn") for seed in range(40)}
    assert len(torn) > 8 and {len(content) for content in torn} == {2000}
    for content in torn:  # whole sectors, old or new
        assert {content[at : at + 512] for at in range(0, 1536, 512)} <= {b"a" * 512, b"b" * 512}
    file.sync()
    assert file.left(rng, "none") == b"b" * 2000 == file.left(rng, "torn")


def test_names_are_on_the_disk_once_their_folder_is_fsynced(tmp_path: Path):
    (tmp_path / "old").write_bytes(b"old")
    disk = Disk(str(tmp_path))
    made, file = Folder(), File()
    file.pending = [(0, b"new")]
    disk.change(disk.root, (disk.root, "made", made, True))
    disk.change(made, (made, "file", file, True))
    disk.sync(file)
    disk.sync(disk.root)
    assert disk.root.kept["made"] is made and not made.kept  # its own names are not
    disk.change(disk.root, (made, "file", file, False), (disk.root, "old", file, True))
    seen = set()
    for seed in range(40):
        copy = torture.pickle.loads(torture.pickle.dumps(disk))
        copy.cut(str(tmp_path), random.Random(seed))
        seen.add((tmp_path / "old").read_bytes())
        assert {path.name for path in tmp_path.iterdir()} == {"made", "old"}
    assert seen == {b"old", b"new"}  # one or the other, whole
    disk.sync(disk.root)
    disk.cut(str(tmp_path), random.Random(0))
    assert (tmp_path / "old").read_bytes() == b"new" and not list((tmp_path / "made").iterdir())
