"""Interrupted runs: what is kept, who may go on with it, and that the bytes are the same."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import from_bits, perturbed, save, toy
from hubserver import HubServer

import skillvec as sv
from skillvec.engine import runner, threads
from skillvec.engine.jobs.measure import MeasureJob
from skillvec.engine.plan import Plan
from skillvec.errors import FormatError, OutputError, SkillvecError, TransferError, UsageError
from skillvec.files import fingerprints, journal, rows

UNFINISHED = ".skillvec-unfinished"


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@cache
def models() -> tuple[dict[str, torch.Tensor], ...]:
    """Return base, tuned and target."""
    base = toy(layers=2) | {"long": from_bits(np.full(3 << 20, 0x3F80, np.uint16), "BF16")}
    tuned = perturbed(base, density=0.2)
    # -0: values that no difference restores
    tuned["small"], base["small"] = (
        from_bits(np.array(bits, np.uint16), "BF16")
        for bits in ([0x8000, 0x8000, 0x3F81], [0, 0x3F80, 0x3F80])
    )
    return base, tuned, perturbed(base, 3)


class Family:
    """Base, tuned and target, each of its own folder, and the verbs that are interrupted here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base, tuned, target = models()
        self.base, self.tuned = save(folder / "base", base), save(folder / "tuned", tuned)
        files = {"tokenizer.json": "{}", "notes.txt": "kept byte for byte\n"}
        self.target = save(folder / "target", target, shards=3, side_files=files)
        self.vector = folder / "skill.safetensors"
        sv.diff(self.tuned, self.base, self.vector)
        self.other = folder / "other.safetensors"
        sv.diff(self.target, self.base, self.other)

    def run(self, verb: str, output: Path, **options: Any) -> None:
        options = {"engine": "serial"} | options
        if verb == "shards":
            options |= {"codec": "sparse", "max_shard_size": "100KB"}
        if verb in ("diff", "shards"):
            sv.diff(self.tuned, self.base, output, **options)
        elif verb == "combine":
            sv.combine(self.vector, self.other, op="ties", output=output, **options)
        elif verb == "export":
            sv.export_patch(self.vector, output, **options)
        elif verb == "exact":  # replacements come back
            sv.apply(self.base, self.vector, output, **options)
        else:
            sv.apply(self.target, self.vector, output, **{"lam": 0.7} | options)


OUTPUT = {
    "diff": "v.safetensors", "shards": "v.safetensors", "combine": "c.safetensors",
    "export": "p.safetensors", "exact": "out", "apply": "out",
}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def undisturbed(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    for verb, name in OUTPUT.items():
        output = folder / verb / name
        output.parent.mkdir()
        family.run(verb, output)
        found[verb] = contents(output)
    return found


class Interrupted(Exception):  # noqa: N818
    """As a killed process, but for the process."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every block be a moment at which the journal is written."""
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)


@pytest.fixture
def jobs_run() -> Iterator[list[str]]:
    """Yield a list that takes the names of the jobs that run."""
    seen: list[str] = []

    def noted(plan: Plan, number: int, index: int, is_again: bool) -> None:
        if index == 0 and not is_again and not isinstance(plan.jobs[number], MeasureJob):
            seen.append(plan.jobs[number].name)

    with threads.on_block(noted):
        yield seen


def stop_at(name: str, error: BaseException) -> AbstractContextManager[None]:
    """Make runs fail when they come to a tensor."""

    def failing(plan: Plan, number: int, *rest: Any) -> None:
        if plan.jobs[number].name == name and not isinstance(plan.jobs[number], MeasureJob):
            raise error

    return threads.on_block(failing)


def unfinished(output: Path) -> Path:
    return output.parent / f".{output.name}{UNFINISHED}"


def interrupted(
    family: Family, verb: str, output: Path, error: BaseException | None = None, **options: Any
) -> BaseException:
    """Run a verb to somewhere behind its middle; return the error."""
    made = error or OutputError(f"{output}: the disk is full; nothing was published")
    where = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(type(made)) as caught, stop_at(where, made):
        family.run(verb, output, **options)
    return caught.value


