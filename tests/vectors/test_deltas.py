"""Kinds of deltas and of jobs are classes: one that nobody knows works, and all can be pickled."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from families import assert_same_bits, load, perturbed, save, toy

import skillvec as sv
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.jobs.point import narrowed
from skillvec.engine.plan import CHANGED, Job, Plan, Task, from_line, to_line
from skillvec.engine.threads import Threads, on_block
from skillvec.files.header import TensorSpec
from skillvec.files.tensors import Derived, Source
from skillvec.ops.arithmetic import Exactness
from skillvec.ops.delta import Delta
from skillvec.ops.kernels import Array, widen
from skillvec.vectors.block_reader import NO_RECORDS, Block
from skillvec.vectors.combining import viewed_delta
from skillvec.vectors.deltas.base import Decoded, DeltaSource, pieces_of
from skillvec.vectors.deltas.computed import ComputedDelta
from skillvec.vectors.deltas.pair import value_dtype
from skillvec.vectors.deltas.stored import StoredDelta


@dataclass(frozen=True, slots=True)
class HalvedDelta(DeltaSource):
    """Half of another delta."""

    whole: DeltaSource

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.whole.spec.name, "F32", self.whole.spec.shape, "", 0, 0)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    @property
    def parts(self) -> tuple[DeltaSource, ...]:
        return (self.whole,)

    def stored_parts(self, role: str) -> Iterator[tuple[str, StoredDelta]]:
        return self.whole.stored_parts(role)

    def read(self, block: Block, role: str) -> Decoded:
        delta = self.whole.read(block, role)[0]
        return Delta(delta.wide(0, block.size) / 2, "F32"), NO_RECORDS


class NegativeJob(Job):
    """Count the negative values of a tensor."""

    status: ClassVar[str] = "counted"

    def run(self, task: Task) -> None:
        assert self.point is not None
        values = widen(task.block.read("point", self.point), self.point.dtype)
        task.tally[CHANGED] = np.signbit(values).sum()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    base = toy(layers=1)
    save(folder / "base", base)
    save(folder / "tuned", perturbed(base))
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    return folder


@dataclass(frozen=True)
class Constant(Derived):
    """A formula that gives one value."""

    name: str
    shape: tuple[int, ...]
    value: float
    dtype: str = "F32"

    @property
    def parts(self) -> tuple[Source, ...]:
        return ()

    def read(self, begin: int, out: Array) -> None:
        out[...] = self.value


@pytest.mark.parametrize(("tuned", "base", "dtype"), [
    ("BF16", "BF16", "BF16"), ("F16", "F16", "F16"), ("BF16", "F16", "F32"), ("BF16", "F32", "F32"),
    ("F32", "F32", "F32"), ("BF16", "F64", "F64"), ("F64", "F32", "F64"),
])  # fmt: skip
def test_a_difference_is_kept_in_the_dtype_of_both_or_a_wider_one(
    tuned: str, base: str, dtype: str
):
    assert value_dtype(tuned, base) == (dtype, Exactness.WHOLE)


def test_what_is_rounded_to_be_stored_has_no_negative_zeros():
    values = narrowed(Delta(np.float32([-1e-9, 1e-9, -1]), "F32"), "F16", "w")
    assert list(values) == [0, 0, -1] and list(np.signbit(values)) == [False, False, True]
    with pytest.raises(sv.IncompatibleError, match="w: values beyond the range of F16"):
        narrowed(Delta(np.float32([1e9]), "F32"), "F16", "w")


@pytest.mark.parametrize("value", [-0.0, np.nan])
def test_what_formulas_give_is_finite_and_its_zeros_are_positive(value: float):
    lost: dict[str, int] = {}
    ((_, values),) = pieces_of(ComputedDelta(Constant("w", (3,), value), "adapter"), {}, lost)
    assert (values == 0).all() and not np.signbit(values).any()
    assert lost == ({} if value == 0 else {"w": 3})


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_kind_of_delta_that_nobody_knows_is_applied_and_measured(
    is_stored: bool, world: Path, tmp_path: Path
):
    ref = "v.safetensors" if is_stored else "tuned::"
    ref = f"{world / ref}{'' if is_stored else world / 'base'}"
    vector = sv.SkillVector.open(ref)
    halved = replace(vector, deltas={n: HalvedDelta(d) for n, d in vector.deltas.items()})
    target = save(tmp_path / "target", perturbed(load(world / "base"), seed=5))
    sv.apply(target, halved, tmp_path / "half")
    sv.apply(target, vector, tmp_path / "whole", lam=0.5)
    assert_same_bits(tmp_path / "half", load(tmp_path / "whole"))
    found = sv.orthogonality(halved, vector).to_dict()
    assert found["pairs"][0]["overall"]["cosine"] == pytest.approx(1)


def test_a_kind_of_job_that_nobody_knows_runs_and_is_kept_in_a_journal(world: Path):
    spec = sv.open_checkpoint(world / "base")["model.embed_tokens.weight"]
    job = NegativeJob(spec.name, spec.numel, point=spec)
    (result,) = Threads(2).run(Plan("count", [job])).results
    negative = int(torch.signbit(load(world / "base")[spec.name]).sum())
    assert result.changed == negative and list(result.digests) == ["point"]
    assert from_line(job, to_line(result)).changed == negative


def test_every_kind_of_delta_comes_out_of_a_pickle_as_it_was(world: Path):
    stored = sv.SkillVector.open(world / "v.safetensors")
    pair = sv.SkillVector.open(f"{world / 'tuned'}::{world / 'base'}")
    name = "model.layers.0.mlp.up_proj.weight"
    view = stored.deltas[name].as_view().slice(0, 1, 3)
    boxes = tuple(box._replace(source=name) for box in view.boxes)
    mixed = sv.combine(stored, pair, weights=[0.5, 0.5], op="linear").deltas[name]
    kinds = [stored.deltas[name], pair.deltas[name], mixed,
             viewed_delta(name, view._replace(boxes=boxes), stored)]  # fmt: skip
    for delta in kinds:
        again = pickle.loads(pickle.dumps(delta))
        assert type(again) is type(delta) and again == delta and again.dtype == delta.dtype


@pytest.mark.parametrize("workers", [0, 2])
def test_hooks_see_every_block_and_stop_a_run(workers: int, world: Path):
    spec = sv.open_checkpoint(world / "base")["model.embed_tokens.weight"]
    plan = Plan("copy", [CopyJob(spec.name, spec.numel, point=spec) for _ in range(3)])
    seen: list[Any] = []

    def failing(plan: Plan, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyError("here")

    with on_block(lambda *block: seen.append(block)):
        Threads(workers).run(plan)
        assert sorted(block[1:] for block in seen) == [(n, 0, False) for n in range(3)]
        assert all(block[0] is plan for block in seen)
        with pytest.raises(KeyError, match="here"), on_block(failing):
            Threads(workers).run(plan)
    count = len(seen)
    assert all(block[1] != 1 for block in seen[3:])  # the inner hook is called first
    Threads(workers).run(plan)
    assert len(seen) == count
