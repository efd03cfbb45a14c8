"""Outputs of updates on inputs: against sums over the very inputs, by brute force in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import load, perturbed, save, toy
from moments import TOKENS, write_moments

import skillvec as sv
from skillvec.checkpoints.input_moments import open_moments
from skillvec.cli.commands import main
from skillvec.errors import FormatError, IncompatibleError

pytestmark = pytest.mark.usefixtures("one_thread")

Inputs = dict[str, np.ndarray]  # by entry: tokens x values
LAYERS = ("model.layers.0", "model.layers.1")
SHARED = ("q_proj", "k_proj")


def make_inputs(widths: dict[str, int]) -> Inputs:
    """Return inputs of unequal directions with a mean."""
    rng = np.random.default_rng(5)
    return {
        entry: rng.standard_normal((TOKENS, width)) * rng.lognormal(0, 1, width) + rng.random(width)
        for entry, width in widths.items()
    }


class Case:
    """Two updates of one base whose matrices have inputs: some shared, some turned, one without."""

    def __init__(self, folder: Path) -> None:
        base = toy(0, width=16, vocabulary=24)
        torch.manual_seed(0)
        for layer in LAYERS:  # as GPT-2 keeps it
            base[f"{layer}.mlp.c_fc.weight"] = 0.1 * torch.randn(16, 40).bfloat16()
            base[f"{layer}.self_attn.k_proj.weight"] = 0.1 * torch.randn(8, 16).bfloat16()
        models = {"base": base, "one": perturbed(base, 1), "other": perturbed(base, 2)}
        for name, tensors in models.items():
            save(folder / name, tensors)
        self.pair = [f"{folder}/{name}::{folder}/base" for name in ("one", "other")]
        kept = {name: t.double().numpy() for name, t in load(folder / "base").items()}
        self.deltas = [
            {name: t.double().numpy() - kept[name] for name, t in load(folder / model).items()}
            for model in ("one", "other")
        ]
        self.matrices = [name for name, values in kept.items() if values.ndim == 2]
        self.weights: dict[str, Any] = {}
        widths: dict[str, int] = {}
        for name in self.matrices:
            if "embed" in name:
                continue
            side = "rows" if "c_fc" in name else "columns"
            entry = name.removesuffix(".weight")
            for shared in SHARED:
                entry = entry.replace(shared, SHARED[0])
            self.weights[name] = {"entry": entry, "input": side}
            widths[entry] = kept[name].shape[0 if side == "rows" else 1]
        self.inputs = make_inputs(widths)
        self.file = write_moments(folder / "moments.safetensors", self.inputs, self.weights)

    def outputs(self, number: int, name: str) -> np.ndarray:
        """Return what one update adds to the outputs of a matrix: tokens x outputs."""
        said = self.weights[name]
        update = self.deltas[number][name]
        x = self.inputs[said["entry"]]
        return x @ update if said["input"] == "rows" else x @ update.T


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("activations"))


def expected_pair(case: Case, names: list[str]) -> dict[str, float]:
    """Return cosine and CKA from the outputs themselves."""
    ys = [[case.outputs(number, name) for name in names] for number in (0, 1)]
    one, other = (np.concatenate([y.ravel() for y in side]) for side in ys)
    ckas, sizes = [], []
    for a, b in zip(*ys, strict=True):
        sizes.append(np.linalg.norm(a) * np.linalg.norm(b))
        a, b = a - a.mean(0), b - b.mean(0)
        ckas.append(np.linalg.norm(a.T @ b) ** 2
                    / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)))  # fmt: skip
    cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    return {"cosine_outputs": cosine, "cka_outputs": np.average(ckas, weights=sizes)}


def expected_vector(case: Case, number: int, names: list[str]) -> dict[str, float]:
    """Return energy in the active subspace, its chance and the gain from inputs and outputs."""
    energy = inside = chance = moved = white = 0.0
    for name in names:
        said, update = case.weights[name], case.deltas[number][name]
        update = update.T if said["input"] == "rows" else update
        x = case.inputs[said["entry"]]
        _, values, directions = np.linalg.svd(x, full_matrices=False)
        held = np.cumsum(values**2) / (values**2).sum()
        count = int(np.argmax(held >= 0.9)) + 1
        own = (update**2).sum()
        energy += own
        inside += ((update @ directions[:count].T) ** 2).sum()
        chance += own * count / x.shape[1]
        moved += (case.outputs(number, name) ** 2).sum() / TOKENS
        white += own * (x**2).sum() / TOKENS / x.shape[1]
    return {"energy_active": inside / energy, "active_chance": chance / energy,
            "gain_outputs": moved / white}  # fmt: skip


def rows_of(case: Case, entry: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """Return the rows of a level and the matrices that they are of."""
    known = [*case.weights]
    rows = [(entry["overall"], known)]
    for layer in LAYERS:
        (row,) = [row for row in entry["layers"] if row["name"] == layer]
        rows.append((row, [name for name in known if name.startswith(layer)]))
    return rows + [(row, [row["name"]]) for row in entry["tensors"] if row["name"] in known]


def test_numbers_are_those_of_the_inputs_themselves(case: Case) -> None:
    report = sv.orthogonality(*case.pair, activations=case.file, device="cpu", workers=2)
    (pair,) = report.facts["pairs"]
    for row, names in rows_of(case, pair):
        for key, value in expected_pair(case, names).items():
            assert row[key] == pytest.approx(value, rel=2e-4, abs=1e-5), (key, names)
    for number, entry in enumerate(report.facts["norms"]):
        for row, names in rows_of(case, entry):
            for key, value in expected_vector(case, number, names).items():
                assert row[key] == pytest.approx(value, rel=2e-4), (key, names)
    (row,) = [row for row in pair["tensors"] if "embed" in row["name"]]
    assert row["cosine_outputs"] is None and row["cka_outputs"] is None  # no inputs are known
    said = report.facts["activations"]
    assert (said["matrices"], said["without"]) == (len(case.weights), 1)
    assert said["tokens"] == TOKENS
    alone = sv.norms(case.pair[0], activations=case.file, device="cpu").facts["norms"]
    assert alone[0]["overall"] == report.facts["norms"][0]["overall"]


def test_the_same_digits_whatever_the_workers(case: Case) -> None:
    found = [
        sv.orthogonality(*case.pair, activations=case.file, device="cpu", workers=workers)
        for workers in (1, 3)
    ]
    one, other = (
        [json.dumps(report.to_dict()[key]) for key in ("pairs", "norms")] for report in found
    )
    assert one == other


def test_an_update_agrees_with_itself_and_not_with_its_opposite(case: Case) -> None:
    whole = sv.SkillVector.open(case.pair[0])
    for factor, cosine in ((2.0, 1.0), (-1.0, -1.0)):
        report = sv.orthogonality(whole, factor * whole, activations=case.file, device="cpu")
        overall = report.facts["pairs"][0]["overall"]
        assert overall["cosine_outputs"] == pytest.approx(cosine, abs=1e-6)
        assert overall["cka_outputs"] == pytest.approx(1, abs=1e-5)


def test_the_plan_says_what_memory_it_takes(case: Case) -> None:
    plans = [
        sv.norms(case.pair[0], activations=file, device="cpu", workers=1, dry_run=True)
        for file in (None, case.file)
    ]
    more = plans[1].facts["memory_nbytes"] - plans[0].facts["memory_nbytes"]
    largest = max(
        case.deltas[0][name].size + case.inputs[said["entry"]].shape[1] ** 2
        for name, said in case.weights.items()
    )
    assert more == 3 * 4 * largest


def test_the_screen_shows_outputs_where_they_are_known(case: Case) -> None:
    words = ["orthogonality", *case.pair]
    plain, shown = (
        CliRunner().invoke(main, [*words, *more]).output
        for more in ([], ["--activations", str(case.file), "--device", "cpu"])
    )
    assert "CKA" in shown and "CKA" not in plain
    assert "50 tokens" in shown and "1 matrices without inputs there" in " ".join(shown.split())


REFUSED = {
    "another schema": (lambda about, inputs: about.update(schema=2), FormatError, "schema 2"),
    "no weights": (lambda about, inputs: about.pop("weights"), FormatError, "format.md"),
    "no tokens": (lambda about, inputs: about.update(tokens="many"), FormatError, "format.md"),
    "another kind": (lambda about, inputs: about.update(kind="vector"), FormatError, "calibrate"),
    "a lost entry": (
        lambda about, inputs: inputs.pop("model.layers.1.mlp.up_proj"), FormatError, "up_proj"),
    "other names": (
        lambda about, inputs: about.update(
            weights={f"x.{name}": said for name, said in about["weights"].items()}),
        IncompatibleError, "x.model.layers.0"),
    "another width": (
        lambda about, inputs: inputs.update(
            {"model.layers.0.mlp.up_proj": np.ones((4, 7))}),
        IncompatibleError, r"mlp.up_proj.weight \[32, 16\]: inputs of 7 values"),
    "not finite": (
        lambda about, inputs: inputs.update(
            {"model.layers.0.mlp.up_proj": np.full((4, 16), np.nan)}),
        FormatError, "up_proj.moment holds NaN"),
    "nothing but zeros": (
        lambda about, inputs: inputs.update(
            {"model.layers.0.mlp.up_proj": np.zeros((4, 16))}),
        FormatError, "up_proj: inputs that are 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(
    fault: str, case: Case, tmp_path: Path
) -> None:
    change, error, words = REFUSED[fault]
    about, inputs = {"weights": dict(case.weights), "schema": 1}, dict(case.inputs)
    about |= {"tokens": TOKENS, "kind": "moments"}
    change(about, inputs)
    weights = about.pop("weights", None)
    file = write_moments(tmp_path / "m.safetensors", inputs, weights, **about)
    with pytest.raises(error, match=words):
        sv.norms(case.pair[0], activations=file, device="cpu")


def test_moments_of_16_bits_are_refused(case: Case, tmp_path: Path) -> None:
    tensors = {name: value.half() for name, value in load(case.file).items()}
    about = {"kind": "moments", "schema": 1, "tokens": 1, "weights": case.weights}
    save(tmp_path / "m.safetensors", tensors, {"skillvec": json.dumps(about)})
    with pytest.raises(FormatError, match="expected F32"):
        open_moments(tmp_path / "m.safetensors")


def test_tensors_that_are_left_out_are_no_matrices_without_inputs(case: Case) -> None:
    report = sv.orthogonality(
        *case.pair, activations=case.file, device="cpu", include=["*self_attn*", "*embed*"]
    )
    said = report.facts["activations"]
    assert (said["matrices"], said["without"]) == (4, 1)
    with pytest.raises(IncompatibleError, match="knows none of the 1 matrices"):
        sv.orthogonality(*case.pair, activations=case.file, include=["*embed*"])