@pytest.mark.parametrize("verb", list(OUTPUT))
def test_the_same_command_goes_on_and_gives_the_same_bytes(
    verb: str, family: Family, undisturbed, tmp_path: Path, at_once, jobs_run
):
    output = tmp_path / OUTPUT[verb]
    error = interrupted(family, verb, output)
    assert not output.exists()
    assert f"kept in {unfinished(output)}: the same command goes on from it" in str(error)
    first = list(jobs_run)
    jobs_run.clear()
    family.run(verb, output)
    assert contents(output) == undisturbed[verb]
    assert os.listdir(tmp_path) == [output.name]
    again = [name for name in first if name in jobs_run]
    assert len(first) > 3 and len(again) <= 1, again  # the last was perhaps not yet claimed


def test_a_report_is_the_same_after_an_interruption(family: Family, tmp_path: Path, at_once):
    whole = sv.apply(family.target, family.vector, tmp_path / "whole", lam=0.7).to_dict()
    interrupted(family, "apply", tmp_path / "out", Interrupted())
    report = sv.apply(family.target, family.vector, tmp_path / "out", lam=0.7).to_dict()
    assert report.pop("output") != whole.pop("output")
    assert report.pop("resumed") > 10 and report == whole
    said = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert said[0] == said[1]


def test_with_threads_as_well(family: Family, undisturbed, tmp_path: Path, at_once):
    for verb in ("shards", "apply"):
        output = tmp_path / verb / OUTPUT[verb]
        output.parent.mkdir()
        for _ in range(2):
            interrupted(family, verb, output, engine="threads", workers=3)
        family.run(verb, output, engine="threads", workers=2)
        assert contents(output) == undisturbed[verb]


def test_a_tensor_whose_turn_never_came_is_not_claimed(family: Family, tmp_path: Path, monkeypatch):
    """When a run has failed, those that wait go on without having written: that is not done."""
    waiting, noted = threading.Event(), []
    turn = rows.Turns.turn

    @contextmanager
    def counted(turns: rows.Turns, number: int, *count: int) -> Iterator[bool]:
        if number:
            waiting.set()
        with turn(turns, number, *count) as mine:
            yield mine

    def failing(plan: Plan, number: int, *rest: Any) -> None:
        if number == 0:
            assert waiting.wait(10)
            raise OutputError("full")

    monkeypatch.setattr(threads, "BATCH_JOBS", 1)
    monkeypatch.setattr(rows.Turns, "turn", counted)
    monkeypatch.setattr(runner._Claims, "note", lambda claims, *result: noted.append(result))
    with pytest.raises(OutputError, match="full"), threads.on_block(failing):
        family.run("diff", tmp_path / "v.safetensors", engine="threads", workers=2)
    assert noted == []


def test_a_run_of_moments_leaves_nothing_behind(family: Family, tmp_path: Path):
    """Nothing was claimed, so there is nothing to keep."""
    error = interrupted(family, "diff", tmp_path / "v.safetensors")
    assert os.listdir(tmp_path) == [] and "kept" not in str(error)


@pytest.mark.parametrize("error", [FormatError("broken"), sv.errors.IncompatibleError("unlike")])
def test_what_fails_again_anyway_leaves_nothing(
    error: SkillvecError, family: Family, tmp_path: Path, at_once
):
    caught = interrupted(family, "diff", tmp_path / "v.safetensors", error)
    assert os.listdir(tmp_path) == [] and "kept" not in str(caught)


@pytest.mark.parametrize("error", [UsageError("credentials"), TransferError("try again")])
def test_what_may_pass_keeps_what_is_done(
    error: SkillvecError, family: Family, undisturbed, tmp_path: Path, at_once
):
    output = tmp_path / "v.safetensors"
    assert "goes on from it" in str(interrupted(family, "diff", output, error))
    family.run("diff", output)
    assert contents(output) == undisturbed["diff"]


