"""Whole rows of tensors, put together from blocks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import save

import skillvec as sv
from skillvec.analysis.spreads import see
from skillvec.engine.plan_checks import plan_compare
from skillvec.ops.statistics import Request
from skillvec.vectors.vector import SkillVector
from skillvec.verbs import row_pass
from skillvec.verbs.row_pass import Tensor, measure_rows

pytestmark = pytest.mark.usefixtures("one_thread")


class Kept:
    """Keeps copies of the chunks of a tensor."""

    def __init__(self, wants_weights: bool) -> None:
        self.wants_weights, self.chunks = wants_weights, []

    def add(self, first: int, deltas, weights) -> None:
        copies = [[side.copy() for side in some] for some in (deltas, weights or ())]
        self.chunks.append((first, *copies))


def chunks_of(
    folder: Path, shape: tuple[int, ...], hidden: int, wants_weights: bool = True,
    stored: bool = False, dtype: torch.dtype = torch.float32,
) -> tuple[list, np.ndarray, np.ndarray]:  # fmt: skip
    """Return the chunks of a delta and twice the delta, with the delta and its base."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=draw).to(dtype)
    tuned = (base + torch.randn(shape, generator=draw)).to(dtype)
    save(folder / "base", {"w": base})
    ref = f"{save(folder / 'tuned', {'w': tuned})}::{folder / 'base'}"
    if stored:
        sv.diff(*ref.split("::"), folder / "v.safetensors")
        ref = str(folder / "v.safetensors")
    vectors = [SkillVector.open(ref) for _ in range(2)]
    plan = plan_compare(vectors, Request((1.0, 2.0), ((0, 1),)), None, (), ())
    tensors = [Tensor(job, see(shape, hidden), (1.0, 0.5)) for job in plan.jobs]
    (kept,) = measure_rows(tensors, plan, lambda _: Kept(wants_weights), 1, None)
    return kept.chunks, (tuned.float() - base.float()).numpy(), base.float().numpy()


@pytest.mark.parametrize("shape", [(700, 30), (1, 17), (3, 70, 30), (5, 2000)])
@pytest.mark.parametrize("stored", [False, True])
def test_rows_are_whole_and_in_order(
    shape: tuple[int, ...], stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_pass, "CHUNK", 1000)
    chunks, delta, base = chunks_of(tmp_path, shape, 30, stored=stored)
    columns = shape[-1]
    rows = max(1, 1000 // columns)
    assert [first for first, *_ in chunks] == [*range(0, delta.size // columns, rows)]
    for i in range(2):  # a factor of 2, which the tensor's own takes away
        found = np.concatenate([deltas[i] for _, deltas, _ in chunks])
        assert np.array_equal(found, delta.reshape(-1, columns))
    for _, _, weights in chunks:
        assert len(weights) == (0 if stored else 2)
    if not stored:
        found = np.concatenate([weights[0] for _, _, weights in chunks])
        assert np.array_equal(found, base.reshape(-1, columns))


def test_rows_lie_across_blocks(tmp_path: Path) -> None:
    """300 columns do not divide a block of 2^20 values."""
    chunks, delta, base = chunks_of(tmp_path, (4000, 300), 300, dtype=torch.bfloat16)
    assert np.array_equal(np.concatenate([deltas[0] for _, deltas, _ in chunks]), delta)
    assert np.array_equal(np.concatenate([weights[1] for _, _, weights in chunks]), base)
    assert len({deltas[0].shape for _, deltas, _ in chunks}) == 2  # the last is shorter


def test_what_is_flat_has_rows_of_neighbours(tmp_path: Path) -> None:
    chunks, delta, _ = chunks_of(tmp_path, (70_000,), 0, wants_weights=False)
    ((first, deltas, weights),) = chunks
    assert (first, weights, deltas[0].shape) == (0, [], (69, 1024))
    assert np.array_equal(deltas[0].ravel()[:70_000], delta)
    assert not deltas[0].ravel()[70_000:].any()


@pytest.mark.parametrize(
    "square,factor", [(0.0, 1.0), (1.0, 0.5), (3.9, 0.5), (4.0, 0.25), (1e-80, 2.0**120),
                      (float("inf"), 1.0), (float("nan"), 1.0)],
)  # fmt: skip
def test_factors_bring_norms_below_one(square: float, factor: float) -> None:
    request = Request((1.0,))
    sums = np.zeros(1, row_pass.layout(request))
    sums["vectors"]["square"] = square
    result = SimpleNamespace(job=None, sums=sums.view(np.float64))
    assert row_pass.view_tensor(result, request, see((4,), 4)).factors == (factor,)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_z_does_not_depend_on_the_scale(scale: float, tmp_path: Path) -> None:
    """Products of these leave fp32."""
    rng, found = np.random.default_rng(1), []
    a, b = (rng.normal(size=(60, 48)).astype(np.float32) for _ in "ab")
    for i, factor in enumerate((1.0, scale)):
        save(tmp_path / f"{i}-base", {"w": torch.zeros(60, 48)})
        refs = [f"{save(tmp_path / f'{i}-{n}', {'w': torch.from_numpy(x * np.float32(factor))})}"
                f"::{tmp_path / f'{i}-base'}" for n, x in enumerate((a, b))]  # fmt: skip
        found.append(sv.orthogonality(*refs).facts["pairs"][0]["overall"])
    for key in ("z", "p", "z_groups", "z_rows", "z_channels", "z_rotation"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4)
