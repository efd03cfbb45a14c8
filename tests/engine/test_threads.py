"""One contract for all engines: the same bytes, ledgers, errors and progress."""

import errno
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families import assert_same_bits, bits, from_bits, perturbed, save, toy
from hypothesis import given
from hypothesis import strategies as st
from raycluster import cluster

import skillvec as sv
from skillvec.engine import ray_cluster, ray_tasks
from skillvec.engine.jobs.compare import CompareJob
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.plan import Job, Plan
from skillvec.engine.run import choose_engine
from skillvec.engine.threads import Found
from skillvec.errors import FormatError, IncompatibleError, OutputError, UsageError
from skillvec.files.header import TensorSpec
from skillvec.files.output_file import OutputFile
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.vectors.deltas.stored import StoredDelta
from skillvec.vectors.deltas.view import ViewDelta

ENGINES = [
    {"engine": "serial"},
    *({"engine": "threads", "workers": n} for n in (1, 2, 5)),
    *(pytest.param({"engine": "ray", "workers": n}, marks=pytest.mark.ray) for n in (1, 2, 5)),
]
ORACLE = {"engine": "threads", "workers": 3}


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    with cluster(2):
        yield


@pytest.fixture(params=ENGINES, ids=lambda given: "-".join(map(str, given.values())))
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a verb; with ray, a cluster of two nodes runs."""
    if request.param["engine"] == "ray":
        request.getfixturevalue("nodes")
    return request.param


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders base, tuned, sft and target (3 shards), blocks of all kinds; vectors of each."""
    folder = tmp_path_factory.mktemp("world")
    base = toy(0)
    for name, numel in (("long", BLOCK_NUMEL + 77), ("empty", 0), ("one", 1)):
        noise = np.random.default_rng(numel).normal(size=numel).astype(np.float32)
        base[name] = (torch.from_numpy(noise) * 0.02).bfloat16()
    sides = {"base": base, "tuned": perturbed(base, 1, density=0.3), "sft": perturbed(base, 2)}
    odd = bits(sides["tuned"]["long"]).copy()
    odd[[0, BLOCK_NUMEL]] = 0x8000  # -0: what no difference restores
    sides["tuned"]["long"] = from_bits(odd, "BF16", (odd.size,))
    for name, tensors in sides.items():
        save(folder / name, tensors)
    save(folder / "target", perturbed(base, 3), shards=3)
    for name in ("tuned", "sft"):
        sv.diff(folder / name, folder / "base", folder / f"{name}.safetensors", **ORACLE)
    return folder