def test_a_command_without_a_journal_leaves_the_work_of_another(
    family: Family, undisturbed, tmp_path: Path, at_once
):
    interrupted(family, "apply", tmp_path / "out")
    with pytest.raises(UsageError, match="of another command") as caught:
        sv.norms(family.vector, output=tmp_path / "out")
    assert "goes on from it" not in str(caught.value)
    family.run("apply", tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed["apply"]


def test_ctrl_c_keeps_what_is_done(family: Family, undisturbed, tmp_path: Path, at_once):
    output = tmp_path / "out"
    error = interrupted(family, "apply", output, KeyboardInterrupt())
    assert str(error).startswith("nothing was published; what is done is kept in")
    family.run("apply", output)
    assert contents(output) == undisturbed["apply"]


# ------------------------------------------------------------------------------------- refused


def test_lines_of_another_form_are_refused(
    family: Family, tmp_path: Path, at_once, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "v.safetensors"
    with monkeypatch.context() as earlier:
        earlier.setattr(journal, "FORM", 1)
        interrupted(family, "diff", output)
    with pytest.raises(UsageError, match="form of the journal: 1 then, 2 now"):
        family.run("diff", output)


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("apply", {"lam": 0.5}, "lam: 0.7 then, 0.5 now"),
        ("apply", {"dtype": "fp32"}, '  dtype: null then, "fp32" now'),
        ("apply", {"exclude": ["long"]}, "  exclude: "),
        ("diff", {"codec": "dense"}, 'codec: "auto" then, "dense" now'),
        ("diff", {"max_shard_size": "1MB"}, "max_shard_size: 5000000000 then, 1000000 now"),
        ("diff", {"stream": True}, "stream: false then, true now"),
        ("diff", {"notes": "mine"}, 'training.notes: null then, "mine" now'),
    ],
)
def test_another_command_is_refused_and_says_what_differs(
    verb: str, options: dict, said: str, family: Family, undisturbed, tmp_path: Path, at_once,
):  # fmt: skip
    output = tmp_path / OUTPUT[verb]
    interrupted(family, verb, output)
    before = contents(unfinished(output))
    with pytest.raises(UsageError, match="of another command") as caught:
        family.run(verb, output, **options)
    assert said in str(caught.value) and "delete the folder" in str(caught.value)
    after = contents(unfinished(output))
    assert before == after and "journal" in after
    family.run(verb, output)  # the first command still goes on
    assert contents(output) == undisturbed[verb]


def test_another_verb_with_the_same_output_is_refused(family: Family, tmp_path: Path, at_once):
    output = tmp_path / "v.safetensors"
    interrupted(family, "diff", output)
    with pytest.raises(UsageError, match=r'verb: "diff" then, "combine" now'):
        family.run("combine", output)
    shutil.rmtree(unfinished(output))
    family.run("combine", output)


