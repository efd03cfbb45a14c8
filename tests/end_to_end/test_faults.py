"""Faults: full disks, closed folders, killed runs, runs that meet; nothing looks finished early."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from families import from_bits, perturbed, save, toy

import skillvec
from conftest import Family
from skillvec.engine import outputs
from skillvec.engine.threads import on_block
from skillvec.errors import FormatError, OutputError, SkillvecError
from skillvec.files import output_file, rows

UNFINISHED = ".skillvec-unfinished"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a file (as ""), or of every file of a folder; {} for nothing."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """As the session's, of one layer: every tensor is a moment more, and no new kind of one."""
    folder = tmp_path_factory.mktemp("family")
    base = toy(layers=1)
    sides = {"base": base, "tuned": perturbed(base, density=0.2), "sft": perturbed(base, 2)}
    paths = {name: save(folder / name, tensors) for name, tensors in sides.items()}
    files = {"tokenizer.json": "{}", "notes.txt": "kept byte for byte\n"}
    target = save(folder / "target", perturbed(base, 3), shards=3, side_files=files)
    return Family(**paths, target=target)


@pytest.fixture(scope="module")
def vector(family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vector") / "skill.safetensors"
    skillvec.diff(family.tuned, family.base, path)
    return path


@pytest.fixture(scope="module")
def undisturbed(family, vector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What diff (to a file and to shards) and apply write when nothing goes wrong."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    for verb in OUTPUT:
        call(verb, folder / f"{verb}.safetensors", family, vector)
        found[verb] = contents(folder / f"{verb}.safetensors")
    assert len(found["diff"]) == 1 and len(found["shards"]) > 2
    return found


# diff as it is by default (packed), and to shards with bitmaps beside the values
OPTIONS = {"diff": {}, "shards": {"codec": "sparse", "max_shard_size": "6KB"}}
OUTPUT = {"diff": "v.safetensors", "shards": "v.safetensors", "apply": "out"}
VERBS = list(OUTPUT)


def call(verb: str, output: Path, family, vector, **options) -> None:
    if verb == "apply":
        skillvec.apply(family.target, vector, output, workers=1, **options)
    else:
        skillvec.diff(family.tuned, family.base, output, workers=1, **OPTIONS[verb], **options)


@contextmanager
def seconds(limit: int) -> Iterator[None]:
    """Fail where the work inside takes longer: a hang, not a slow machine."""

    def stop(number: int, at: object) -> None:
        raise AssertionError(f"not done after {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit, 3)  # again, where clearing up hangs too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------ full disks

# What puts bytes or names on the disk, as (module, function).
WRITING = [(os, "mkdir"), (os, "posix_fallocate"), (os, "ftruncate"), (os, "pwrite"), (os, "fsync"),
           (os, "rename"), (shutil, "copyfile"), (Path, "write_text")]  # fmt: skip


def fail_at(monkeypatch, number: int, code: int) -> list[str]:
    """Make the call `number` (from 0) of all writing functions fail; return the calls seen."""
    seen: list[str] = []

    def failing(module, name):
        function = getattr(module, name)

        def wrapped(*arguments, **options):
            seen.append(name)
            if len(seen) - 1 == number:
                raise OSError(code, os.strerror(code))
            # a disk that really syncs proves nothing more here, and takes most of the time
            return None if name == "fsync" else function(*arguments, **options)

        return wrapped

    for module, name in WRITING:
        monkeypatch.setattr(module, name, failing(module, name))
    return seen


@pytest.mark.parametrize("old", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_full_at_any_moment_publishes_nothing(
    verb: str, old: bool, tmp_path: Path, family, vector, undisturbed
):
    """`old` is a model where apply writes, a file where shards go, shards where a file goes."""
    before: dict[str, bytes] = {}
    output = tmp_path / OUTPUT[verb]

    def make_old() -> None:
        if verb == "diff":
            call("shards", output, family, vector)
        else:
            save(output, toy(9))

    if old:
        make_old()
        before = contents(output)
    dtype = {"dtype": "fp32"} if verb == "apply" else {}  # a new size: the index is written anew
    failures: list[str] = []
    reached: set[str] = set()
    for number in range(300):
        with pytest.MonkeyPatch.context() as patch:
            seen, succeeded = fail_at(patch, number, 28), False
            try:
                call(verb, output, family, vector, force=old, **dtype)
                succeeded = True  # mkdir of a folder that is there already may fail
            except OutputError as error:
                told = "nothing was published" in str(error)
                if "full" not in str(error) or told != (contents(output) == before):
                    failures.append(f"{number} {seen[-1]}: message {error}")
            except OSError as error:
                failures.append(f"{number} {seen[number]}: {error!r} is no OutputError")
        if len(seen) <= number:
            break
        reached.add(seen[number])
        published = succeeded or (seen[number], len(seen)) == ("fsync", number + 1)
        if contents(output) != before and not published:
            failures.append(f"{number} {seen[number]}: the output was touched: {names(tmp_path)}")
        # its name may be lost with the power: what it replaced has to be there then
        stays = old and not succeeded and contents(output) != before
        if stays != (names(tmp_path) != [OUTPUT[verb]] and names(tmp_path) != []):
            failures.append(f"{number} {seen[number]}: left {names(tmp_path)}")
        if contents(output) != before:  # start every turn from the same state
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
            if old:
                make_old()
    else:
        raise AssertionError("there are more calls than were tried")
    assert {"mkdir", "posix_fallocate", "pwrite", "fsync"} <= reached
    assert "ftruncate" in reached or verb == "apply"
    assert "write_text" in reached or verb == "diff"
    assert "rename" in reached or (old and verb != "shards")  # exchanged in one step instead
    assert not failures, "\n".join(failures)
    if verb != "apply":
        assert contents(output) == undisturbed[verb]


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "skillvec-test", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, timeout=20)
    except OSError:
        made = None
    if made is None or made.returncode:
        pytest.skip("may not mount here; the same is covered with a patched disk above")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=2m")


@pytest.fixture(scope="module")
def large_family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of 5 MB a model: more than the small disk."""
    folder = tmp_path_factory.mktemp("large")
    base = toy(0, width=256, vocabulary=4000)
    return save(folder / "base", base), save(folder / "tuned", perturbed(base))


def test_a_disk_that_is_really_full(small_disk: Path, large_family):
    base, tuned = large_family
    command = [sys.executable, "-m", "skillvec"]
    pair = ["apply", base, "--tuned", tuned, "--base", base]
    for arguments, said in (
        (["diff", tuned, base, "-o", small_disk / "v.safetensors"], "the disk is full"),
        (["diff", tuned, base, "-o", small_disk / "v.safetensors", "--max-shard-size", "400kB"],
         "the disk is full"),
        ([*pair, "-o", small_disk / "out"], "does not fit"),  # known before
    ):  # fmt: skip
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert said in done.stderr and "Traceback" not in done.stderr
        assert names(small_disk) == []


def test_a_disk_that_the_side_files_fill(
    small_disk: Path, tmp_path: Path, family, monkeypatch: pytest.MonkeyPatch
):
    target = save(
        tmp_path / "target", toy(3, layers=1), side_files={"tokenizer.json": b"x" * (3 << 20)}
    )
    vector = skillvec.diff(family.tuned, family.base)
    with pytest.raises(OutputError, match="does not fit"):
        skillvec.apply(target, vector, small_disk / "out")
    assert names(small_disk) == []
    monkeypatch.setattr(outputs, "free_nbytes", lambda folder: None)  # as of a disk that says none
    with pytest.raises(OutputError, match=r"tokenizer\.json.*full"):
        skillvec.apply(target, vector, small_disk / "out")
    assert names(small_disk) == []


# ---------------------------------------------------------------------------------- no permission


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path, family):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(SkillvecError, match="file"):
        skillvec.diff(family.tuned, family.base, tmp_path / "file" / "v.safetensors")
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("code", [13, 30, 5])  # EACCES, EROFS, EIO
def test_what_the_system_refuses_is_an_output_error(
    verb: str, code: int, tmp_path: Path, family, vector, monkeypatch
):
    fail_at(monkeypatch, 0, code)
    with pytest.raises(OutputError, match=os.strerror(code)):
        call(verb, tmp_path / OUTPUT[verb], family, vector)
    monkeypatch.undo()
    assert names(tmp_path) == []


# Everything is imported by a first run; then root is given up, for root may write anywhere.
UNPRIVILEGED = """
import os, sys
from skillvec.cli import main
tuned, base, open_folder, closed_folder, unreadable = sys.argv[1:]
def run(*arguments):
    try:
        main(list(arguments))
    except SystemExit as end:
        print("CODE", end.code, flush=True)
run("diff", tuned, base, "-o", open_folder + "/warm.safetensors", "-q")
run("apply", base, "--tuned", tuned, "--base", base, "-o", open_folder + "/warm", "-q")
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
run("diff", tuned, base, "-o", closed_folder + "/v.safetensors", "-q")
run("apply", base, "--tuned", tuned, "--base", base, "-o", closed_folder + "/out", "-q")
run("diff", unreadable, base, "-o", open_folder + "/v.safetensors", "-q")
run("apply", base, "--tuned", tuned, "--base", base, "-o", open_folder + "/out", "-q")
"""


def test_no_permission_to_write_or_read(tmp_path: Path):
    # tmp_path is closed to others, so this needs a folder of its own.
    folder = Path(tempfile.mkdtemp(prefix="skillvec-test-"))
    try:
        folder.chmod(0o755)
        card = {"README.md": "Mine, and not to be written."}
        base = save(folder / "base", toy(), side_files=card)
        tuned = save(folder / "tuned", perturbed(toy()))
        unreadable = save(folder / "unreadable", perturbed(toy()))
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0o555)
        for model in (base, tuned, unreadable):
            for file in (model, *model.iterdir()):
                file.chmod(0o755 if file.is_dir() else 0o644)
        (unreadable / "model.safetensors").chmod(0)
        (base / "README.md").chmod(0o444)
        places = map(str, (tuned, base, folder / "open", folder / "closed", unreadable))
        done = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, *places],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.count("CODE 1") == 3 and done.stdout.count("CODE 0") == 3, done
        assert done.stderr.count("Permission denied") == 3 and "Traceback" not in done.stderr
        assert str(unreadable / "model.safetensors") in done.stderr
        assert names(folder / "closed") == [] and names(folder / "open") == [
            "out",
            "warm",
            "warm.safetensors",
        ]
    finally:
        shutil.rmtree(folder)


# ----------------------------------------------------------------------------- signals

# Stops for a moment at every write, and says on stdout when the given one is reached.
SLOW = """
import os, sys, time
from skillvec.engine import threads
from skillvec.files.output_file import OutputFile
threads.BATCH_JOBS = 1  # or these small models are written in one go
announced, write, seen = int(sys.argv[1]), OutputFile.write, []
def slow(self, *arguments):
    seen.append(None)
    if len(seen) == announced:
        os.write(1, b"middle\\n")
    time.sleep(0.15 if len(seen) >= announced else 0)
    write(self, *arguments)
OutputFile.write = slow
from skillvec.cli import main
main(sys.argv[2:])
"""


def command_line(verb: str, output: Path, family, vector) -> list[str]:
    if verb == "apply":
        return [verb, str(family.target), str(vector), "-o", str(output), "--workers", "1"]
    words = ["diff", str(family.tuned), str(family.base), "-o", str(output), "--workers", "2"]
    for key, value in OPTIONS[verb].items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def start_and_wait_for_the_middle(arguments: list[str], announced: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(announced), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "middle\n", process.communicate()
    return process


@pytest.mark.parametrize(("verb", "announced"), [("diff", 4), ("shards", 7), ("apply", 9)])
def test_ctrl_c_in_the_middle_leaves_nothing(
    verb: str, announced: int, tmp_path: Path, family, vector
):
    output = tmp_path / OUTPUT[verb]
    process = start_and_wait_for_the_middle(command_line(verb, output, family, vector), announced)
    assert names(tmp_path) == [f".{output.name}{UNFINISHED}"]
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted; nothing was published" in talk and "Traceback" not in talk
    assert names(tmp_path) == []


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_between_the_start_of_two_threads_leaves_nobody_at_work(
    verb: str, tmp_path: Path, family, vector, monkeypatch
):
    start, write, started = threading.Thread.start, output_file.OutputFile.write, []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        if len(started) == 2:
            raise KeyboardInterrupt

    def slow(*arguments: object) -> None:
        time.sleep(0.02)
        write(*arguments)

    monkeypatch.setattr(output_file.OutputFile, "write", slow)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with seconds(60), pytest.raises(KeyboardInterrupt):
        if verb == "apply":
            skillvec.apply(family.target, vector, tmp_path / "out", workers=3)
        else:
            output = tmp_path / OUTPUT[verb]
            skillvec.diff(family.tuned, family.base, output, workers=3, **OPTIONS[verb])
    assert names(tmp_path) == []
    assert len(started) == 2 and not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize(
    ("verb", "kill"), [*((verb, signal.SIGKILL) for verb in VERBS), ("shards", signal.SIGTERM)]
)
def test_a_killed_run_is_recognisably_unfinished_and_the_next_one_clears_it(
    verb: str, kill: signal.Signals, tmp_path: Path, family, vector, undisturbed
):
    output = tmp_path / OUTPUT[verb]
    process = start_and_wait_for_the_middle(command_line(verb, output, family, vector), 5)
    process.send_signal(kill)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not output.exists()
    if kill is signal.SIGKILL:  # a polite signal may be answered by clearing up at once
        assert names(tmp_path) == [f".{output.name}{UNFINISHED}"]
    call(verb, output, family, vector)
    assert contents(output) == undisturbed[verb]
    assert names(tmp_path) == [output.name]


def test_an_old_output_survives_a_killed_forced_run(tmp_path: Path, family, vector, undisturbed):
    output = save(tmp_path / "out", toy(9))
    before = contents(output)
    arguments = [*command_line("apply", output, family, vector), "--force"]
    process = start_and_wait_for_the_middle(arguments, 6)
    process.kill()
    process.communicate(timeout=30)
    assert contents(output) == before
    call("apply", output, family, vector, force=True)
    assert contents(output) == undisturbed["apply"]
    assert names(tmp_path) == ["out"]


def test_a_second_run_is_refused_while_the_first_one_works(
    tmp_path: Path, family, vector, undisturbed
):
    arguments = command_line("apply", tmp_path / "out", family, vector)
    first = start_and_wait_for_the_middle(arguments, 3)
    with pytest.raises(OutputError, match="another run is writing it"):
        call("apply", tmp_path / "out", family, vector)
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert contents(tmp_path / "out") == undisturbed["apply"]
    assert names(tmp_path) == ["out"]


# ------------------------------------------------------------ every moment a run can die at

# Forks a child for every k that kills itself, as kill -9 would, at its k-th change of the disk. The
# parent imports once; no thread runs while it forks.
EVERY_MOMENT = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from skillvec import verbs
request = json.loads(sys.argv[1])
output, old = Path(request["output"]), request["old"]

def state():
    if not os.path.lexists(output):
        return None
    files = [output] if output.is_file() else sorted(p for p in output.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(output)).encode() + b"\\0" + file.read_bytes())
    return digest.hexdigest()

def clean():
    for entry in output.parent.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if old:
        (shutil.copytree if os.path.isdir(old) else shutil.copyfile)(old, output)

def run(force):
    options = {"workers": 1, "force": force} | request["options"]
    if request["verb"] == "apply":
        verbs.apply(request["target"], request["vector"], output, **options)
    else:
        verbs.diff(request["tuned"], request["base"], output, **options)

def dying(function, seen, moment):
    def wrapped(*arguments, **options):
        seen.append(function.__name__)
        if len(seen) - 1 == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped

def child(moment):
    seen = []
    for name in ("mkdir", "posix_fallocate", "pwrite", "fsync", "rename", "unlink", "rmdir",
                 "close", "ftruncate"):
        setattr(os, name, dying(getattr(os, name), seen, moment))
    shutil.copyfile = dying(shutil.copyfile, seen, moment)
    Path.write_text = dying(Path.write_text, seen, moment)
    run(force=bool(old))

os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote
os.fsync.__name__ = "fsync"
clean()
result = {"old": state(), "moments": []}
run(force=True)
result["new"] = state()
for moment in range(400):
    clean()
    pid = os.fork()
    if not pid:
        try:
            child(moment)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    after, left = state(), sorted(os.listdir(output.parent))
    try:
        run(force=True)
        again = state()
    except Exception as error:
        again = repr(error)
    result["moments"].append([status, after, left, again, sorted(os.listdir(output.parent))])
    if not status:
        break
print(json.dumps(result))
"""


@pytest.mark.parametrize("old", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("verb", VERBS)
def test_a_run_may_be_killed_at_every_single_moment(verb: str, old: bool, tmp_path: Path):
    """`old` is a model where apply writes, a file where shards go, shards where a file goes."""
    (tmp_path / "place").mkdir()
    options = {"codec": "sparse", "max_shard_size": 1} if verb == "shards" else {}
    few = dict(list(toy().items())[:3])  # every tensor is a moment more, and no new kind of one
    base, tuned = save(tmp_path / "base", few), save(tmp_path / "tuned", perturbed(few))
    target = save(tmp_path / "target", perturbed(few, 3), shards=2, side_files={"notes.txt": "x"})
    vector = tmp_path / "vector.safetensors"
    skillvec.diff(tuned, base, vector)
    earlier: Path | None = None
    if old and verb != "apply":
        earlier = tmp_path / "earlier.safetensors"
        skillvec.diff(target, base, earlier, max_shard_size="4KB" if verb == "diff" else "5GB")
        assert earlier.is_dir() == (verb == "diff")
    elif old:
        earlier = save(tmp_path / "earlier", toy(9))
    request = {
        "verb": verb, "output": str(tmp_path / "place" / OUTPUT[verb]), "vector": str(vector),
        "tuned": str(tuned), "base": str(base), "target": str(target),
        "old": str(earlier) if earlier else None, "options": options,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", EVERY_MOMENT, json.dumps(request)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    moments = found["moments"]
    made = tmp_path / "place" / OUTPUT[verb]
    assert len(list(made.glob("vector-*"))) == (len(few) if verb == "shards" else 0)
    assert len(moments) > 12 and moments[-1][0] == 0  # the last child lived
    before, new, name = found["old"], found["new"], OUTPUT[verb]
    wrong = []
    for number, (status, after, left, again, left_again) in enumerate(moments):
        if status not in (0, signal.SIGKILL):
            wrong.append(f"{number}: ended with {status}: {done.stderr[-300:]}")
        if after not in (before, new):
            wrong.append(f"{number}: neither the old output nor the new one: {left}")
        if not set(left) <= {name, f".{name}{UNFINISHED}"}:
            wrong.append(f"{number}: left {left}")
        if again != new or left_again != [name]:
            wrong.append(f"{number}: the next run gave {again} and left {left_again}")
    assert not wrong, "\n".join(wrong)


# Several runs at once, many times over, in processes forked from one that has imported everything:
# it has made such a run itself.
RACE = """
import json, os, sys
from skillvec import SkillvecError, verbs
target, vector, place, rounds, force = sys.argv[1:]
codes, os.fsync = [], lambda descriptor: None
verbs.apply(target, vector, f"{place}/alone", workers=1)
for number in range(int(rounds)):
    children = []
    for _ in range(3):
        pid = os.fork()
        if not pid:
            try:
                verbs.apply(target, vector, f"{place}/{number}", workers=1, force=force == "True")
            except SkillvecError as error:
                os._exit(error.exit_code)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(9)
            os._exit(0)
        children.append(pid)
    codes.append(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
print(json.dumps(codes))
"""


@pytest.mark.parametrize("force", [False, True])
def test_runs_to_one_output_end_right_or_are_refused_and_never_mix(
    force: bool, tmp_path: Path, family, vector, undisturbed
):
    arguments = [str(family.target), str(vector), str(tmp_path), "8", str(force)]
    done = subprocess.run(
        [sys.executable, "-c", RACE, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout)
    for codes in rounds:
        assert set(codes) <= {0, 1, 2}, done.stderr
        assert codes.count(0) == 1 or (force and 0 in codes), codes
    assert names(tmp_path) == [*map(str, range(8)), "alone"]
    for number in range(8):
        assert contents(tmp_path / str(number)) == undisturbed["apply"]


# ---------------------------------------------------------------------- inputs that fail, workers


class Armed:
    """A watcher that does something when all is planned and nothing is read."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def planned(self, report: object) -> None:
        self._act()

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None: ...


BLOCKS = 6


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and tuned with a tensor of six blocks and some small ones, changed here and there."""
    folder = tmp_path_factory.mktemp("long")
    patterns = np.full(BLOCKS << 20, 0x3F80, np.uint16)
    base = {"long": from_bits(patterns, "BF16"), **toy()}
    patterns[:: 1 << 10] += 1
    tuned = {"long": from_bits(patterns, "BF16"), **perturbed(toy())}
    return save(folder / "base", base), save(folder / "tuned", tuned)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("codec", ["dense", "sparse", "packed"])
def test_an_input_cut_short_during_the_run_publishes_nothing(
    codec: str, workers: int, tmp_path: Path, long_pair
):
    """Whichever block was the first to miss bytes; and no hang."""
    base, file = long_pair[0], tmp_path / "tuned.safetensors"
    shutil.copyfile(long_pair[1] / "model.safetensors", file)
    size = file.stat().st_size // 2
    (tmp_path / "place").mkdir()
    with seconds(60), pytest.raises(FormatError, match=r"tuned\.safetensors: changed since"):
        skillvec.diff(
            file, base / "model.safetensors", tmp_path / "place" / "v.safetensors", codec=codec,
            max_shard_size="1MB", workers=workers, watcher=Armed(lambda: os.truncate(file, size)),
        )  # fmt: skip
    assert names(tmp_path / "place") == []


@pytest.mark.parametrize("verb", ["apply", "combine"])
def test_a_vector_cut_short_during_the_run_publishes_nothing(
    verb: str, tmp_path: Path, family, vector
):
    folder = tmp_path / "v.safetensors"
    skillvec.diff(family.tuned, family.base, folder, max_shard_size="4KB")
    file = sorted(folder.glob("*.safetensors"))[1]
    (tmp_path / "place").mkdir()
    watcher = Armed(lambda: os.truncate(file, file.stat().st_size - 400))
    with seconds(60), pytest.raises(FormatError, match=f"{file.name}: changed since"):
        if verb == "apply":
            skillvec.apply(family.base, folder, tmp_path / "place" / "out", watcher=watcher)
        else:
            skillvec.combine(folder, output=tmp_path / "place" / "x.safetensors", watcher=watcher)
    assert names(tmp_path / "place") == []


def test_an_input_that_cannot_be_read_is_not_called_an_output_that_cannot_be_written(
    tmp_path: Path, family, monkeypatch
):
    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    watcher = Armed(lambda: monkeypatch.setattr(os, "preadv", failing))
    with pytest.raises(SkillvecError, match=r"(tuned|base).*cannot be read") as caught:
        skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors", watcher=watcher)
    assert not isinstance(caught.value, OutputError) and "write" not in str(caught.value)
    assert names(tmp_path) == []


def test_an_error_of_one_worker_stops_the_others_and_is_the_one_raised(
    tmp_path: Path, family, monkeypatch
):
    read, seen = os.preadv, []

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        seen.append(offset)
        if len(seen) == 5:
            raise MemoryError("the fifth read")
        return read(descriptor, buffers, offset)

    watcher = Armed(lambda: monkeypatch.setattr(os, "preadv", failing))
    with seconds(60), pytest.raises(MemoryError, match="the fifth read"):
        skillvec.diff(
            family.tuned, family.base, tmp_path / "v.safetensors", workers=2, watcher=watcher
        )
    assert len(seen) < 2 * len(toy(layers=1))
    assert names(tmp_path) == []


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("where", ["read", "turn", "reserve", "write"])
def test_an_error_while_others_wait_for_their_turn_frees_them(
    where: str, workers: int, tmp_path: Path, long_pair, monkeypatch
):
    """The block whose turn it is fails, once all other workers stand in line behind it."""
    waiting, turn = set(), rows.Turns.turn
    armed = threading.Event()

    def fail_when_all_wait() -> None:
        in_worker = threading.current_thread() is not threading.main_thread()
        if armed.is_set() and in_worker:  # once: the error of the others would not be this one
            armed.clear()
            end = time.monotonic() + 10
            while len(waiting) < workers - 1 and time.monotonic() < end:
                time.sleep(0.01)
            assert len(waiting) >= workers - 1, "the others do not wait"
            raise OSError(5, "Input/output error")  # a full disk would be asked for less room

    @contextmanager
    def counted(self: rows.Turns, number: int, *count: int) -> Iterator[bool]:
        if number == 0 and where == "turn":
            fail_when_all_wait()
        if number:
            waiting.add(number)
        with turn(self, number, *count) as going:
            yield going

    def failing(function: Callable) -> Callable:
        def wrapped(*arguments: object) -> object:
            fail_when_all_wait()
            return function(*arguments)

        return wrapped

    monkeypatch.setattr(rows.Turns, "turn", counted)
    name = {"read": "preadv", "reserve": "posix_fallocate", "write": "pwrite"}.get(where)
    if name:
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    tuned, base = long_pair[1] / "model.safetensors", long_pair[0] / "model.safetensors"
    expected = SkillvecError if where == "read" else OutputError
    before = set(threading.enumerate())  # other tests' libraries may keep threads of their own
    with seconds(60), pytest.raises(expected, match="Input/output error"):
        skillvec.diff(
            tuned, base, tmp_path / "v.safetensors", codec="dense", workers=workers,
            watcher=Armed(armed.set),
        )  # fmt: skip
    assert names(tmp_path) == []
    assert set(threading.enumerate()) <= before  # nobody is left behind


def test_blocks_done_in_any_order_give_the_same_bytes(tmp_path: Path, long_pair):
    """Workers are late here and there: the turns, not the clock, decide where a block lies."""
    tuned, base = long_pair[1] / "model.safetensors", long_pair[0] / "model.safetensors"
    delays = iter(np.random.default_rng(1).random(1000).tolist())

    for codec, size in (("packed", "5GB"), ("sparse", "1MB")):
        options = {"codec": codec, "max_shard_size": size}
        skillvec.diff(tuned, base, tmp_path / f"{codec}0.safetensors", workers=1, **options)
        with seconds(60), on_block(lambda *block: time.sleep(next(delays) * 0.05)):
            skillvec.diff(tuned, base, tmp_path / f"{codec}1.safetensors", workers=5, **options)
        found = [contents(tmp_path / f"{codec}{number}.safetensors") for number in (0, 1)]
        assert found[0] == found[1]