def contents(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def told(report: sv.Report) -> dict[str, Any]:
    """Return what a report says, without who did it and where."""
    said = report.to_dict()
    return {
        k: v for k, v in said.items() if k not in ("engine", "workers", "memory_nbytes", "output")
    }


class Followed:
    """A watcher that keeps what it was told, and may interrupt."""

    def __init__(self, interrupt: bool = False) -> None:
        self.done: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.interrupt = interrupt

    def planned(self, report: sv.Report) -> None:
        self.threads.add(threading.get_ident())

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        self.threads.add(threading.get_ident())
        self.done.append((done_nbytes, total_nbytes))
        if self.interrupt and done_nbytes:
            raise KeyboardInterrupt


class TestEngine:
    """What every engine keeps."""

    @pytest.fixture(autouse=True)
    def setup(self, engine, world: Path, tmp_path: Path) -> None:
        self.engine, self.world, self.folder = engine, world, tmp_path

    def both(
        self, verb: Any, *arguments: Any, suffix: str = "", **options: Any
    ) -> list[dict[str, Any]]:
        """Run a verb that writes with this engine and with the oracle; same files, same report."""
        found = []
        for name, engine in (("found", self.engine), ("expected", ORACLE)):
            out = self.folder / name / f"out{suffix}"
            out.parent.mkdir()
            made = verb(*arguments, out, **options, **engine)
            report = made if isinstance(made, sv.Report) else made.report
            found.append({"files": contents(out), "said": told(report)})
            assert sorted(out.parent.iterdir()) == [out]
        assert found[0] == found[1]
        return found[0]

    @pytest.mark.parametrize(
        ("codec", "size"),
        [
            ("dense", "5GB"),
            ("sparse", "5GB"),
            ("packed", "5GB"),
            ("auto", "1MB"),
            ("sparse", "1MB"),
        ],
    )
    def test_diff(self, codec: str, size: str):
        pair = self.world / "tuned", self.world / "base"
        options = {"codec": codec, "max_shard_size": size}
        found = self.both(sv.diff, *pair, suffix=".safetensors", **options)
        assert (len(found["files"]) > 2) == (size != "5GB")

    @pytest.mark.parametrize("scope", ["vector", "tensor"])
    def test_combine_with_measuring_passes(self, scope: str):
        pair = [self.world / "tuned.safetensors", self.world / "sft.safetensors"]
        given = {"density": 0.3, "scope": scope}
        combined = sv.combine(*pair, op="ties", parameters=given)
        self.both(sv.SkillVector.save, combined, suffix=".safetensors")
        out = self.folder / "found" / "out.safetensors"
        watcher = Followed()
        verified = sv.verify(out, watcher=watcher, **self.engine)
        assert told(verified) == told(sv.verify(out, **ORACLE)) and watcher.done

    @pytest.mark.parametrize(
        ("target", "options"),
        [
            ("target", {"lam": 0.7}),
            ("target", {"lam": 0.7, "rounding": "stochastic", "seed": 5}),
            ("base", {"lam": 1.0}),  # replacements: blocks that a digest decides
            ("target", {"lam": 1.0, "dtype": "fp32"}),
            ("target", {"exclude": ["long"]}),
        ],
        ids=["lam", "stochastic", "exact", "wide", "excluded"],
    )
    def test_apply(self, target: str, options: dict[str, Any]):
        vector = self.world / "tuned.safetensors"
        found = self.both(sv.apply, self.world / target, vector, **options)
        if target == "base":
            assert found["said"]["verdict"] == "exact base"
            assert_same_bits(self.folder / "found" / "out", self.world / "tuned")
        out = self.folder / "found" / "out"
        assert told(sv.verify(out, **self.engine)) == told(sv.verify(out, **ORACLE))

    def test_apply_of_a_pair(self):
        pair = {"tuned": self.world / "tuned", "base": self.world / "base"}
        self.both(sv.apply, self.world / "target", None, lam=0.7, **pair)

    def test_export_patch(self):
        self.both(sv.export_patch, self.world / "tuned.safetensors", suffix=".safetensors")

    def test_orthogonality(self):
        pair = [self.world / "tuned.safetensors", self.world / "sft.safetensors"]
        found, expected = (sv.orthogonality(*pair, **e).to_dict() for e in (self.engine, ORACLE))
        for key in ("pairs", "tensors"):
            assert found[key] == expected[key]  # == on floats: every digit

    def test_verify_tells_what_differs(self):
        out = self.folder / "out"
        sv.apply(self.world / "target", self.world / "tuned.safetensors", out, **ORACLE)
        shard = sorted(out.glob("*.safetensors"))[0]
        raw = bytearray(shard.read_bytes())
        raw[-3] ^= 1
        shard.write_bytes(raw)
        texts = []
        for engine in (self.engine, ORACLE):
            with pytest.raises(sv.VerificationError) as caught:
                sv.verify(out, **engine)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]

    def test_errors_are_the_same(self):
        """Of an altered delta, and of values that the dtype cannot hold: class and text."""
        altered = self.folder / "altered.safetensors"
        raw = bytearray((self.world / "sft.safetensors").read_bytes())
        raw[int.from_bytes(raw[:8], "little") + 8 + 1000] ^= 1
        altered.write_bytes(raw)
        large = self.folder / "large.safetensors"
        sides = [{"w": torch.full((3, 5), value)} for value in (1e38, -1e38)]
        for name, side in zip(("tuned", "base"), sides, strict=True):
            save(self.folder / name, side)
        sv.diff(self.folder / "tuned", self.folder / "base", large, **ORACLE)
        both = sv.combine(large, large, weights=[1, 0.5])
        cases = {
            FormatError: partial(sv.apply, self.world / "base", altered),
            IncompatibleError: partial(both.save, dtype="fp16"),
        }
        out = self.folder / "never.safetensors"
        for kind, case in cases.items():
            texts = []
            for engine in (self.engine, ORACLE):
                with pytest.raises(sv.SkillvecError) as caught:
                    case(out.with_suffix("" if kind is FormatError else out.suffix), **engine)
                texts.append((type(caught.value), str(caught.value)))
            assert texts[0] == texts[1] and texts[0][0] is kind
        assert not [path for path in self.folder.iterdir() if "unfinished" in path.name]
        assert not list(self.folder.glob("never*"))

    def test_progress_is_told_on_the_calling_thread(self):
        watcher = Followed()
        out = self.folder / "v.safetensors"
        pair = self.world / "tuned", self.world / "base"
        sv.diff(*pair, out, watcher=watcher, **self.engine)
        done = [nbytes for nbytes, _ in watcher.done]
        assert watcher.threads == {threading.get_ident()}
        assert done == sorted(done) and watcher.done[-1][0] <= watcher.done[-1][1]
        assert len(set(done)) > 1 or self.engine["engine"] == "threads"
        assert watcher.done[-1][1] == sum(
            (side / "model.safetensors").stat().st_size
            - 8 - int.from_bytes((side / "model.safetensors").read_bytes()[:8], "little")
            for side in pair
        )  # fmt: skip

    def test_a_dry_run_says_the_same(self):
        pair = self.world / "tuned", self.world / "base"
        out = self.folder / "v.safetensors"
        made = [sv.diff(*pair, out, dry_run=True, **e).report for e in (self.engine, ORACLE)]
        assert told(made[0]) == told(made[1])
        workers = self.engine.get("workers", 1)
        assert made[0].facts["workers"] == workers and not list(self.folder.iterdir())
        assert made[0].facts["engine"].startswith(self.engine["engine"])

    @pytest.mark.parametrize("verb", ["diff", "apply"])
    def test_ctrl_c_leaves_nothing(self, verb: str):
        threads, out = threading.active_count(), self.folder / "out.safetensors"
        options = {"watcher": Followed(interrupt=True), **self.engine}
        with pytest.raises(KeyboardInterrupt):
            if verb == "diff":
                sv.diff(self.world / "tuned", self.world / "base", out, **options)
            else:
                target = self.world / "target"
                sv.apply(target, self.world / "tuned.safetensors", self.folder / "out", **options)
        assert not list(self.folder.iterdir())
        assert threading.active_count() <= threads + 1  # Ray starts one of its own, once
        if self.engine["engine"] == "ray":
            assert_idle()


