"""A vector attached where the device does the arithmetic: the same bits, records and reports.

Here the processor plays the device (`COMPUTING`), so that the path is tested where none is.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from families import assert_same_bits, load, perturbed, save, toy

import skillvec as sv
from skillvec.checkpoints import live_tensors
from skillvec.ops import device

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDE = "wide.weight"  # of two blocks, the last one short


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_tensors, "COMPUTING", {"cpu", "cuda"})


@pytest.fixture(scope="module", params=["BF16", "F32"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with -0, an infinity and a NaN, one tensor larger than a block, and its vector."""
    folder = tmp_path_factory.mktemp(f"live-{request.param}")
    base = toy(0, request.param, layers=1)
    base[WIDE] = torch.randn(1049, 1000, generator=torch.manual_seed(1)).to(base["lm_head.weight"])
    base[WIDE][0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    tuned = perturbed(base, 2, density=0.3)
    tuned[WIDE][0, :3] = base[WIDE][0, :3]
    save(folder / "base", base)
    save(folder / "tuned", tuned)
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    return folder


def module_of(tensors: Mapping[str, torch.Tensor], place: str = "cpu") -> torch.nn.Module:
    """Return a module with parameters of these names and values."""
    root = torch.nn.Module()
    for name, values in tensors.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.register_parameter(leaf, torch.nn.Parameter(values.to(place)))
    return root


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.detach().cpu().clone() for name, values in model.state_dict().items()}


@pytest.mark.parametrize("place", PLACES)
def test_what_the_device_computes_is_what_apply_writes(
    folder: Path, tmp_path: Path, place: str, computing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    added, add = [], device.add

    def count(target: torch.Tensor, *given: object) -> device.Added:
        added.append(target.device.type)
        return add(target, *given)

    monkeypatch.setattr(device, "add", count)
    model = module_of(load(folder / "base"), place)
    original = state(model)
    with sv.attach(model, folder / "v.safetensors", lam=0.5, workers=2) as live:
        for number, (lam, rounding) in enumerate(
            ((0.5, "nearest"), (-0.3, "stochastic"), (0.0, "nearest"), (1.0, "nearest"))
        ):
            live.set(lam=lam, rounding=rounding, seed=number)
            out = tmp_path / str(number)
            report = sv.apply(
                folder / "base", folder / "v.safetensors", out, lam=lam, rounding=rounding,
                seed=number,
            )  # fmt: skip
            assert_same_bits(state(model), out)
            for key in ("gain", "cosine", "changed", "numel", "verdict"):
                assert repr(live.report.facts.get(key)) == repr(report.facts.get(key)), (key, lam)
            lines = [line | {"status": line["status"].replace("attached", "applied")}
                     for line in live.report.ledger]  # fmt: skip
            statuses = [{line["name"]: line["status"] for line in side}
                        for side in (lines, report.ledger)]  # fmt: skip
            assert statuses[0] == statuses[1]
    assert_same_bits(state(model), original)
    assert set(added) == {place} and not live.is_attached


@pytest.mark.parametrize("folder", ["BF16"], indirect=True)
def test_host_and_device_read_what_the_other_has_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = module_of(load(folder / "base"))
    original = state(model)
    live = sv.attach(model, folder / "v.safetensors", lam=0.5)
    expected = state(model)
    for computing in ({"cpu"}, set(), {"cpu"}):
        monkeypatch.setattr(live_tensors, "COMPUTING", computing)
        live.set(lam=-0.5)
        live.set(lam=0.5)
        assert_same_bits(state(model), expected)
    monkeypatch.setattr(live_tensors, "COMPUTING", set())
    live.detach()
    assert_same_bits(state(model), original)


@pytest.mark.parametrize("folder", ["BF16"], indirect=True)
def test_the_original_comes_to_the_host_once(
    folder: Path, computing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later settings bring the exclusive or alone: as many bits as the parameters have."""
    moved = []
    to_host = device.to_host

    def count(values: torch.Tensor, dtype: str) -> np.ndarray:
        moved.append(values.numel())
        return to_host(values, dtype)

    monkeypatch.setattr(device, "to_host", count)
    base = {name: values for name, values in load(folder / "base").items() if name != WIDE}
    numel = sum(values.numel() for values in base.values())
    with sv.attach(module_of(base), folder / "v.safetensors", lam=0.5, exclude=[WIDE]) as live:
        assert sum(moved) == 2 * numel
        moved.clear()
        live.set(lam=0.25)
        assert sum(moved) == numel


@pytest.mark.parametrize("folder", ["F16"], indirect=True)
def test_what_leaves_the_range_is_counted_there_and_refused(folder: Path, computing: None) -> None:
    """The infinity and the NaN that were there before pass with apply's warning."""
    model = module_of(load(folder / "base"))
    original = state(model)
    live = sv.attach(model, folder / "v.safetensors", lam=0.5)
    assert any(f"{WIDE}: 2 " in warning for warning in live.report.warnings)
    with pytest.raises(sv.NonfiniteError, match=r"lm_head\.weight"):
        live.set(lam=1e9)
    assert_same_bits(state(model), original)
    assert not live.is_attached


@pytest.mark.parametrize("folder", ["BF16"], indirect=True)
def test_what_something_else_changed_is_told_and_left(folder: Path, computing: None) -> None:
    model = module_of(load(folder / "base"))
    original = state(model)
    live = sv.attach(model, folder / "v.safetensors", lam=0.5)
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 1
    changed = state(model)["lm_head.weight"]
    with pytest.raises(sv.VerificationError, match=r"lm_head\.weight"):
        live.detach()
    after = state(model)
    assert np.array_equal(after["lm_head.weight"].view(torch.uint8), changed.view(torch.uint8))
    del after["lm_head.weight"], original["lm_head.weight"]
    assert_same_bits(after, original)
