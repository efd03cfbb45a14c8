"""Streaming: what lies on the disk at each moment, the order of jobs, the bytes that result."""

import os
import shutil
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import perturbed, save, toy
from hubserver import HubServer
from hypothesis import given
from hypothesis import strategies as st

from skillvec.engine import streaming, threads
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.plan import JobResult, Plan
from skillvec.errors import FormatError, OutputError, SkillvecError
from skillvec.files.file import file_nbytes, local_path, remote_of
from skillvec.files.header import TensorSpec, read_header
from skillvec.files.rows import Segment
from skillvec.ops.block import BLOCK_NUMEL, block_count
from skillvec.ops.codecs import encode_block
from skillvec.ops.delta import EXCEPTION
from skillvec.remote import files as files_module
from skillvec.remote import hub
from skillvec.vectors.block_reader import REPLACEMENT
from skillvec.vectors.writer import Entry, VectorWriter, in_file_order

NEEDS = st.lists(st.frozensets(st.sampled_from("abcdefgh"), max_size=4), max_size=25)


def walk(needs: list, steps: list[streaming.Step], limit: int) -> int:
    """Follow the steps as the run does, check every one; return the most files on the disk."""
    disk: set[str] = set()
    most = 0
    for number, step in enumerate(steps):
        assert step.dropped <= disk
        disk -= step.dropped
        assert not step.fetched & disk
        disk |= step.fetched
        assert disk == step.files
        assert len(disk) <= max(limit, *(len(set(needs[job])) for job in step.jobs))
        most = max(most, len(disk))
        for job in step.jobs:
            assert set(needs[job]) <= disk
        disk -= step.done
        later = [file for s in steps[number + 1 :] for job in s.jobs for file in needs[job]]
        assert disk <= set(later)  # what no later step needs is gone at once
    assert not disk
    assert sorted(job for step in steps for job in step.jobs) == list(range(len(needs)))
    return most


@given(NEEDS, st.integers(1, 4))
def test_steps_do_every_job_once_within_the_limit(needs: list, limit: int):
    steps = streaming.steps(needs, limit)
    walk(needs, steps, limit)
    assert steps == streaming.steps(needs, limit)
    if all(len(files) <= 1 for files in needs):
        assert sum(len(step.fetched) for step in steps) == len(frozenset().union(*needs))


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_two_sides_cut_differently_are_fetched_once_each(one: list, other: list, random: Any):
    # tensors in one order on both sides, shards that begin anywhere; jobs in any order
    def files(side: str, counts: list[int]) -> list[str]:
        return [f"{side}-{i:02}" for i, count in enumerate(counts) for _ in range(count)]

    needs = list(zip(files("base", one), files("tuned", other), strict=False))
    random.shuffle(needs)
    steps = streaming.steps(needs)
    assert walk(needs, steps, 2) <= 2
    assert sum(len(step.fetched) for step in steps) == len({f for pair in needs for f in pair})


def test_a_tensor_over_three_files_raises_the_number_for_itself_only():
    needs = [("a", "b"), ("a", "b", "c"), ("c", "d"), ("d",)]
    steps = streaming.steps(needs)
    assert walk(needs, steps, 2) == 3
    assert [len(step.files) for step in steps].count(3) == 1
    assert sum(len(step.fetched) for step in steps) == 4


def test_jobs_of_this_disk_come_first_and_fetch_nothing():
    steps = streaming.steps([("a",), (), ("b",), ()])
    assert steps[0] == ((1, 3), frozenset(), frozenset(), frozenset(), frozenset())


# -------------------------------------------------------------------------------- over the wire


