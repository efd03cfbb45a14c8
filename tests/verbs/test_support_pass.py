"""Overlap of supports in the report of whole models: given the weights, by rows and channels."""

import json
from pathlib import Path

import angles
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import skillvec as sv
from skillvec.ops.statistics import Request
from skillvec.vectors.vector import SkillVector
from skillvec.verbs import support_pass
from skillvec.verbs._orthogonality import is_thresholded

SHAPES = {
    "model.embed_tokens.weight": (90, 32), "model.layers.0.mlp.up_proj.weight": (64, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 64), "model.layers.0.mlp.experts": (3, 32, 20),
    "model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.0.other": (30, 20),
    "model.norm.weight": (32,),
}  # fmt: skip
NUMBERS = {
    "lift", "lift_weights", "overlap_z", "p_overlap", "overlap_z_weights", "overlap_z_plain",
    "sign_agreement", "sign_z", "sign_z_plain",
}  # fmt: skip


def save(folder: Path, tensors: dict[str, np.ndarray], dtype: torch.dtype) -> Path:
    folder.mkdir()
    made = {name: torch.tensor(values).to(dtype) for name, values in tensors.items()}
    save_file(made, folder / "model.safetensors")
    return folder


def two_updates(folder: Path, dtype: torch.dtype, base_dtype: torch.dtype) -> list[str]:
    """Return TUNED::BASE of two updates of one base; in fp32 half of the rows are left alone."""
    rng = np.random.default_rng(0)
    made = {name: torch.tensor(rng.normal(size=shape) * 0.02).to(base_dtype)
            for name, shape in SHAPES.items()}  # fmt: skip
    base = {name: values.double().numpy() for name, values in made.items()}
    save(folder / "base", base, base_dtype)
    size = 3e-5 if dtype == torch.bfloat16 else 3e-6
    refs = []
    for side in "ab":
        tuned = {}
        for name, values in base.items():
            rows = rng.random((len(values),) + (1,) * (values.ndim - 1)) < 0.5
            moved = rng.normal(size=values.shape) * size
            tuned[name] = values + moved * (rows if dtype == torch.float32 else 1)
        refs.append(f"{save(folder / side, tuned, dtype)}::{folder / 'base'}")
    return refs


def deviations(report: sv.Report, against: Path | None = None) -> dict:
    """Return how far the overlap of supports is from that of tests/support/supports.py."""
    said = json.loads(json.dumps(report.to_dict()))
    sides = {label: angles.side(*label.split("::")) for label in said["vectors"]}
    weights = angles.load(against) if against else None
    worst = angles.deviations(said, sides, weights)
    assert {*worst} >= NUMBERS
    return {key: worst[key] for key in NUMBERS if worst[key][0] > 1}


@pytest.mark.parametrize("dtypes", ["BF16 BF16", "F16 F16", "F32 F32", "BF16 F32", "F32 BF16"])
def test_every_number_is_the_scripts(dtypes: str, tmp_path: Path) -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    tuned, base = (kinds[name] for name in dtypes.split())
    refs = two_updates(tmp_path, tuned, base)
    report = sv.orthogonality(*refs)
    assert not deviations(report)
    overall = report.facts["pairs"][0]["overall"]
    assert (overall["lift_weights"] is None) == (tuned == torch.float32)
    if dtypes == "BF16 BF16":
        assert overall["lift_weights"] == pytest.approx(1, abs=0.05)
        assert overall["overlap_z_plain"] > 20 and abs(overall["overlap_z"]) < 3
    if dtypes == "F32 F32":  # whole rows
        assert abs(overall["overlap_z_plain"]) > 1.5 * abs(overall["overlap_z"])
    assert not deviations(sv.orthogonality(*refs, against=tmp_path / "a"), tmp_path / "a")


def test_no_digit_depends_on_workers_or_form(tmp_path: Path) -> None:
    refs = two_updates(tmp_path, torch.bfloat16, torch.bfloat16)
    base = tmp_path / "base"
    paths = [tmp_path / f"{side}.safetensors" for side in "ab"]
    for ref, path in zip(refs, paths, strict=True):
        sv.diff(*ref.split("::"), path)
    reports = [
        sv.orthogonality(*refs), sv.orthogonality(*refs, workers=3),
        sv.orthogonality(*paths, against=base), sv.orthogonality(refs[0], paths[1], against=base),
    ]  # fmt: skip
    rows = [
        {name: {key: row[key] for key in NUMBERS} for name, row in angles.rows_in(pair).items()}
        for pair in (report.to_dict()["pairs"][0] for report in reports)
    ]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    report = sv.orthogonality(*paths)
    stored = report.facts["pairs"][0]["overall"]  # weights are not known: there is no chance level
    assert {stored[key] for key in ("lift_weights", "overlap_z", "p_overlap")} == {None}
    assert stored["overlap_z_plain"] > 20
    assert [line for line in report.warnings if "--against" in line]
    assert not [line for line in reports[0].warnings if "--against" in line]
    # the weights of the first where those of the second are not known
    half = sv.orthogonality(refs[0], paths[1]).facts["pairs"][0]["overall"]
    assert half["lift_weights"] == rows[0]["overall", ""]["lift_weights"]


def test_dense_pairs_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("scores of a dense pair")

    monkeypatch.setattr(support_pass, "RowScores", refuse)
    rng = np.random.default_rng(1)
    for name in ("base", "a", "b"):
        save(tmp_path / name, {"w": rng.normal(size=(40, 8))}, torch.float32)
    row = sv.orthogonality(*(f"{tmp_path / side}::{tmp_path / 'base'}" for side in "ab"))
    assert row.facts["pairs"][0]["overall"]["overlap_z"] is None


def test_whom_rounding_thresholds(tmp_path: Path) -> None:
    refs = two_updates(tmp_path, torch.bfloat16, torch.float32)
    (tmp_path / "x").mkdir()
    fp32 = two_updates(tmp_path / "x", torch.float32, torch.bfloat16)
    kinds = [is_thresholded(SkillVector.open(ref)) for ref in (refs[0], fp32[0])]
    assert kinds == [True, False]
    assert not is_thresholded(0 * SkillVector.open(refs[0]))
    assert Request((1.0,)).by_weight == ()