def assert_idle() -> None:
    """Fail unless every CPU of the cluster is free again, within some seconds."""
    ray = ray_cluster._connected()
    for _ in range(50):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.1)
    raise AssertionError(f"tasks are still at work: {ray.available_resources()}")


# ---------------------------------------------------------------------------- batches, without Ray


class View(NamedTuple):
    sources: tuple[StoredDelta, ...]


def job(name: str, nbytes: int, *views: str) -> Job:
    """A job that reads so many bytes, one delta a view of each named tensor if there are any."""
    specs = [TensorSpec(part, "U8", (nbytes,), "file", 0, nbytes) for part in views or (name,)]
    stored = [StoredDelta(spec, "dense") for spec in specs]
    deltas = [ViewDelta(part.spec, View((part,))) for part in stored] if views else stored
    return CompareJob(name, nbytes, deltas=tuple(deltas))


@pytest.mark.parametrize("workers", [1, 2, 5])
@given(sizes=st.lists(st.integers(0, 4 * ray_cluster.BATCH_NBYTES), max_size=40))
def test_batches_hold_every_job_once_in_order(workers: int, sizes: list[int]):
    jobs = [job(str(number), nbytes) for number, nbytes in enumerate(sizes)]
    found = ray_cluster.batches(jobs, workers)
    assert [number for numbers in found for number in numbers] == list(range(len(jobs)))
    for numbers in found:
        filled = [sizes[number] for number in numbers if sizes[number]]
        assert len(filled) <= 1 or sum(filled) <= ray_cluster.BATCH_NBYTES