class Loopback:
    """A base in four shards and a tuned model in three on a server; a plan that subtracts them."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        tensors = toy(0, layers=4)
        sides = {"base": (tensors, 4), "tuned": (perturbed(tensors, 1), 3)}
        specs: list[dict[str, TensorSpec]] = []
        for side, (content, shards) in sides.items():
            by_name = dict(sorted(content.items()))
            server.add_repo(f"org/{side}", self._sharded(folder / side, by_name, shards))
            files = hub.locate(f"org/{side}", side).files
            self.shards = {
                name: address for name, address in files.items() if name.endswith(".safetensors")
            }
            headers = [read_header(address) for address in self.shards.values()]
            specs.append({n: s for header in headers for n, s in header.tensors.items()})
        base, tuned = specs
        jobs = [
            CopyJob(name, spec.numel, out_dtype="BF16", point=spec, expected=tuned[name])
            for name, spec in base.items()
        ]
        self.plan = Plan("verify", jobs[::-1])
        self.results: dict[int, JobResult] = {}
        self.sent()
        server.requests.clear()

    @staticmethod
    def _sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> Path:
        """Write runs of neighbours into shards, as transformers does."""
        folder.mkdir()
        names = np.array_split(np.array(list(tensors)), shards)
        for i, part in enumerate(names, 1):
            file = folder / f"model-{i:05}-of-{shards:05}.safetensors"
            save(file, {str(name): tensors[str(name)] for name in part})
        return folder

    def run(self, numbers: Sequence[int]) -> None:
        part = replace(self.plan, jobs=[self.plan.jobs[number] for number in numbers])
        found = threads.Threads(2).run(part)
        self.results |= dict(zip(numbers, found.results, strict=True))

    def stream(self, run: Callable[[Sequence[int]], None] | None = None, watcher: Any = None):
        """Run all jobs by shards; return their results in order."""
        self.results = {}
        jobs, left = self.plan.jobs, range(len(self.plan.jobs))
        streaming.run_streamed(jobs, left, run or self.run, self.folder / "out", watcher)
        return [self.results[number] for number in left]

    def sent(self) -> list[Any]:
        """Return the requests for contents; the server notes one when it is through with it."""
        held = -1
        while held != len(self.server.requests):
            held = len(self.server.requests)
            time.sleep(0.02)
        return [request for request in self.server.requests if "/cdn/" in request.path]

    def on_disk(self) -> list[Path]:
        return [p for p in (self.folder / "out").rglob("*") if p.is_file()]


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    with HubServer() as server:
        server.adopt(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(files_module, "time", types.SimpleNamespace(sleep=lambda seconds: None))
        made = Loopback(server, tmp_path)
        (tmp_path / "out").mkdir()
        yield made


def watched(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that takes the number of files on the disk at every piece that arrives."""
    seen: list[int] = []
    stream = hub.HubFile.stream

    def counted(self: hub.HubFile, begin: int, end: int) -> Iterator[bytes]:
        for piece in stream(self, begin, end):
            seen.append(len(loopback.on_disk()))
            yield piece
            seen.append(len(loopback.on_disk()))

    monkeypatch.setattr(hub.HubFile, "stream", counted)
    return seen


def test_at_most_two_shards_are_on_the_disk(loopback: Loopback, monkeypatch: pytest.MonkeyPatch):
    seen = watched(loopback, monkeypatch)
    groups = 0

    def run(numbers: Sequence[int]) -> None:
        nonlocal groups
        groups += 1
        seen.append(len(loopback.on_disk()))
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert not [link for link in links if link.endswith("(deleted)") and "shards" in link]
        loopback.run(numbers)

    facts = streaming.schedule(loopback.plan.jobs)
    results = loopback.stream(run)
    assert max(seen) == 2 and groups == 6
    assert [result.job for result in results] == loopback.plan.jobs
    assert not list((loopback.folder / "out").iterdir())
    fetched = [request.path for request in loopback.sent()]
    assert len(fetched) == len(set(fetched)) == 7
    sizes = [p.stat().st_size for s in ("base", "tuned") for p in (loopback.folder / s).iterdir()]
    assert facts == {
        "fetched": 7, "fetched_again": 0, "nbytes_fetched": sum(sizes), "most_files": 2,
        "most_nbytes": facts["most_nbytes"], "wide": [],
    }  # fmt: skip
    assert max(sizes) < facts["most_nbytes"] < sum(sizes)
    # the same results as with every file here
    hub.fetch_all(file for job in loopback.plan.jobs for file in job.files())
    for streamed, local in zip(results, threads.Threads(2).run(loopback.plan).results, strict=True):
        assert (streamed.digests, streamed.mismatches) == (local.digests, local.mismatches)
    assert streaming.schedule(loopback.plan.jobs)["fetched"] == 0


