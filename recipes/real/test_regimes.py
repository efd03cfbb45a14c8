"""The section about 16 bits, from files of seeds."""

import json
from pathlib import Path
from typing import Any

from skillvec.recipes.real import regimes
from skillvec.recipes.real.results import SCHEMA
from skillvec.recipes.real.seed import REGIME_LAMBDAS, REGIMES, SIDES

NUMEL = 1000


def write(path: Path, seed: int, gain: float | None = 0.5, score: float = 0.25) -> Path:
    """Write what a seed's file holds of regimes: every skill has the same numbers but its bytes."""
    arms = {"SFT only": {"means": {"exact": 0.125}, "marks": {"exact": "01000000"}}}
    for name in REGIMES:
        for lam in REGIME_LAMBDAS:
            arms[f"{name} lambda {lam:g}"] = {
                "means": {"exact": score * lam, "realised": gain}, "marks": {"exact": "01010000"},
            }  # fmt: skip
    first, *others = REGIMES.values()
    row = {"numel": NUMEL, "density_a": 0.999, "density_b": 0.25,
           "cosine": None if gain is None else 0.8, "norm_a": 0.0 if gain is None else 2.0,
           "norm_b": 1.0}  # fmt: skip
    pairs = [{"a": first.removesuffix(".safetensors"), "b": other, "overall": row, "parts": []}
             for other in others]  # fmt: skip
    found: dict[str, Any] = {
        "schema": SCHEMA, "seed": seed, "regimes": {"pairs": pairs},
        "scores": {f"regimes on {side}": {"groups": [], "arms": arms} for side in SIDES},
        "nbytes": {stage: 500 * (at + 1) for at, stage in enumerate(REGIMES.values())},
    }  # fmt: skip
    path.write_text(json.dumps(found))
    return path


def test_what_is_kept_and_every_score_is_a_mean_over_seeds(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.json", 1), write(tmp_path / "b.json", 4, gain=0.7, score=0.35)]
    text = regimes.section(files)
    assert "of seeds 1, 4:" in text and "Exact match on 8 questions" in text
    assert "| fp32 | 99.9% | 4.00 | 1.000 | 1.00 | 0.60, 0.60 / 0.60 |" in text
    assert "| saved as bf16 | 25.0% | 8.00 | 0.800 | 0.50 | 0.60, 0.60 / 0.60 |" in text
    assert "| bf16 | trained in bf16 | 0.125 | 0.075 | 0.150 | 0.300 | 0.450 | 0.600 |" in text
    assert text.count("\n| ") == 2 * 2 + len(REGIMES) * (1 + len(SIDES))


def test_a_skill_of_nothing_has_neither_angle_nor_gain(tmp_path: Path) -> None:
    text = regimes.section([write(tmp_path / "a.json", 0, gain=None)])
    assert "of seed 0:" in text and "| 8.00 | - | - | -, - / - |" in text


def test_seeds_without_regimes_give_no_section(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", 0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"regimes": None}))
    assert regimes.section([path]) == ""