def touched(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def lengthened(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(b"\0" * 8)


def rewritten(file: Path) -> None:
    """Another value in the middle, as if nobody had been here."""
    stat = os.stat(file)
    with open(file, "r+b") as opened:
        for at in range(8192, stat.st_size, 512):
            opened.seek(at)
            opened.write(b"!")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [touched, rewritten])
def test_inputs_that_have_changed_since_are_refused(
    change: Callable[[Path], None], tmp_path: Path, at_once
):
    family, output = Family(tmp_path / "mine"), tmp_path / "v.safetensors"
    interrupted(family, "diff", output)
    file = family.tuned / "model.safetensors"
    change(file)
    with pytest.raises(UsageError, match="inputs that have changed since") as caught:
        family.run("diff", output)
    what = "modification time" if change is touched else "content"
    assert f"{file}: another {what}" in str(caught.value)
    assert str(family.base) not in str(caught.value)
    shutil.rmtree(unfinished(output))
    family.run("diff", output)
    sv.verify(output)


# ----------------------------------------------------------------------- changed while it is read


@pytest.mark.parametrize("verb", ["diff", "apply", "verify", "orthogonality"])
@pytest.mark.parametrize("change", [touched, lengthened, rewritten])
def test_an_input_that_changes_while_it_is_read_is_noticed(
    change: Callable[[Path], None], verb: str, tmp_path: Path
):
    family = Family(tmp_path / "mine")
    file = family.base / "model.safetensors"
    names: list[str] = []

    def changing(plan: Plan, number: int, *rest: Any) -> None:
        if not names:
            change(file)
        names.append(plan.jobs[number].name)

    (tmp_path / "place").mkdir()
    output = tmp_path / "place" / "v.safetensors"
    error = pytest.raises(FormatError, match="changed while they were read")
    with error as caught, threads.on_block(changing):
        if verb == "verify":
            sv.verify(family.vector, tuned=family.tuned, base=family.base)
        elif verb == "orthogonality":
            sv.orthogonality(f"{family.tuned}::{family.base}", family.vector)
        elif verb == "apply":
            sv.apply(family.base, family.vector, tmp_path / "place" / "out")
        else:
            family.run("diff", output)
    assert str(file) in str(caught.value)
    assert len(names) > 1 and os.listdir(tmp_path / "place") == []


def test_a_file_replaced_after_its_header_was_read_is_noticed(tmp_path: Path):
    family = Family(tmp_path / "mine")
    vector = sv.diff(family.tuned, family.base)
    file = family.tuned / "model.safetensors"
    other = save(tmp_path / "other", perturbed(toy(layers=2), 9)) / "model.safetensors"
    os.replace(other, file)
    with pytest.raises(FormatError, match=r"model\.safetensors: changed since its header was read"):
        sv.apply(family.base, vector, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_open_model_whose_file_was_rewritten_is_refused(tmp_path: Path):
    """Also where someone has read the new header since, and knows of no change."""
    tensors = toy(layers=2)
    base, tuned = save(tmp_path / "base", tensors), save(tmp_path / "tuned", perturbed(tensors))
    vector = sv.diff(tuned, base, tmp_path / "v.safetensors")
    point, lazy = sv.open_checkpoint(base), sv.diff(tuned, base)
    one, two = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    save(base, tensors | {one: tensors[two], two: tensors[one], "a": tensors[one].clone()})
    sv.inspect(base)
    said = r"base/model\.safetensors: changed since its header was read: open it again"
    for run in (
        lambda: sv.apply(point, vector, tmp_path / "out"),
        lambda: sv.diff(tuned, point, tmp_path / "w.safetensors"),
        lambda: sv.verify(tmp_path / "v.safetensors", tuned=tuned, base=point),
        lambda: sv.apply(tuned, lazy, tmp_path / "out"),
        lambda: sv.apply(tuned, 0.5 * lazy, tmp_path / "out"),
        lambda: lazy.save(tmp_path / "w.safetensors"),
        lambda: sv.norms(lazy),
    ):
        with pytest.raises(FormatError, match=said):
            run()
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned", "v.safetensors"]


def test_a_file_replaced_between_two_runs_is_read_anew(tmp_path: Path):
    """What was opened for the first run is not what the second one records."""
    family = Family(tmp_path / "mine")
    sv.diff(family.tuned, family.base)  # reads samples, and keeps the file open
    other = save(tmp_path / "other", perturbed(toy(layers=2), 9)) / "model.safetensors"
    for folder in (family.base, family.tuned):
        shutil.copyfile(other, folder / "new")
        os.replace(folder / "new", folder / "model.safetensors")
    sv.diff(family.tuned, family.base, tmp_path / "v.safetensors")
    report = sv.inspect(tmp_path / "v.safetensors", target=family.base)
    assert report.facts["verdict"] == "exact base"


# ------------------------------------------------------------------------- what lies in the folder


def test_a_journal_cut_anywhere_is_believed_as_far_as_it_is_whole(
    family: Family, undisturbed, tmp_path: Path, at_once, jobs_run
):
    family.run("apply", tmp_path / "whole")
    whole = len(jobs_run)
    interrupted(family, "apply", tmp_path / "out")
    kept = tmp_path / "kept"
    unfinished(tmp_path / "out").rename(kept)
    journal = (kept / "journal").read_bytes()
    lines = journal.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines]).tolist()

    def resumed(text: bytes) -> int:
        """Run with another journal; return the jobs that were taken over."""
        shutil.copytree(kept, unfinished(tmp_path / "out"))
        (unfinished(tmp_path / "out") / "journal").write_bytes(text)
        ran = len(jobs_run)
        family.run("apply", tmp_path / "out")
        assert contents(tmp_path / "out") == undisturbed["apply"]
        shutil.rmtree(tmp_path / "out")
        return whole - (len(jobs_run) - ran)

    assert resumed(journal) == len(lines) - 1
    # lines that are right, but not behind these
    assert resumed(b"".join([lines[0], lines[2], lines[1], *lines[3:]])) == 0
    assert resumed(b"".join(lines[1:])) == 0
    assert resumed(b"".join([*lines[:4], *lines[5:]])) == 3
    cuts = {0, 5, ends[0] - 1, ends[0], ends[0] + 1, ends[2] - 3, ends[2], len(journal) - 1}
    for cut in sorted(cuts):
        assert resumed(journal[:cut]) == max(sum(end <= cut for end in ends) - 1, 0), cut


