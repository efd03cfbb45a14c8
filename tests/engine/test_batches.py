"""Small tensors in batches: the bytes and reports of one at a time, and what an error leaves."""

import contextlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import from_bits, perturbed, save, toy

import skillvec as sv
from skillvec.engine import runner, threads
from skillvec.engine.plan import JobResult, Plan
from skillvec.errors import FormatError, OutputError
from skillvec.files import held


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small tensors around one that is none, some empty, with values none restores."""
    folder, base = tmp_path_factory.mktemp("world"), toy(layers=3)
    base["model.layers.1.long"] = from_bits(
        np.full(threads.SMALL_NUMEL + 3, 0x3F80, np.uint16), "BF16"
    )
    base["model.layers.1.none"] = torch.zeros(0, dtype=torch.bfloat16)
    base["model.layers.2.steps"] = torch.arange(9)
    tuned = perturbed(base, 1, density=0.3)
    # -0: values that no difference restores
    for name in ("a", "model.layers.2.odd"):
        tuned[name] = from_bits(np.array([0x8000, 0x8000, 0x3F81], np.uint16), "BF16")
        base[name] = from_bits(np.array([0, 0x3F80, 0x3F80], np.uint16), "BF16")
    save(folder / "base", base)
    save(folder / "tuned", tuned)
    save(folder / "target", perturbed(base, 3), shards=3)
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors", engine="serial")
    return folder


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def made(world: Path, folder: Path, engine: dict[str, Any]) -> list[Any]:
    """Return files and reports of every kind of job."""
    with contextlib.chdir(folder):  # paths stand in recipes and reports
        return made_here(world, engine)


def made_here(world: Path, engine: dict[str, Any]) -> list[Any]:
    stored = sv.diff(world / "tuned", world / "base", "v.safetensors", **engine)
    shards = {"codec": "sparse", "max_shard_size": "20KB"}
    sv.diff(world / "tuned", world / "base", "s.safetensors", **shards, **engine)
    reports = [stored.report]
    for side, lam in (("base", 1.0), ("target", 0.7)):  # exact base: replacements come back
        reports.append(sv.apply(world / side, "v.safetensors", side, lam=lam, **engine))
    reports.append(sv.verify("target", **engine))
    reports.append(sv.export_patch("v.safetensors", "p.safetensors", **engine))
    reports.append(sv.orthogonality("v.safetensors", world / "v.safetensors", **engine))
    said = json.dumps([report.to_dict()["tensors"] for report in reports])
    said += json.dumps(reports[-1].to_dict()["pairs"])
    names = ("v.safetensors", "s.safetensors", "base", "target", "p.safetensors")
    return [said, *(contents(Path(name)) for name in names)]


@pytest.fixture(scope="module")
def one_at_a_time(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "SMALL_NUMEL", 0)  # empty ones have no block
        return made(world, tmp_path_factory.mktemp("one"), {"engine": "serial"})


@pytest.mark.parametrize("jobs, numel", [(64, 1 << 18), (3, 1 << 18), (64, 100)])
@pytest.mark.parametrize("engine", [{"engine": "serial"}, {"engine": "threads", "workers": 3}])
def test_batches_change_no_byte_and_no_line(
    jobs: int, numel: int, engine: dict, world: Path, one_at_a_time, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(threads, "BATCH_JOBS", jobs)
    monkeypatch.setattr(threads, "BATCH_NUMEL", numel)
    assert made(world, tmp_path, engine) == one_at_a_time


MIDDLE = "model.layers.1.mlp.up_proj.weight"


def test_an_error_in_a_batch_keeps_what_was_done_before_it(
    world: Path, one_at_a_time, tmp_path: Path, monkeypatch
):
    """What is noted when a tensor fails is what came before it, and the bytes of that are there."""
    output, noted, seen, errors = tmp_path / "v.safetensors", [], [], [OutputError("it is full")]

    def failing(plan: Plan, number: int, *rest: Any) -> None:
        seen.append(plan.jobs[number].name)
        if plan.jobs[number].name == MIDDLE and errors:
            raise errors.pop()

    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)
    note = runner._Claims.note

    def counted(claims: Any, number: int, result: JobResult) -> None:
        noted.append(result.job.name)
        note(claims, number, result)

    monkeypatch.setattr(runner._Claims, "note", counted)
    with pytest.raises(OutputError, match="full\nwhat is done is kept"), threads.on_block(failing):
        sv.diff(world / "tuned", world / "base", output, engine="serial")
    assert not output.exists()
    assert noted and noted == [name for name in seen if name != MIDDLE]
    first, seen[:] = list(seen), []
    with threads.on_block(failing):
        sv.diff(world / "tuned", world / "base", output, engine="serial")
    assert seen[0] == MIDDLE and not {*seen} & {*first[:-1]}
    assert contents(output) == one_at_a_time[1]


def test_what_a_batch_held_back_when_it_was_killed_is_done_again(
    world: Path, one_at_a_time, tmp_path: Path, monkeypatch
):
    """A run that ends before a batch is written has not said that any of it is done."""
    output, calls = tmp_path / "v.safetensors", []
    flush = held.HeldRows.flush

    def killed(rows: held.HeldRows) -> None:
        calls.extend(rows._rows)
        if len(calls) > 10:
            raise OutputError("gone")
        flush(rows)

    monkeypatch.setattr(threads, "BATCH_JOBS", 5)
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(held.HeldRows, "flush", killed)
    with pytest.raises(OutputError, match="gone"):
        sv.diff(world / "tuned", world / "base", output, engine="serial")
    monkeypatch.setattr(held.HeldRows, "flush", flush)
    saved = sv.diff(world / "tuned", world / "base", output, engine="serial")
    assert saved.report.facts["resumed"] == 10  # two batches
    assert contents(output) == one_at_a_time[1]


def test_a_batch_names_the_tensor_that_was_altered(world: Path, tmp_path: Path):
    """Others of its batch are whole; nothing is published."""
    path = tmp_path / "v.safetensors"
    saved = sv.diff(world / "tuned", world / "base", path, codec="dense", engine="serial")
    place = saved.stored.deltas[MIDDLE].spec
    with open(path, "r+b") as file:
        file.seek(place.start)
        byte = file.read(1)[0]
        file.seek(place.start)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(FormatError, match=f"{MIDDLE} differs from its digest"):
        sv.apply(world / "base", path, tmp_path / "out", engine="serial")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb, most", [("diff", 6000), ("orthogonality", 7500)])
def test_memory_a_tensor(verb: str, most: int, tmp_path: Path):
    """Bytes that Python holds at most for each tensor more: no clock, so no luck.

    Of orthogonality they were 6,400 to 7,070 in folders of other names, on other machines.
    """

    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        names = [f"model.layers.{i % 8}.experts.{i // 8}.weight" for i in range(count)]
        base = {name: torch.full((4, 4), 0.5, dtype=torch.bfloat16) for name in names}
        save(folder / "base", base)
        save(folder / "tuned", perturbed(base, 1))
        sides, vector = (folder / "tuned", folder / "base"), folder / "v.safetensors"
        if verb == "orthogonality":
            sv.diff(*sides, vector, engine="serial")
        tracemalloc.start()
        try:
            if verb == "diff":
                sv.diff(*sides, vector, engine="serial")
            else:
                sv.orthogonality(vector, vector, engine="serial")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)  # what is imported and cached
    few, many = peak(50), peak(250)
    assert (many - few) / 200 < most
