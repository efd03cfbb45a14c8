"""Room for the output: what is free is said, and what cannot fit or be made is refused before."""

import json
import os
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from families import perturbed, save, toy
from hubserver import HubServer

import skillvec
from skillvec import verbs
from skillvec.analysis import page
from skillvec.cli.commands import main
from skillvec.engine import outputs, threads
from skillvec.errors import OutputError, UsageError
from skillvec.remote import object_store

FREE = 123_456_789
SURE = ("apply", "diff dense", "orthogonality", "norms")  # their size is known, or the least of it


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    base = toy()
    save(folder / "base", base)
    save(folder / "tuned", perturbed(base, density=0.2))
    files = {"notes.txt": "x" * 5000, "spk_dict.pt": "y" * 7000}
    save(folder / "target", perturbed(base, 3), shards=3, side_files=files)
    skillvec.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    skillvec.export_patch(folder / "v.safetensors", folder / "p.safetensors")
    return folder


@pytest.fixture
def commands(inputs: Path, tmp_path: Path) -> dict[str, list[object]]:
    vector, out = inputs / "v.safetensors", tmp_path / "out.safetensors"
    pair = (inputs / "tuned", inputs / "base")
    return {
        "diff": ["diff", *pair, "-o", out],
        "diff dense": ["diff", *pair, "--codec", "dense", "-o", out],
        "combine": ["combine", vector, f"{pair[0]}::{pair[1]}=-0.5", "-o", out],
        "import-patch": ["import-patch", inputs / "p.safetensors", pair[1], "-o", out],
        "export-patch": ["export-patch", vector, "-o", out],
        "apply": ["apply", inputs / "target", vector, "-o", tmp_path / "out"],
        "orthogonality": ["orthogonality", vector, "::".join(map(str, pair)), "-o", tmp_path / "r"],
        "norms": ["norms", vector, "-o", tmp_path / "r"],
    }