@pytest.mark.parametrize("verb", ["apply", "diff", "shards", "export"])
def test_staged_bytes_are_not_believed_unread(
    verb: str, family: Family, undisturbed, tmp_path: Path, at_once
):
    output = tmp_path / OUTPUT[verb]
    interrupted(family, verb, output)
    made = unfinished(output) / "made"
    files = [f for f in (unfinished(output)).rglob("*") if f.name not in ("journal", "owner")]
    for file in files:
        if file.is_file() and file.stat().st_size:
            content = bytearray(file.read_bytes())
            content[::64] = bytes(b ^ 1 for b in content[::64])
            file.write_bytes(content)
    assert made.is_dir()
    if verb == "apply":  # done again
        family.run(verb, output)
        assert contents(output) == undisturbed[verb]
    else:
        with pytest.raises(
            FormatError,
            match="is not what the journal says, so all that was unfinished was removed",
        ):
            family.run(verb, output)
        assert os.listdir(tmp_path) == []
        family.run(verb, output)
        assert contents(output) == undisturbed[verb]


def test_a_run_killed_between_its_last_steps_starts_from_what_it_claimed(
    family: Family, undisturbed, tmp_path: Path, at_once, jobs_run, monkeypatch
):
    """The shards have their names and the index is written; a card lies beside the weights."""
    from skillvec.files.staging import Staging

    publish = Staging.publish

    def killed(stage: Staging, source: Path) -> None:
        raise Interrupted

    for verb in ("shards", "apply"):
        output = tmp_path / OUTPUT[verb]
        monkeypatch.setattr(Staging, "publish", killed)
        with pytest.raises(Interrupted):
            family.run(verb, output)
        monkeypatch.setattr(Staging, "publish", publish)
        ran = len(jobs_run)
        jobs_run.clear()
        family.run(verb, output)
        assert contents(output) == undisturbed[verb]
        assert len(jobs_run) <= 1 < ran
        jobs_run.clear()