def test_what_has_to_come_again_makes_room_first(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch
):
    seen = watched(loopback, monkeypatch)
    specs = {job.point.path: job.point for job in loopback.plan.jobs}
    bases = sorted(specs.values(), key=lambda spec: spec.path)[:2]
    specs = {job.expected.path: job.expected for job in loopback.plan.jobs}
    others = sorted(specs.values(), key=lambda spec: spec.path)[:2]
    crossed = [  # each with each: no order fetches all four once
        CopyJob(f"{i}{j}", 1, out_dtype="BF16", point=base, expected=other)
        for i, base in enumerate(bases)
        for j, other in enumerate(others)
    ]

    ran: list[int] = []

    def run(numbers: Sequence[int]) -> None:
        for spec in (crossed[numbers[0]].point, crossed[numbers[0]].expected):
            assert Path(local_path(spec.path)).stat().st_size == file_nbytes(spec.path)
        ran.extend(numbers)

    assert streaming.schedule(crossed)["fetched_again"] == 1
    streaming.run_streamed(crossed, range(4), run, loopback.folder / "out")
    assert sorted(ran) == [0, 1, 2, 3]
    assert max(seen) == 2


def test_a_cut_connection_is_resumed(loopback: Loopback, monkeypatch: pytest.MonkeyPatch):
    seen = watched(loopback, monkeypatch)
    for repo in ("base", "tuned"):
        loopback.server.cut_after(f"org/{repo}", 2000, times=2)
    results = loopback.stream()
    assert len(results) == len(loopback.plan.jobs) and max(seen) == 2
    sent = loopback.sent()
    sizes = [p.stat().st_size for s in ("base", "tuned") for p in (loopback.folder / s).iterdir()]
    assert len(sent) == 7 + 4
    assert sum(request.sent for request in sent) == sum(sizes)  # nothing came twice


def test_wide_tensors_are_said(loopback: Loopback, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streaming, "LIMIT", 1)
    monkeypatch.setattr(streaming.steps, "__defaults__", (1,))
    facts = streaming.schedule(loopback.plan.jobs)
    assert facts["most_files"] == 2
    assert sorted(facts["wide"]) == sorted(job.name for job in loopback.plan.jobs)


@pytest.mark.parametrize("broken", ["wrong bytes", "a failing job", "Ctrl-C"])
def test_the_folder_is_removed_whatever_happens(broken: str, loopback: Loopback):
    def run(numbers: Sequence[int]) -> None:
        if broken == "a failing job":
            raise SkillvecError("as planned")
        if broken == "Ctrl-C":
            raise KeyboardInterrupt
        loopback.run(numbers)

    expected: type[BaseException] = SkillvecError
    if broken == "wrong bytes":
        loopback.server.corrupt("model-00003-of-00004", at=-1)
        expected = FormatError
    elif broken == "Ctrl-C":
        expected = KeyboardInterrupt
    with pytest.raises(expected):
        loopback.stream(run)
    assert not list((loopback.folder / "out").iterdir())
    files = {file for job in loopback.plan.jobs for file in job.files()}
    assert all(remote_of(file).local is None for file in files)


