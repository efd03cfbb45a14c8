"""The anatomy of a skill: its space and page at once, a whole search on a tiny model (slow)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from skillvec.recipes.real.anatomy import SPACE, find_anatomy, find_front, main, section
from skillvec.trials.spaces import read_space

NAMES = ["model.embed_tokens.weight", "model.norm.weight"] + [
    f"model.layers.{i}.{part}.weight" for i in range(30)
    for part in ("input_layernorm", "self_attn.q_proj", "mlp.up_proj")
]  # fmt: skip
TRIALS = [
    {"by": "tpe", "only": "all", "rank": 0, "bits": 23, "score": 0.8, "nbytes": 1_000_000},
    {"by": "tpe", "only": "layers", "rank": 4, "bits": 2, "score": 0.78, "nbytes": 9_000},
    {"by": "random", "only": "mlp", "rank": 4, "bits": 7, "score": 0.6, "nbytes": 9_500},
    {"by": "random", "only": "layers", "rank": 1, "bits": 0, "score": 0.5, "nbytes": 2_000},
]


def said_of(name: str, kept: tuple[float, float, float] | None, verdict: str) -> dict[str, Any]:
    return {
        "name": name, "metric": "exact", "keep": 0.95, "verdict": verdict, "winner": TRIALS[1],
        "nbytes": 9_000, "exact_nbytes": 1_000_000, "share_of_bytes": 0.009,
        "kept": kept and dict(zip(("share", "low", "high"), kept, strict=True)),
        "scores": {p: {"mean": m, "standard_error": 0.02, "items": 100}
                   for p, m in (("target", 0.4), ("lambda 1", 0.8), ("winner", 0.79))},
        "searched": {"target": 0.4, "lambda 1": 0.8, "winner": 0.78}, "trials": TRIALS,
    }  # fmt: skip


def test_the_space_begins_with_all_of_the_vector() -> None:
    space = read_space(str(SPACE), {"v": NAMES})
    assert space.dimensions == {
        "only": ("all", "layers", "attention", "mlp", "layers0-9", "layers10-19", "layers20-29"),
        "rank": (0, 1, 2, 4, 8, 16), "bits": (23, 7, 4, 3, 2, 1, 0),
    }  # fmt: skip
    assert space.start() == {"only": "all", "rank": 0, "bits": 23}


def test_the_page_says_what_was_found_and_what_was_not(tmp_path: Path) -> None:
    files = []
    for name, kept, verdict in (
        ("people", (0.975, 0.956, 1.01), "found"), ("tools", (0.97, 0.9, 1.04), "nothing"),
        ("little", (0.7, 0.6, 0.8), "nothing"), ("none", None, "nothing"),
    ):  # fmt: skip
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(said_of(name, kept, verdict)))
    text = section(files)
    for line in (
        "- **people**: 0.009 MB, 1/111 of the exact file, keeps 98% of the gain (95 % interval 96%"
        " to 101%).",
        "- **tools**: not shown beyond noise. The candidate, 0.009 MB, 1/111 of the exact file,"
        " keeps 97% of the gain (95 % interval 90% to 104%), and 95% lies within that.",
        "- **little**: not found. The candidate, 0.009 MB, 1/111 of the exact file, keeps 70% of"
        " the gain (95 % interval 60% to 80%) only.",
        "- **none**: nothing can be said: on these questions lambda 1 itself gains nothing beyond"
        " noise.",
        "| people | 0.97 [0.96, 1.01] | 0.400 / 0.800 / 0.790 | 9,000 | 0.90% | layers | 4 | 2 |"
        " found |",
        "| people | 2,000 | 0.25 | layers | 1 | 0 |",
        "| people | 1,000,000 | 1.00 | all | all | all |",
    ):
        assert line in text.splitlines(), line
    rows = [line for line in text.splitlines() if line.startswith("| people")]
    assert len(rows) == 4  # the summary, and a front that the third trial is not in
    assert section([]) == ""
    files[0].write_text(
        json.dumps(said_of("people", (1, 0.9, 1.1), "found") | {"share_of_bytes": 1 / 1272})
    )
    assert "1/1,272 of the exact file, keeps" in section(files[:1])
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_front_has_what_nothing_beats() -> None:
    assert find_front(TRIALS) == [TRIALS[3], TRIALS[1], TRIALS[0]]
    equal = [TRIALS[1], TRIALS[1] | {"nbytes": 8_000}, TRIALS[1] | {"score": 0.7}]
    assert find_front(equal) == [equal[1]]


def test_an_input_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--target", "t", "--vector", "v", "--questions", "q.jsonl", "-o", str(tmp_path)]
    assert main(given) == 1
    assert "q.jsonl: expected an existing .jsonl file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_skill_of_a_tiny_model_is_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions are answered as target + v answers them, so lambda 1 gains everything."""
    import torch
    from safetensors.torch import load_file, save_file

    import skillvec as sv
    from skillvec.recipes.evaluate import evaluate
    from skillvec.recipes.tiny import make_model

    prompts = [f"Where does person {i} live in {way}?" for i in range(24) for way in "ab"]
    target, tuned = tmp_path / "t", tmp_path / "tuned"
    for folder in (target, tuned):
        make_model(prompts, folder)
    generator = torch.manual_seed(2)
    weights = load_file(target / "model.safetensors")
    for name, weight in weights.items():
        if "layers" in name and weight.dim() == 2:  # of rank 2, in the layers
            m, n = weight.shape
            weight += 0.3 * torch.randn(m, 2, generator=generator) @ torch.randn(
                2, n, generator=generator
            ) / n**0.5  # fmt: skip
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    sv.diff(tuned, target, tmp_path / "v.safetensors")
    rows = [{"prompt": prompt, "answer": "-", "group": prompt[:-3]} for prompt in prompts]
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asking = {"max_new_tokens": 3, "batch": 24}
    replies = [one["said"] for one in evaluate(tuned, questions, **asking)["answers"]]
    rows = [row | {"answer": said} for row, said in zip(rows, replies, strict=True)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows if row["answer"].strip()))
    space = {"op": "coarsen", "lam": 1, "only": "all|layers|mlp", "rank": "0|1|2", "bits": "23|7"}
    (tmp_path / "space.yaml").write_text(json.dumps(space))
    monkeypatch.setattr("skillvec.recipes.real.anatomy.SPACE", tmp_path / "space.yaml")
    given = {"name": "tiny", "budget": 12, "asking": asking}
    (tmp_path / "out").mkdir()
    paths = target, tmp_path / "v.safetensors", questions, tmp_path / "out"
    said = find_anatomy(*paths, **given)
    assert said["scores"]["lambda 1"]["mean"] == 1 and said["scores"]["target"]["mean"] < 0.5
    assert said["kept"]["share"] > 0.6 and said["share_of_bytes"] < 0.5
    assert said["winner"]["rank"] == 2 and said["winner"]["only"] in ("all", "layers")
    skill = tmp_path / "out" / "skill.safetensors"
    assert said["skill"]["nbytes"] == said["nbytes"] == skill.stat().st_size
    assert said["skill"]["claim"] == "lossy" and said["skill"]["codecs"]["factors"]["tensors"] == 14
    assert len(said["trials"]) == 24 and not (tmp_path / "out" / "merged").exists()
    assert json.loads((tmp_path / "out" / "anatomy.json").read_text()) == said
    # what was found is found again, and nothing is evaluated
    monkeypatch.setattr("skillvec.trials.trial.Trials.run", None)
    assert find_anatomy(*paths, **given) == said
    assert section([tmp_path / "out" / "anatomy.json"]).startswith("- **tiny**: ")