def test_a_failed_rename_keeps_what_was_done(
    family: Family, undisturbed, tmp_path: Path, at_once, jobs_run, monkeypatch
):
    rename = os.rename

    def failing(source: Any, destination: Any, **options: Any) -> None:
        if os.path.basename(os.fspath(source)) == "made":
            raise OSError(28, "No space left on device")
        rename(source, destination, **options)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError, match="full"):
        family.run("apply", tmp_path / "out")
    monkeypatch.setattr(os, "rename", rename)
    jobs_run.clear()
    family.run("apply", tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed["apply"] and len(jobs_run) <= 1


def test_an_output_that_is_in_place_is_not_said_to_be_kept_or_missing(
    family: Family, undisturbed, tmp_path: Path, at_once, monkeypatch
):
    from skillvec.files import output_file, staging

    save(tmp_path / "out", toy(9))
    old, fsync = contents(tmp_path / "out"), output_file.fsync_path

    def failing(path: str) -> None:
        if path == str(tmp_path) and contents(tmp_path / "out") != old:
            raise OSError(5, "Input/output error")
        fsync(path)

    monkeypatch.setattr(staging, "fsync_path", failing)
    with pytest.raises(OutputError, match="whole and in place, but its name may not") as caught:
        family.run("apply", tmp_path / "out", force=True)
    assert "nothing was published" not in str(caught.value) and "goes on" not in str(caught.value)
    assert contents(tmp_path / "out") == undisturbed["apply"]
    # a power failure may bring the old name back: what it stood for has to be there
    assert contents(unfinished(tmp_path / "out") / "made") == old
    monkeypatch.setattr(staging, "fsync_path", fsync)
    family.run("apply", tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == undisturbed["apply"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_an_error_after_the_rename_says_that_the_output_is_there(
    error: BaseException, family: Family, undisturbed, tmp_path: Path, at_once, monkeypatch
):
    from skillvec.files.staging import Staging

    publish = Staging.publish

    def late(stage: Staging, source: Path) -> None:
        publish(stage, source)
        raise error

    monkeypatch.setattr(Staging, "publish", late)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(expected, match=r"out: whole and in place"):
        family.run("apply", tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed["apply"]
    assert os.listdir(tmp_path) == ["out"]


# --------------------------------------------------------------------------------- two at one place


HOLD = """
import sys, time
from pathlib import Path
from skillvec.files.staging import staging
with staging(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        yield process
        process.kill()


def test_the_second_run_is_told_who_is_at_work(family: Family, tmp_path: Path, holder):
    with pytest.raises(OutputError, match="another run is writing it") as caught:
        family.run("apply", tmp_path / "out")
    owner = json.loads((unfinished(tmp_path / "out") / "owner").read_text())
    assert owner["pid"] == holder.pid and owner["host"] == socket.gethostname()
    for said in (f"process {holder.pid} on {owner['host']}", f"since {owner['start']}"):
        assert said in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    family.run("apply", tmp_path / "out")  # the lock went with the process


def test_a_file_system_without_locks_is_refused_by_name(
    family: Family, tmp_path: Path, monkeypatch
):
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(OutputError, match="this file system has no locks"):
        family.run("apply", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fingerprints_see_any_kind_of_change(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 4096)
    before = fingerprints.fingerprints([str(file)])
    assert fingerprints.fingerprints([str(file)]) == before
    for change in (touched, lengthened, rewritten):
        change(file)
        with pytest.raises(FormatError, match="changed while they were read"):
            fingerprints.refuse_changed(before)
        before = fingerprints.fingerprints([str(file)])
    file.unlink()
    with pytest.raises(SkillvecError, match="cannot be read"):
        fingerprints.refuse_changed(before)


# ----------------------------------------------------------------------------------- from the Hub


@pytest.mark.parametrize("verb", ["diff", "apply"])
def test_a_streamed_run_fetches_only_the_shards_that_it_still_needs(
    verb: str, tmp_path: Path, at_once, jobs_run, monkeypatch
):
    base = toy(layers=4, width=64)
    save(tmp_path / "base", base, shards=4)
    save(tmp_path / "tuned", perturbed(base), shards=4)
    sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    output = tmp_path / "place" / OUTPUT[verb]
    output.parent.mkdir()

    def run() -> None:
        if verb == "apply":
            sv.apply("org/base", tmp_path / "v.safetensors", output, stream=True, engine="serial")
        else:
            sv.diff("org/tuned", "org/base", output, stream=True, engine="serial")

    with HubServer() as server:
        for name in ("base", "tuned"):
            server.add_repo(f"org/{name}", tmp_path / name)
        server.adopt(monkeypatch, tmp_path / "home")
        run()
        whole = contents(output)
        shutil.rmtree(output) if output.is_dir() else output.unlink()
        jobs_run.clear()
        last = sorted(base)[-1] if verb == "diff" else "model.layers.3.mlp.up_proj.weight"
        with pytest.raises(OutputError), stop_at(last, OutputError("full")):
            run()
        assert not (unfinished(output) / "shards").exists()
        (unfinished(output) / "shards").mkdir()  # as a killed run leaves it
        first, fetched = len(jobs_run), len(server.requests)
        jobs_run.clear()
        server.requests.clear()
        run()
        assert contents(output) == whole and os.listdir(output.parent) == [output.name]
        assert 0 < len(jobs_run) <= len(base) - first + 2 < len(base)
        assert len(server.requests) < fetched


def test_a_run_that_has_fetched_its_inputs_goes_on_from_the_cache(
    tmp_path: Path, at_once, jobs_run, monkeypatch
):
    base = toy(layers=2)
    save(tmp_path / "base", base, shards=2)
    save(tmp_path / "tuned", perturbed(base), shards=2)
    output = tmp_path / "v.safetensors"
    with HubServer() as server:
        for name in ("base", "tuned"):
            server.add_repo(f"org/{name}", tmp_path / name)
        server.adopt(monkeypatch, tmp_path / "home")
        stopped = stop_at("model.layers.1.mlp.up_proj.weight", OutputError("full"))
        with pytest.raises(OutputError, match="what is done is kept"), stopped:
            sv.diff("org/tuned", "org/base", output, engine="serial")
        first = len(jobs_run)
        report = sv.diff("org/tuned", "org/base", output, engine="serial").report
        assert report is not None and report.facts["resumed"] >= first - 1 > 3
        sv.verify(output)
