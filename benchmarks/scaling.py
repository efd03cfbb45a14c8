"""Measure what the engine `ray` costs a task, and how far more workers shorten a run.

Hides the cluster, the simulated store and the table. All on one machine: real raylets
(ray.cluster_utils), real batches, real files. Three parts:

- overhead: runs of tiny jobs, one and then many batches; the slope is what a batch costs, the rest
  what a run costs (the proof that all nodes see the same files). The connection is timed apart.
- scaling: two cores cannot show eight workers at work, so the work is made to wait as a large
  model does, for its files. `os.preadv`, through which every tensor is read, sleeps for each read
  as long as a store takes that gives every worker `--bandwidth` bytes a second after `--latency`
  seconds. That is a store whose bandwidth grows with its readers; one that is shared caps the sum.
  What is computed, written, placed and copied is real, on the cores that are there. Timed is the
  engine's run, not the planning, which one process does. The ideal line is the waiting alone,
  divided by the workers. Threads wait in the same way: the peer.
- pair: whole processes, threads against ray with two workers, on a pair of `--numel` bf16 values
  that the page cache holds: what the cluster adds where it can gain nothing.

Invariants: contenders run in turn within a round, medians are shown, workers are started before
anything but the connection is timed, every output has the bytes that threads make.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import family
from contenders import skillvec
from density import shapes
from measure import rounds
from run import PACKAGES, about, save, show

import skillvec as sv
from skillvec.engine import ray_cluster
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.plan import Plan
from skillvec.engine.run import choose_engine
from skillvec.engine.threads import Threads
from skillvec.files.header import read_header

WORKERS = (1, 2, 4, 8)
TINY, BATCHES = 200, ray_cluster.BATCHES
# tensors of a million values and a few small ones: what eight workers can share evenly
EVEN = family.Size(1024, 1024, 16, 8, 8, 1024, 1 << 40)
# in the workers, and here while threads run
STORE = """
import os, time
real, calls = os.preadv, []

def preadv(fd, buffers, offset):
    calls.append(sum(map(len, buffers)))
    time.sleep(calls[-1] / BANDWIDTH + LATENCY)
    return real(fd, buffers, offset)

os.preadv = preadv
"""


@dataclass(frozen=True)
class Row:
    """One line: `seconds` are one a round, `share` what the ideal time is of their median."""

    part: str
    who: str
    seconds: list[float] = field(default_factory=list)
    share: float | None = None

    def __str__(self) -> str:
        low, high = min(self.seconds), max(self.seconds)
        middle = statistics.median(self.seconds)
        text = f"{self.part:<16}{self.who:<32}{middle:9.4f}  ({low:.4f}-{high:.4f})"
        return text if self.share is None else f"{text}  {100 * self.share:4.0f} %"


@contextmanager
def cluster(nodes: int, cpus: int, hook: Path) -> Iterator[None]:
    """Run nodes whose Python processes begin with `hook`/sitecustomize.py; RAY_ADDRESS is set."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    least = 80 << 20  # of the object store
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": least}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            variables = {"PYTHONPATH": os.fspath(hook)}
            made.add_node(num_cpus=cpus, object_store_memory=least, env_vars=variables)
        os.environ["RAY_ADDRESS"] = made.address
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def tiny(folder: Path) -> Plan:
    """Return a plan of jobs that each read eight bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    file = folder / "tiny.safetensors"
    save_file({f"{number:04}": np.zeros(2, np.float32) for number in range(TINY)}, file)
    specs = read_header(file).tensors.values()
    return Plan("measure", [CopyJob(spec.name, spec.numel, point=spec) for spec in specs])


def timed(engine: Any, plan: Plan) -> float:
    began = time.perf_counter()
    engine.run(plan)
    return time.perf_counter() - began


def overhead(plan: Plan, number: int) -> Iterator[Row]:
    """Yield the costs of a run and of a batch, on a cluster of one worker at a time."""
    began = time.perf_counter()
    engine = choose_engine("ray", 1)
    connected = time.perf_counter() - began
    first = timed(engine, plan)
    yield Row("overhead", "connection", [connected])
    yield Row("overhead", "first run, workers start", [first])
    ray_cluster.BATCHES = TINY
    one = Plan("measure", plan.jobs[:1])
    runs, slopes, peer = [], [], []
    for _ in range(number):
        runs.append(timed(engine, one))
        slopes.append((timed(engine, plan) - runs[-1]) / (TINY - 1))
        peer.append(timed(Threads(1), plan) / TINY)
    ray_cluster.BATCHES = BATCHES
    yield Row("overhead", "ray, a run of one batch", runs)
    yield Row("overhead", "ray, one more batch", slopes)
    yield Row("overhead", "threads, one more tensor", peer)


class Scaling:
    """Runs of diff and apply from the simulated store."""

    def __init__(self, given: argparse.Namespace, members: Path, work: Path) -> None:
        self._given, self._members, self._work = given, members, work
        self._store: dict[str, Any] = {}
        real = os.preadv
        exec(store(given), self._store)
        self._slow, os.preadv = os.preadv, real
        self._real = real
        self._vector = work / "v.safetensors"
        sv.diff(members / "rl", members / "sft", self._vector, codec="dense", force=True)
        self._expected: dict[str, bytes] = {}
        self.ideal: dict[str, float] = {}

    def run(self, verb: str, engine: str, workers: int) -> float:
        """Return the seconds of an engine's run; RuntimeError where it writes other bytes."""
        out = self._work / {"diff": "diff.safetensors", "apply": "applied"}[verb]
        options: dict[str, Any] = {"engine": engine, "workers": workers, "force": True}
        self._store["calls"].clear()
        kind = ray_cluster.Cluster if engine == "ray" else Threads
        real, seconds = kind.run, 0.0

        def run(*arguments: Any, **given: Any) -> Any:
            nonlocal seconds
            os.preadv, began = self._slow, time.perf_counter()
            try:
                return real(*arguments, **given)
            finally:
                os.preadv, seconds = self._real, seconds + time.perf_counter() - began

        kind.run = run  # type: ignore[assignment, method-assign]
        try:
            if verb == "diff":
                sv.diff(self._members / "rl", self._members / "sft", out, codec="dense", **options)
            else:
                sv.apply(self._members / "target", self._vector, out, lam=0.7, **options)
        finally:
            kind.run = real  # type: ignore[method-assign]
        if calls := self._store["calls"]:
            waits = (nbytes / self._given.bandwidth + self._given.latency for nbytes in calls)
            self.ideal[verb] = sum(waits)
        files = [out] if out.is_file() else sorted(out.glob("*.safetensors"))
        content = b"".join(file.read_bytes() for file in files)
        if self._expected.setdefault(verb, content) != content:
            raise RuntimeError(f"{verb} by {engine} with {workers} workers wrote other bytes")
        return seconds

    def rows(self) -> Iterator[Row]:
        self.run("diff", "ray", max(WORKERS))  # starts the workers
        for verb in ("diff", "apply"):
            each: dict[tuple[str, int], list[float]] = {
                (engine, workers): [] for engine in ("threads", "ray") for workers in WORKERS
            }
            for turn in range(1, self._given.rounds + 1):
                for (engine, workers), seconds in each.items():
                    seconds.append(self.run(verb, engine, workers))
                print(f"{verb}, round {turn}", file=sys.stderr)
            for workers in WORKERS:
                yield Row(verb, f"ideal, {workers}", [self.ideal[verb] / workers], 1.0)
            for (engine, workers), seconds in each.items():
                share = self.ideal[verb] / workers / statistics.median(seconds)
                yield Row(verb, f"{engine}, {workers}", seconds, share)


