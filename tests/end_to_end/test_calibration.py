"""The statements about pairs have the false alarms that they claim: docs/calibration.md in short.

Structures in which other nulls break, few pairs each, always the same ones; bounds that chance
leaves once in thousands of draws, and a null that does not hold by far.
"""

import json
from math import sqrt
from pathlib import Path
from typing import Any

import calibration
import numpy as np
import pytest
import structures
import torch
from calibration import Share, Task, interval, measure, page, run, spread

PAIRS = 16


def is_calibrated(rows: list[dict[str, Any]], key: str) -> bool:
    """Return whether a z is about as large as chance makes it."""
    found = spread(rows, key)
    return found is not None and 0.5 < found < 1.6


@pytest.mark.parametrize(
    "structure", ["shared direction, 60 %", "shared direction and magnitudes", "signs of rows"]
)
def test_independent_updates_raise_few_alarms(structure: str) -> None:
    rows = measure(Task(structure, tuple(range(PAIRS))))
    assert is_calibrated(rows, "z")
    assert Share.below(rows, "p").count <= 4
    assert sum(row["claimed"] for row in rows) <= 2
    assert not is_calibrated(rows, "z_groups")  # the bounds see a null that does not hold
    related = measure(Task(structure, (0, 1), cosine=min(6 * spread(rows, "cosine"), 0.8)))
    assert all(row["claimed"] for row in related)


def test_supports_of_one_bf16_base_are_compared_given_its_weights() -> None:
    rows = measure(Task("bf16", tuple(range(PAIRS))))
    assert is_calibrated(rows, "overlap_z") and is_calibrated(rows, "z")
    assert min(abs(row["overlap_z_plain"]) for row in rows) > 100


def test_a_planted_cosine_is_the_one_that_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        base, one, other = structures.Pairs("iid").draw(rng, 0.3)
        updates = [{name: model[name] - base[name] for name in base} for model in (one, other)]
        found.append(structures.cosine(*updates))
    assert np.mean(found) == pytest.approx(0.3, abs=0.01)


def test_rotation_moves_the_residual_axis_and_keeps_what_a_model_computes() -> None:
    rng = np.random.default_rng(0)
    model = {name: rng.standard_normal(shape) for name, shape in structures.SHAPES.items()}
    model = {name: value for name, value in model.items() if value.ndim == 2}
    rotation = structures.random_rotation(rng, structures.HIDDEN)
    turned, layer = structures.turned(model, rotation), "model.layers.0"

    def logits(weights: structures.Model) -> np.ndarray:
        x = weights["model.embed_tokens.weight"][:5]
        inner = x @ weights[f"{layer}.mlp.up_proj.weight"].T
        x = x + inner @ weights[f"{layer}.mlp.down_proj.weight"].T
        return x @ weights["lm_head.weight"].T

    np.testing.assert_allclose(logits(model), logits(turned), atol=1e-9)
    assert abs(structures.cosine(model, turned)) < 0.05


def test_bf16_is_that_of_torch() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(structures.to_bf16(values), expected)


def test_intervals_are_wilsons() -> None:
    low, high = interval(5, 100)
    for end in (low, high):  # where the share is 1.96 standard deviations from what was found
        assert abs(0.05 - end) == pytest.approx(1.96 * sqrt(end * (1 - end) / 100))
    assert interval(0, 10)[0] == 0 and Share(5, 100).show() == f"0.050 ({low:.3f} to {high:.3f})"


class Here:
    """Measures in this process what `calibration.Workers` measure in others."""

    def measure(
        self, structure: str, numbers: range, cosine: float = 0.0, subspace: int = 0
    ) -> list[dict[str, Any]]:
        return measure(Task(structure, tuple(numbers), cosine, subspace))


def test_the_page_has_every_number_and_is_made_of_the_json() -> None:
    found = {"sparse": run("sparse", 2, 1, 1, Here())}
    results = {"facts": calibration.facts(), "pairs": 2, "planted": 1}
    results |= {"decomposed": 1, "structures": found}
    text = page(json.loads(json.dumps(results)))
    assert text.count("| sparse |") == 6 and "2 independent pairs" in text  # five tables, one key
    for key in ("z", "cosine"):
        assert f"| {found['sparse'][key]:{'.2f' if key == 'z' else '.2g'}} |" in text
    left = found["sparse"]["subspaces"]["overlap_left_z"]
    assert f"| {left:.2f} |" in text


def test_the_page_opens_with_the_worst_of_all_structures() -> None:
    def structure(alarms: int, claimed: int, found: int) -> dict[str, Any]:
        planted = [{"size": 2, "p": [0, 9]}, {"size": 4, "p": [found, 100]}]
        return {"p": [alarms, 200], "claimed": [claimed, 100], "planted": planted}

    text = calibration.answer({"a": structure(4, 3, 97), "b": structure(13, 1, 96)})
    assert "between 0.020 and 0.065" in text and "at most 3 %" in text
    assert text.endswith("4 standard deviations gets p < .05 in at least 96 % of pairs.")


def test_real_updates_are_those_of_the_demo(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make demo"):
        structures.Pairs(structures.REAL, tmp_path)
