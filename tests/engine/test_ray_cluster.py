"""The cluster: lost nodes and workers, nodes with other files, killed drivers, what Ray carries.

On real raylets of this machine. A `Victim` is one more node, in the workers of which something
happens: they read what from a file.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import perturbed, save, toy
from hubserver import HubServer
from objectserver import ObjectServer
from raycluster import add_node, cluster
from test_threads import Followed, assert_idle, contents

import skillvec as sv
from skillvec.engine import ray_cluster, ray_tasks, runner
from skillvec.errors import SkillvecError, UsageError
from skillvec.files.output_file import OutputFile

pytestmark = pytest.mark.ray

# In the workers of a victim: read the fault from a file and bring it about, most of them once.
SABOTAGE = """
import os, signal, sys, time
if any("default_worker" in word for word in sys.orig_argv):
    from pathlib import Path
    from skillvec.engine import ray_cluster, ray_tasks
    from skillvec.files import output_file
    folder = Path(__file__).parent

    def fault():
        return (folder / "fault").read_text()

    def strike(*pids):
        with (folder / "struck").open("a") as file:
            file.write(".")
        for pid in (*pids, os.getpid()):
            os.kill(pid, signal.SIGKILL)

    def wrapped(name, kind):
        real = getattr(output_file.OutputFile, name)

        def hooked(self, *arguments):
            real(self, *arguments)
            if fault() == f"node {kind}":
                strike(os.getppid())
            if fault() == f"worker {kind}" and not (folder / "struck").exists():
                strike()
            if fault() == f"always {kind}":
                strike()
            if fault() == f"slow {kind}":
                (folder / "struck").write_text(".")
                time.sleep(100)

        setattr(output_file.OutputFile, name, hooked)

    wrapped("write", "write")
    wrapped("copy", "copy")
    real = ray_cluster.fingerprints, ray_cluster.versions, ray_cluster.Path

    def elsewhere(paths):
        if fault() != "files":
            return real[0](paths)
        there = {path: path.replace("/world/", "/elsewhere/") for path in paths}
        found = real[0](there.values())
        return {path: found[other] for path, other in there.items()}

    def versions():
        if fault() == "node proof":
            strike(os.getppid())
        return real[1]() | ({"numpy": "1.0"} if fault() == "versions" else {})

    def path(first, *parts):
        if fault() == "staging" and parts:
            (folder / "staging").mkdir(exist_ok=True)
            (folder / "staging" / "driver").write_text("another")
            first = folder / "staging"
        if fault() == "one way" and parts != ("driver",):
            first = folder
        return real[2](first, *parts)

    ray_cluster.fingerprints, ray_cluster.versions, ray_cluster.Path = elsewhere, versions, path
"""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(number: int, at: object) -> None:
        raise AssertionError("not done after a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """An S3 server whose address the nodes know, because it is there before them."""
    with ObjectServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path_factory.mktemp("cache")))
        yield server


@pytest.fixture(scope="module")
def nodes(store: ObjectServer) -> Iterator[Any]:
    with cluster(3) as made:
        yield made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders base, tuned and target of 21 MB each, and what serial makes of them."""
    folder = tmp_path_factory.mktemp("made") / "world"
    base = toy(0, layers=6, width=768, vocabulary=2000)
    save(folder / "base", base, shards=3)
    save(folder / "tuned", perturbed(base, 1, density=0.3), shards=2)
    save(folder / "target", perturbed(base, 2), shards=3)
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors", engine="serial")
    sv.apply(folder / "target", folder / "v.safetensors", folder / "out", engine="serial")
    return folder


class Victim:
    """A node whose workers meet a fault."""

    def __init__(self, nodes: Any, folder: Path) -> None:
        self._nodes, self._folder = nodes, folder
        (folder / "sitecustomize.py").write_text(SABOTAGE)
        self.set("none")
        places = os.pathsep.join([os.fspath(folder), *os.environ.get("PYTHONPATH", "").split(":")])
        self.node = add_node(nodes, env_vars={"PYTHONPATH": places})

    def set(self, fault: str) -> None:
        (self._folder / "fault").write_text(fault)
        (self._folder / "struck").unlink(missing_ok=True)

    @property
    def struck(self) -> int:
        """How often it was hit."""
        return len(path.read_text()) if (path := self._folder / "struck").exists() else 0

    def remove(self) -> None:
        self._nodes.remove_node(self.node, allow_graceful=False)