def store(given: argparse.Namespace) -> str:
    """Return the source of the hook."""
    return f"BANDWIDTH, LATENCY = {given.bandwidth}, {given.latency}\n{STORE}"


def pair(given: argparse.Namespace, members: Path, work: Path) -> Iterator[Row]:
    """Yield whole processes on a pair in the page cache, in turn."""
    commands = {}
    for who in ("threads", "ray"):
        options = ["--engine", who, "--workers", "2"]
        out = work / f"pair-{who}.safetensors"
        commands[f"diff, {who}"] = skillvec(
            "diff", members / "rl", members / "sft", out=out, options=options
        )
    target = members / "target"
    vector = work / "vector.safetensors"
    sv.diff(members / "rl", members / "sft", vector, force=True)
    for who in ("threads", "ray"):
        options = ["--engine", who, "--workers", "2", "--lam", "0.7"]
        commands[f"apply, {who}"] = skillvec(
            "apply", target, vector, out=work / f"pair-{who}", options=options
        )
    for who, spent in rounds(commands, given.rounds, work).items():
        yield Row("pair", who, [each.seconds for each in spent])


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default="overhead,scaling,pair")
    parser.add_argument("--bandwidth", type=float, default=24e6, help="bytes a second, a worker")
    parser.add_argument("--latency", type=float, default=0.005, help="seconds a read")
    parser.add_argument("--numel", type=int, default=400_000_000, help="of the pair, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the results go")
    given = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    parts = given.parts.split(",")
    parent = family.folder("scaling")
    parent.mkdir(parents=True, exist_ok=True)
    facts = about(parent, (*PACKAGES, "ray"))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="work-", dir=parent) as name:
        work = Path(name)
        if "scaling" in parts:
            members = family.make(EVEN, parent / "even")
            hook = work / "hook"
            hook.mkdir()
            (hook / "sitecustomize.py").write_text(store(given))
            with cluster(len(WORKERS), max(WORKERS) // len(WORKERS), hook):
                rows += Scaling(given, members, work).rows()
        if {"overhead", "pair"} & set(parts):
            with cluster(2, 1, work / "none"):
                if "overhead" in parts:
                    rows[:0] = overhead(tiny(work), 3 * given.rounds)
                if "pair" in parts:
                    rows += pair(given, family.make(shapes(given.numel), parent / "pair"), work)
    heading = f"{'part':<16}{'who, workers':<32}{'seconds':>9}  {'(least-greatest)':<18}of ideal"
    show(facts, heading, rows, "part")
    save(given.json, given, facts, rows)


if __name__ == "__main__":
    main()