VERBS = ["diff", "diff dense", "combine", "import-patch", "export-patch", "apply", "orthogonality",
         "norms"]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def disk_of(nbytes: int) -> None:
        usage = types.SimpleNamespace(total=10**9, used=10**9 - nbytes, free=nbytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return disk_of


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Yield what the engine was given: it must stay empty."""
    given: list[Any] = []
    monkeypatch.setattr(threads.Threads, "run", lambda self, plan, *rest: given.append(plan))
    yield given
    assert not given


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_says_what_is_free_beside_what_is_written(
    verb: str, commands, small, unread, tmp_path: Path
):
    small(FREE)
    told = run(*commands[verb], "--dry-run")
    assert told.exit_code == 0, told.output
    assert "123 MB free on the disk of the output" in told.stdout and "writes " in told.stdout
    assert "may not fit" not in told.output
    report = json.loads(run(*commands[verb], "--dry-run", "--json").stdout)
    assert report["nbytes_free"] == FREE > report["nbytes_written"] > 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_free_is_what_the_system_says(tmp_path: Path):
    stat = os.statvfs(tmp_path)
    assert outputs.free_nbytes(tmp_path) == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.2)


def test_a_disk_that_does_not_know_its_size_refuses_nothing(commands, small, monkeypatch, tmp_path):
    small(0)
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_blocks=0, f_flag=0))
    assert "free" not in run(*commands["apply"], "--dry-run").stdout
    assert run(*commands["apply"]).exit_code == 0


@pytest.mark.parametrize("more", [["--dry-run"], []])
@pytest.mark.parametrize("verb", SURE)
def test_what_cannot_fit_is_refused_before_a_tensor_is_read(
    verb: str, more: list[str], commands, small, unread, tmp_path: Path
):
    small(9_000)  # less than the weights of any of them
    told = run(*commands[verb], *more)
    assert told.exit_code == 1 and "Traceback" not in told.output
    words = " ".join(told.stderr.split())
    assert "does not fit: " in words and " bytes are needed, 9,000 are free on the disk" in words
    assert list(tmp_path.iterdir()) == []


def test_the_sizes_of_an_apply_are_known_to_the_byte(commands, small, inputs: Path, tmp_path: Path):
    needed = json.loads(run(*commands["apply"], "--dry-run", "--json").stdout)["nbytes_written"]
    small(needed - 1)
    assert f"{needed:,} bytes are needed, {needed - 1:,} are free" in run(*commands["apply"]).stderr
    small(needed)
    assert run(*commands["apply"]).exit_code == 0
    made = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert made - (tmp_path / "out" / "README.md").stat().st_size == needed
    assert needed > 12_000  # what is copied counts


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in SURE])
def test_a_vector_that_may_fit_is_tried(verb: str, commands, small, tmp_path: Path):
    small(200)
    told = run(*commands[verb], "--dry-run")
    assert told.exit_code == 0 and "the output may not fit: it takes at most" in told.stderr
    assert "free    200 B on the disk of the output, for at most" in told.stderr
    told = run(*commands[verb])
    assert told.exit_code == 0 and "warning" not in told.stderr.replace("rounding", "")
    assert "free    200 B" in told.stderr
    assert (tmp_path / "out.safetensors").stat().st_size > 200


def test_a_page_takes_what_is_said_at_least(commands, tmp_path: Path):
    assert run(*commands["norms"]).exit_code == 0
    assert (tmp_path / "r" / "report.html").stat().st_size > page.LEAST_NBYTES


@pytest.mark.parametrize("codec", ["auto", "dense", "sparse", "packed"])
def test_the_most_that_a_vector_takes_is_the_most(codec: str, inputs: Path, tmp_path: Path):
    for side, name in (("tuned", "one"), ("target", "two")):  # few changes, many
        words = ("diff", inputs / side, inputs / "base", "--codec", codec, "-o")
        said = json.loads(run(*words, tmp_path / "x.safetensors", "--dry-run", "--json").stdout)
        assert run(*words, out := tmp_path / f"{name}.safetensors").exit_code == 0
        assert out.stat().st_size <= said["nbytes_written"]


def test_the_most_that_a_patch_takes_is_the_most(commands, tmp_path: Path):
    said = json.loads(run(*commands["export-patch"], "--dry-run", "--json").stdout)
    assert run(*commands["export-patch"]).exit_code == 0
    assert (tmp_path / "out.safetensors").stat().st_size <= said["nbytes_written"]


def test_what_is_replaced_takes_its_room_to_the_end(commands, small, tmp_path: Path):
    assert run(*commands["apply"]).exit_code == 0
    small(9_000)
    told = run(*commands["apply"], "--force")
    assert told.exit_code == 1 and "what is replaced goes last" in told.stderr


def test_what_an_interrupted_run_has_taken_is_free_for_the_next(
    commands, small, inputs: Path, tmp_path: Path, monkeypatch
):
    needed = json.loads(run(*commands["apply"], "--dry-run", "--json").stdout)["nbytes_written"]
    stage = tmp_path / ".out.skillvec-unfinished"
    (stage / "made").mkdir(parents=True)
    (stage / "made" / "model-00001-of-00003.safetensors").write_bytes(b"x" * needed)
    small(9_000)
    assert run(*commands["apply"], "--dry-run").exit_code == 0
    (stage / "made").rename(stage / "replaced")  # an old output, which may come back
    assert run(*commands["apply"], "--dry-run").exit_code == 1


# ------------------------------------------------------------------------------ cannot be made


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_that_is_closed_is_refused_by_a_dry_run(
    verb: str, read_only: bool, commands, unread, monkeypatch, tmp_path: Path
):
    monkeypatch.setattr(os, "access", lambda *given, **options: False)
    flag = os.ST_RDONLY if read_only else 0
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_flag=flag, f_blocks=1))
    for more in (["--dry-run"], []):
        told = run(*commands[verb], *more)
        why = "Read-only file system" if read_only else "Permission denied"
        assert told.exit_code == 1 and f"nothing can be written to {tmp_path}: {why}" in " ".join(
            told.stderr.split()
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_or_a_folder_that_cannot_be_is_refused(verb: str, commands, unread, tmp_path: Path):
    words, at = commands[verb], commands[verb].index("-o") + 1
    suffix = Path(str(words[at])).suffix
    words[at] = tmp_path / ("x" * (250 - len(suffix)) + suffix)  # itself not too long
    shorter = tmp_path / ("x" * 200 + suffix)
    for more in (["--dry-run"], []):
        told = run(*words, *more)
        assert told.exit_code == 2 and "its name is too long" in told.stderr, told.output
        assert run(*words[:at], tmp_path / "no" / f"o{suffix}", *more).exit_code == 2
    assert run(*words[:at], shorter, "--dry-run").exit_code == 0
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ other machines


def test_what_goes_to_a_url_is_made_on_this_disk(inputs: Path, small, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/out"
    small(9_000)
    words = ("apply", inputs / "target", inputs / "v.safetensors", "-o", url)
    for more in (["--dry-run"], []):
        told = run(*words, *more)
        assert told.exit_code == 1 and f"on the disk of {tmp_path}" in told.stderr
    assert object_store.names(url) is None
    small(FREE)
    assert json.loads(run(*words, "--dry-run", "--json").stdout)["nbytes_free"] == FREE


def test_pull_needs_the_room_of_all_files(inputs: Path, small, monkeypatch, tmp_path: Path):
    with HubServer() as server:
        server.adopt(monkeypatch, tmp_path / "home")
        verbs.push(inputs / "v.safetensors", "user/skill")
        size = (inputs / "v.safetensors").stat().st_size
        small(size - 1)
        for dry_run in (True, False):
            with pytest.raises(OutputError, match=f"{size:,} bytes are needed"):
                verbs.pull("user/skill", tmp_path / "v.safetensors", dry_run=dry_run)
        small(size)
        told = run("pull", "user/skill", "-o", tmp_path / "v.safetensors", "--dry-run")
        assert told.exit_code == 0 and "on the disk of the output" in told.stderr
        verbs.pull("user/skill", tmp_path / "v.safetensors")
        with pytest.raises(UsageError, match="does not exist"):
            verbs.pull("user/skill", tmp_path / "no" / "v.safetensors", dry_run=True)
        small(0)  # of the cache some may be there in part: only said
        assert verbs.pull("user/skill", dry_run=True).now["nbytes_free"] == 0


def test_shards_that_are_streamed_need_room_too(small, monkeypatch, tmp_path: Path):
    target = save(tmp_path / "target", toy(3), shards=3)
    save(tmp_path / "tuned", perturbed(toy()))
    save(tmp_path / "base", toy())
    with HubServer() as server:
        server.add_repo("org/target", target)
        server.adopt(monkeypatch, tmp_path / "home")
        words = ("apply", "org/target", "--tuned", tmp_path / "tuned", "--base", tmp_path / "base")
        words = (*words, "-o", tmp_path / "out", "--stream")
        report = json.loads(run(*words, "--dry-run", "--json").stdout)
        needed = report["nbytes_written"] + report["stream"]["most_nbytes"]
        small(needed - 1)
        assert f"{needed:,} bytes are needed" in run(*words, "--dry-run").stderr
        small(needed)
        assert run(*words).exit_code == 0


def test_an_empty_name_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a path it would be the folder of the caller, which --force would replace."""
    base, tuned = save(tmp_path / "base", toy()), save(tmp_path / "tuned", perturbed(toy()))
    v = tmp_path / "v.safetensors"
    skillvec.diff(tuned, base, v)
    here = save(tmp_path / "here", toy())
    monkeypatch.chdir(here)
    before = {path.name: path.stat().st_ino for path in here.iterdir()}
    for words in (
        ["apply", base, v],
        ["norms", v],
        ["sweep", base, v, "--eval", "command: true {model}"],
    ):
        refused = run(*words, "-o", "", "--force")
        assert refused.exit_code == 2 and "an empty name" in refused.stderr, refused.output
    assert {path.name: path.stat().st_ino for path in here.iterdir()} == before