def test_a_disk_too_small_is_said_before_anything_is_fetched(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch
):
    small = types.SimpleNamespace(free=streaming.schedule(loopback.plan.jobs)["most_nbytes"] - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    with pytest.raises(OutputError, match="do not fit on the disk"):
        loopback.stream()
    assert not loopback.server.requests


def test_progress_is_told(loopback: Loopback, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []
    watcher: Any = types.SimpleNamespace(advanced=lambda done, total: seen.append((done, total)))
    clock = iter(range(10**6))
    monkeypatch.setattr(streaming, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    loopback.stream(watcher=watcher)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


# --------------------------------------------------------------------------- rows out of order

ENTRIES = in_file_order(
    [
        Entry("a", "BF16", (BLOCK_NUMEL + 5,), "sparse"),
        Entry("b", "F32", (700,), "dense"),
        Entry("c", "BF16", (2 * BLOCK_NUMEL,), "packed"),
        Entry("d", "BF16", (64,), "sparse"),
        Entry("e", "BF16", (900,), "sparse"),
    ]
)


def blocks() -> list[list[Any]]:
    """Return the pieces of every row: d is all zeros, some have exceptions and replacements."""
    generator = np.random.default_rng(3)
    made = []
    for entry in ENTRIES:
        for block in range(block_count(entry.numel)):
            numel = min(BLOCK_NUMEL, entry.numel - block * BLOCK_NUMEL)
            kind = np.dtype("<u2" if entry.dtype == "BF16" else "<f4")
            values = generator.integers(0, 3, numel).astype(kind) * (entry.name != "d")
            exceptions, replacements = np.zeros(block + 1, EXCEPTION), np.zeros(2, REPLACEMENT)
            exceptions["value"] = generator.standard_normal(block + 1)
            replacements["bits"] = generator.integers(0, 99, 2)
            if entry.name != "a":
                exceptions, replacements = exceptions[:0], replacements[:0]
            encoded = encode_block(values, entry.codec)
            records = exceptions.view(np.uint8), replacements.view(np.uint8)
            made.append([encoded.payload, encoded.bitmap, *records])
    return made


def finished(writer: VectorWriter) -> dict[str, bytes]:
    settled = writer.settle()
    path = writer.finish({"equal": {}, "settled": str(settled)})
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    contents = {file.name: file.read_bytes() for file in files}
    writer.close()
    return contents


@pytest.mark.parametrize("max_shard_nbytes", [5 * 10**9, 5000])
def test_rows_in_any_order_make_the_same_file(max_shard_nbytes: int, tmp_path: Path):
    made = blocks()
    rows = list(range(len(made)))
    folders = [tmp_path / "plain", tmp_path / "reordered"]
    for folder in folders:
        folder.mkdir()
    plain, held = (
        VectorWriter(folder, ENTRIES, {"equal": {}}, max_shard_nbytes, False) for folder in folders
    )
    for row in rows:
        plain.add(row, made[row])
    kept = Segment(os.fspath(tmp_path / "out-of-order"), *held.sizes.shape)
    order = [*rows[3:], *rows[:3]]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda row: kept.add(row, made[row]), order))
    kept.stop()  # at the end of each step
    assert kept.marks.tolist() == plain.marks.tolist() and len(set(plain.marks.tolist())) > 4
    assert (tmp_path / "reordered").is_dir() and os.path.getsize(tmp_path / "out-of-order")
    streaming.replay(kept, held)
    kept.file.close()
    expected = finished(plain)
    assert finished(held) == expected
    assert (len(expected) > 2) == (max_shard_nbytes == 5000)


def test_no_row_of_a_segment_waits_for_another(tmp_path: Path):
    kept = Segment(os.fspath(tmp_path / "kept"), 7, 4)
    added = threading.Thread(target=kept.add, args=(4, blocks()[4]), daemon=True)
    added.start()
    added.join(5)
    assert not added.is_alive()
    assert [piece.tobytes() for piece in kept.read(4)] == [p.tobytes() for p in blocks()[4]]
    kept.file.close()