@pytest.fixture
def mortal(nodes: Any, tmp_path: Path) -> Iterator[Victim]:
    """A victim for one test."""
    folder = tmp_path / "victim"
    folder.mkdir()
    victim = Victim(nodes, folder)
    yield victim
    victim.remove()


@pytest.fixture(scope="module")
def survivor(nodes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(nodes, tmp_path_factory.mktemp("victim"))
    yield victim
    victim.remove()


@pytest.fixture
def victim(survivor: Victim) -> Iterator[Victim]:
    """A victim that outlives its faults."""
    yield survivor
    survivor.set("none")


def run(verb: str, world: Path, out: Path, workers: int = 5, **options: Any) -> Path:
    """Run diff (to v.safetensors) or apply (to out) on the cluster; return what it has made."""
    options |= {"engine": "ray", "workers": workers}
    if verb == "diff":
        sv.diff(world / "tuned", world / "base", out / "v.safetensors", **options)
        return out / "v.safetensors"
    sv.apply(world / "target", world / "v.safetensors", out / "out", **options)
    return out / "out"


@pytest.mark.parametrize(
    ("verb", "fault"),
    [
        ("diff", "node write"),
        ("diff", "node copy"),
        ("apply", "node write"),
        ("diff", "node proof"),
    ],
)
def test_a_node_that_dies_in_the_middle_changes_no_byte(
    verb: str, fault: str, world: Path, mortal: Victim, tmp_path: Path
):
    mortal.set(fault)
    (tmp_path / "made").mkdir()
    out = run(verb, world, tmp_path / "made")
    assert mortal.struck
    assert contents(out) == contents(world / out.name)
    assert list((tmp_path / "made").iterdir()) == [out]


@pytest.mark.parametrize(
    ("verb", "fault"),
    [("diff", "worker write"), ("diff", "worker copy"), ("apply", "worker write")],
)
def test_a_worker_that_is_killed_changes_no_byte(
    verb: str, fault: str, world: Path, victim: Victim, tmp_path: Path
):
    victim.set(fault)
    out = run(verb, world, tmp_path)
    assert victim.struck == 1
    assert contents(out) == contents(world / out.name)


def test_a_batch_that_is_lost_every_time_is_an_error_that_names_it(
    world: Path, victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    victim.set("always write")
    monkeypatch.setattr(ray_cluster, "RETRIES", 0)
    with pytest.raises(
        SkillvecError, match=r"ray: tensors model\..* to .*: the worker or node was"
    ):
        run("apply", world, tmp_path)
    assert victim.struck and not list(tmp_path.iterdir())
    assert_idle()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("versions", "has numpy 1.0, the driver"),
        ("files", "model-00001-of-00002.safetensors is not the driver's file"),
        ("staging", "rows is not the driver's file"),
        ("one way", "does not come to the driver"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_nodes_that_see_something_else_are_refused_before_any_work(
    fault: str, words: str, late: bool, world: Path, victim: Victim, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """`late` is a node that joins after the others were looked at: its first task is refused."""
    if late and fault == "one way":
        pytest.skip("what it reads is the driver's: it is the same file system")
    victim.set(fault)
    elsewhere = world.parent / "elsewhere"
    if not elsewhere.exists():  # the same sizes and names, other values
        save(elsewhere / "base", toy(8, layers=6, width=768, vocabulary=2000), shards=3)
        save(elsewhere / "tuned", toy(9, layers=6, width=768, vocabulary=2000), shards=2)
    worked: list[Any] = []
    submit = ray_cluster._ClusterRun._submit

    def noted(self: Any, what: str, then: Any, options: Any, work: Any, *arguments: Any) -> None:
        worked.append(work)
        submit(self, what, then, options, work, *arguments)

    monkeypatch.setattr(ray_cluster._ClusterRun, "_submit", noted)
    if late:
        every = ray_cluster._nodes

        def others(ray: Any) -> list[dict[str, Any]]:
            return [node for node in every(ray) if node["NodeID"] != victim.node.node_id]

        monkeypatch.setattr(ray_cluster, "_nodes", others)
    with pytest.raises(UsageError, match=rf"node \S+ .*{words}"):
        run("diff", world, tmp_path)
    assert (ray_tasks.run_batch in worked) == late
    assert not list(tmp_path.iterdir())
    victim.set("none")
    run("diff", world, tmp_path)  # the process that has refused is asked again


def test_a_file_that_only_the_driver_sees_is_refused(world: Path, victim: Victim, tmp_path: Path):
    """Here: a path that leads nowhere on the other node."""
    victim.set("files")
    only = world / "only"
    if not only.exists():
        save(only, toy(3, layers=6, width=768, vocabulary=2000))
    with pytest.raises(
        UsageError, match=r"node \S+ .*cannot read what the driver reads.*No such file"
    ):
        sv.orthogonality(f"{only}::{world / 'base'}", world / "v.safetensors", engine="ray")


def test_tasks_in_flight_and_waiting_are_bounded_and_no_tensor_goes_through_ray(
    nodes: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ray import cloudpickle

    flights, open_batches, sizes, order = [], [], [], []
    real = ray_cluster._ClusterRun

    class Observed(real):  # type: ignore[misc, valid-type]
        def _collect(self) -> None:
            flights.append(sum(what != "the proof" for what, _ in self._flight.values()))
            open_batches.append(self._begun - self._ended)
            super()._collect()

        def _submit(self, what: str, then: Any, options: Any, work: Any, *arguments: Any) -> None:
            sizes.append(len(cloudpickle.dumps((work, arguments))))
            order.append("task")
            super()._submit(what, then, options, work, *arguments)

        def _value(self, reference: Any, what: str) -> Any:
            value = super()._value(reference, what)
            sizes.append(len(cloudpickle.dumps(value)))
            return value

    monkeypatch.setattr(ray_cluster, "_ClusterRun", Observed)
    monkeypatch.setattr(ray_cluster, "BATCHES", 10)
    monkeypatch.setattr(ray_cluster, "AHEAD", 1)
    hand_over = OutputFile.hand_over

    def noted(self: OutputFile) -> None:
        order.append(self.path)
        hand_over(self)

    monkeypatch.setattr(OutputFile, "hand_over", noted)
    for verb in ("diff", "apply"):
        out = run(verb, world, tmp_path, workers=2)
        assert contents(out) == contents(world / out.name)
        begin, end = order.index("task"), len(order) - order[::-1].index("task")
        assert set(order[:begin]) <= set(order[end:]) and begin >= 3  # nodes cache what they read
        order.clear()
    assert max(flights) == 2 and max(open_batches) == 2
    assert len(sizes) > 80 and max(sizes) < 30_000


DRIVER = """
import os, signal, sys
from pathlib import Path
import skillvec as sv
from skillvec.engine import ray_cluster, runner
runner.CLAIM_SECONDS, ray_cluster.BATCHES = 0.0, 10
verb, world, out = sys.argv[1], *map(Path, sys.argv[2:])

class Killed:
    def planned(self, report):
        pass
    def advanced(self, done_nbytes, total_nbytes):
        if any(path.stat().st_size for path in out.parent.glob(".*/journal")):
            os.kill(os.getpid(), signal.SIGKILL)

options = dict(engine="ray", workers=2, watcher=Killed())
if verb == "diff":
    sv.diff(world / "tuned", world / "base", out, **options)
else:
    sv.apply(world / "target", world / "v.safetensors", out, **options)
"""


@pytest.mark.parametrize("verb", ["diff", "apply"])
def test_a_driver_that_is_killed_is_resumed(
    verb: str, nodes: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / {"diff": "v.safetensors", "apply": "out"}[verb]
    command = [sys.executable, "-c", DRIVER, verb, world, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and list(tmp_path.glob(".*"))
    assert_idle()  # Ray ends the tasks of a driver that is gone
    watcher = Followed()
    assert run(verb, world, tmp_path, watcher=watcher) == out
    assert watcher.done[0][0] > 0  # begins where the other has ended
    assert contents(out) == contents(world / out.name)
    assert list(tmp_path.iterdir()) == [out]


def skillvec(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skillvec", *map(str, words)]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)


def test_the_command_line(world: Path, mortal: Victim, tmp_path: Path):
    """And a node that dies: of that nothing comes between the lines."""
    tmp_path = tmp_path / "made"
    tmp_path.mkdir()
    words = ["diff", world / "tuned", world / "base", "-o", tmp_path / "v.safetensors"]
    words += ["--engine", "ray", "--workers", 5, "--json"]
    dry = skillvec(*words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["engine"].startswith("ray, ") and not list(tmp_path.iterdir())
    mortal.set("node write")
    done = skillvec(*words)
    assert done.returncode == 0 and mortal.struck, done.stderr
    assert json.loads(done.stdout)["workers"] == 5
    assert not [word for word in ("raylet", "INFO", "WARN", "Ray ") if word in done.stderr]
    assert contents(tmp_path / "v.safetensors") == contents(world / "v.safetensors")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "local", "nonsense"])
def test_without_a_cluster_nothing_is_started(address: str, world: Path, tmp_path: Path):
    words = ["diff", world / "tuned", world / "base", "-o", tmp_path / "v.safetensors"]
    done = skillvec(*words, "--engine", "ray", RAY_ADDRESS=address)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: engine ray: no cluster can be reached: start one")
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_objects_are_read_by_ranges_on_every_node(
    store: ObjectServer, nodes: Any, world: Path, tmp_path: Path
):
    store.ask("PUT", "bucket")
    for side in ("tuned", "base"):
        files = sorted((world / side).iterdir())
        store.put(f"bucket/{side}", {file.name: file.read_bytes() for file in files})
    found = []
    for engine in ("serial", "ray"):
        out = tmp_path / engine / "v.safetensors"
        out.parent.mkdir()
        sv.diff("s3://bucket/tuned", "s3://bucket/base", out, engine=engine)
        found.append(contents(out))
    assert found[0] == found[1]


def test_what_an_interrupted_run_has_done_is_kept_and_nothing_else(
    nodes: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(ray_cluster, "BATCHES", 10)

    class Interrupting(Followed):
        def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
            if any(journal.stat().st_size for journal in tmp_path.glob(".*/journal")):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("diff", world, tmp_path, watcher=Interrupting())
    (stage,) = tmp_path.iterdir()
    assert (stage / "journal").exists() and not (stage / ray_tasks.SCRATCH).exists()
    (stage / ray_tasks.SCRATCH).mkdir()  # as a killed run leaves it
    (stage / ray_tasks.SCRATCH / "driver").write_text("of another run")
    assert contents(run("diff", world, tmp_path)) == contents(world / "v.safetensors")


def test_ctrl_c_ends_tasks_that_would_go_on_for_long(
    world: Path, victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    victim.set("slow write")
    monkeypatch.setattr(ray_cluster, "GRACE_SECONDS", 1.0)

    class Interrupting(Followed):
        def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
            if victim.struck:
                raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run("apply", world, tmp_path, watcher=Interrupting())
    assert not list(tmp_path.iterdir())
    assert_idle()
    assert time.monotonic() - began < 50


def test_an_input_that_was_replaced_between_two_runs_is_read_anew(
    nodes: Any, world: Path, tmp_path: Path
):
    """The workers live on between the runs of a driver."""
    for number, seed in enumerate((5, 6)):
        save(tmp_path / "tuned", toy(seed, layers=6, width=768, vocabulary=2000))
        found = []
        for engine in ("ray", "serial"):
            out = tmp_path / f"{engine}-{number}" / "v.safetensors"
            out.parent.mkdir()
            sv.diff(tmp_path / "tuned", world / "base", out, engine=engine)
            found.append(contents(out))
        assert found[0] == found[1]


@pytest.mark.parametrize("stream", [False, True])
def test_files_of_the_hub_come_to_the_driver(
    stream: bool, nodes: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with HubServer() as server:
        server.adopt(monkeypatch, tmp_path / "home")
        for side in ("base", "tuned"):
            server.add_repo(f"org/{side}", world / side)
        out = tmp_path / "made" / "v.safetensors"
        out.parent.mkdir()
        sv.diff("org/tuned", "org/base", out, stream=stream, engine="ray", workers=3)
        again = tmp_path / "again" / "v.safetensors"
        again.parent.mkdir()
        sv.diff("org/tuned", "org/base", again, engine="serial")
    assert contents(out) == contents(again)