def test_small_models_are_cut_so_that_every_worker_has_several_batches():
    jobs = [job(str(number), 1000) for number in range(160)]
    assert [len(ray_cluster.batches(jobs, workers)) for workers in (1, 2, 8)] == [4, 8, 32]
    large = [job(str(number), ray_cluster.BATCH_NBYTES // 2) for number in range(100)]
    assert {len(numbers) for numbers in ray_cluster.batches(large, 2)} == {2}


def test_views_of_one_tensor_stay_together():
    """Each batch reads all of what its jobs view, to check it."""
    jobs = [job(f"{layer}.{e}", 1000, f"fused.{layer}") for layer in range(3) for e in range(50)]
    assert ray_cluster.batches(jobs, 4) == [range(0, 50), range(50, 100), range(100, 150)]


def test_batches_of_rows_end_in_order_whichever_is_copied_first(tmp_path, monkeypatch):
    """A journal's rows count up to the first that is missing."""
    ended: list[int] = []

    def noted(run: Any, number: int, batch: Any) -> None:
        run._ended += 1
        ended.append(number)

    monkeypatch.setattr(ray_cluster._ClusterRun, "_end", noted)
    run = ray_cluster._ClusterRun.__new__(ray_cluster._ClusterRun)
    run._ended, run._whole = 0, {}
    for number in (2, 0, 1, 3):
        segment = tmp_path / str(number)
        segment.touch()
        run._copied(number, ray_tasks.Batch(Found([], {}), {}, str(segment)), None)
    assert ended == [0, 1, 2, 3] and not list(tmp_path.iterdir())


def test_ray_that_is_not_installed_is_a_usage_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'not installed: pip install "skillvec\[ray\]"'):
        choose_engine("ray", 2)


# ------------------------------------------------------------- files that several machines write


@pytest.mark.parametrize("answer", [None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, 0])
def test_a_range_is_copied_with_and_without_the_file_system(answer, tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "source").write_bytes(content)
    (tmp_path / "out").write_bytes(bytes(70_000))

    def refused(*arguments: Any) -> int:
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    if answer is not None:
        monkeypatch.setattr(os, "copy_file_range", refused)
    file = OutputFile(os.fspath(tmp_path / "out"), 0, shared=True)
    with open(tmp_path / "source", "rb") as source:
        file.copy(100, source.fileno(), 30_001, 69_000)
        with pytest.raises(OutputError, match="out: what is copied has fewer bytes"):
            file.copy(0, source.fileno(), 99_999, 2)
    file.close()
    written = (tmp_path / "out").read_bytes()
    assert written[100:69_100] == content[30_001:99_001]
    assert not any(written[1:100]) and not any(written[69_100:]) and len(written) == 70_000


@pytest.mark.parametrize("work", ["batch", "copy"])
def test_a_task_returns_when_its_bytes_are_on_the_disk(
    work: str, world: Path, tmp_path, monkeypatch
):
    calls: list[str] = []
    for name in ("pwrite", "copy_file_range", "fsync"):
        real = getattr(os, name)

        def noted(*arguments: Any, name: str = name, real: Any = real) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    spec = sv.open_checkpoint(world / "base")["long"]
    out = tmp_path / "out"
    out.write_bytes(bytes(spec.nbytes + 8))
    shared = ray_tasks.Shared(Plan("apply", []), [str(out)], {}, {}, {}, None, "", None)
    if work == "batch":
        copied = CopyJob("long", spec.numel, out_dtype="BF16", point=spec, output=(0, 8))
        batch = ray_tasks.run_batch(shared, [copied])
        assert [result.job.name for result in batch.found.results] == ["long"]
    else:
        ray_tasks.copy_ranges(
            shared, spec.path, [ray_tasks.Move(spec.start, spec.nbytes, str(out), 8)]
        )
    assert calls[-1] == "fsync" and len(calls) > 1
    content = Path(spec.path).read_bytes()[spec.start :][: spec.nbytes]
    assert out.read_bytes() == bytes(8) + content


def test_a_shared_file_is_only_written_to_and_never_made(tmp_path, monkeypatch):
    """A page that is read could be written back with what others have changed in it."""
    path = tmp_path / "out"
    with pytest.raises(OutputError, match="out: No such file"):
        OutputFile(os.fspath(path), 0, shared=True)
    assert not path.exists()
    path.write_bytes(b"0123456789")
    dropped: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *given: dropped.append(given))
    monkeypatch.setattr(os, "posix_fallocate", None)  # a file system without it reads and writes
    file = OutputFile(os.fspath(path), 0, shared=True)
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)]
    file.write(3, b"abc")
    with pytest.raises(OutputError, match="Bad file descriptor"):
        file.holds(0, memoryview(bytearray(1)))
    file.hand_over()
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2
    file.close()
    assert path.read_bytes() == b"012abc6789"
