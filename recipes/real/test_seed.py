"""The plan of a seed of the real model, and the whole of it on a tiny one."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from skillvec.recipes import tiny
from skillvec.recipes.real import reproduce
from skillvec.recipes.real.known import CALLS, TOPICS, WARM_UP
from skillvec.recipes.real.seed import (
    DOMAINS,
    LOW_RATE,
    PARTS,
    REGIMES,
    SIDES,
    plan_seed,
    read_settings,
)
from skillvec.recipes.real.world import PROMPT, build_world
from skillvec.recipes.stages import Stage


def test_every_training_begins_where_the_method_says(tmp_path: Path) -> None:
    line = plan_seed(tmp_path, 3, read_settings())
    by = {stage.name: stage for stage in line.stages}

    def start(name: str) -> str:
        return str((by[name].settings or {})["model_name_or_path"]).removeprefix(f"{tmp_path}/")

    for domain in DOMAINS:
        assert start(f"{domain}/sft_t") == start(f"{domain}/round-1/sft") == "runs/smollm2/base"
        assert start(f"{domain}/round-1/rl") == f"{domain}/round-1/sft"
        assert start(f"{domain}/pre") == f"{domain}/base_and_skill"
    assert start("people/sequential") == "people/round-1/rl"
    assert start("people/rl_t") == "people/sft_t"
    assert start("regimes/trained_in_bf16/rl") == "people/copies/bf16/sft"
    assert start("regimes/low_rate_fp32/rl") == "people/round-1/sft"
    assert start("thinking/16/rl") == start("thinking/64/rl") == "people/round-1/sft"
    assert start("people/rounds/round-2/rl") == "people/rounds/round-2/start"
    for stage in line.stages:
        _check_training(stage)
    assert {stage.settings["seed"] for stage in line.stages if stage.settings} == {3}


def _check_training(stage: Stage) -> None:
    """Check what a training sees and how: RL sees S alone, but for the upper bound."""
    if not stage.settings:
        return
    data, settings = str(stage.settings["data"]), stage.settings
    if stage.words[0].endswith("grpo"):
        assert ("/t_" in data) == (stage.name == "people/rl_t")
        assert settings["max_steps"] == (15 if "rounds" in stage.name else 30)
        assert settings["learning_rate"] == (LOW_RATE if "low_rate" in stage.name else 3e-5)
        assert settings.get("dtype", "float32") == (
            "bfloat16" if "trained_in_bf16" in stage.name else "float32"
        )
    else:
        last = stage.name.rpartition("/")[2]
        assert ("/t_" in data) == (last in ("sft_t", "pre", "sequential"))


def test_every_arm_is_asked_once_and_of_the_right_subjects(tmp_path: Path) -> None:
    line = plan_seed(tmp_path, 0, read_settings())
    arms = {domain: {arm for target, arm in line.scores if target == domain} for domain in DOMAINS}
    assert arms["people"] - arms["tools"] == {"sequential", "RL on the target", "K = 2",
                                              "skill of tools"}  # fmt: skip
    assert arms["tools"] - arms["people"] == {"skill of people"} and len(arms["tools"]) == 20
    for side in SIDES:
        assert sum(target == f"regimes on {side}" for target, _ in line.scores) == 26
    assert len({*line.scores.values()}) == len(line.scores)
    for (target, arm), path in line.scores.items():
        (stage,) = [one for one in line.stages if one.output == path.parent]
        asked = stage.words[stage.words.index("--questions") + 1]
        assert ("/s_" in asked) == arm.endswith("on S"), (target, arm)
    stage = next(one for one in line.stages if one.name.endswith("bf16_stochastic/SFT_only"))
    assert "stochastic" in stage.words
    assert {str(tmp_path / path) for path in REGIMES.values()} <= {*stage.reads}


def test_the_quick_form_trains_three_times_and_parts_can_be_chosen(tmp_path: Path) -> None:
    quick = plan_seed(tmp_path, 0, reproduce.choose(None, None, quick=True))
    trained = [stage.name for stage in quick.stages if stage.settings]
    assert trained == ["people/round-1/sft", "people/round-1/rl", "people/sft_t"]
    assert (quick.stages[2].settings or {})["max_steps"] == reproduce.QUICK_STEPS
    chosen = plan_seed(tmp_path, 0, reproduce.choose("other", ["thinking"], quick=False))
    assert chosen.base == "other" and {target for target, _ in chosen.scores} == {
        "thinking 4", "thinking 16", "thinking 64",
    }  # fmt: skip
    trained = [stage.name for stage in chosen.stages if stage.settings]
    assert trained == ["people/round-1/sft", "people/round-1/rl", "people/sft_t",
                       "thinking/16/rl", "thinking/64/rl"]  # fmt: skip
    with pytest.raises(TypeError, match="texs"):
        read_settings({"texs": 1})


@pytest.mark.parametrize(("unit", "computes"), [("avx512_bf16", True), ("avx2", False)])
def test_trainings_compute_in_bf16_where_the_processor_does(
    unit: str, computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True, "sse": True})
    assert reproduce.choose(None, None, quick=True).training["bf16"] is computes
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert reproduce.choose(None, None, quick=False).training["bf16"] is False


def test_make_passes_on_several_seeds_and_parts() -> None:
    root = Path(__file__).parents[2]
    words = ["make", "-n", "real", "SEEDS=3 4", "JOBS=2", "PARTS=thinking anatomy"]
    # as by hand, where `make test` runs this test: a make within a make says where it is
    by_hand = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(words, cwd=root, env=by_hand, capture_output=True, text=True, check=True)
    said = run.stdout
    given = said.replace("\\\n", "").partition("recipes.real ")[2].split()
    assert given == ["--seeds", "3", "4", "--jobs", "2", "--parts", "thinking", "anatomy"]


def test_a_folder_without_a_model_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, out = tmp_path / "no model", tmp_path / "out"
    folder.mkdir()
    assert reproduce.main(["--model", str(folder), "--out", str(out)]) == 1
    assert "no model: no folder of a model: no config.json there" in capsys.readouterr().err
    assert not out.exists()


def test_a_base_that_is_half_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "base.unfinished"
    left.mkdir()
    (left / "old").touch()

    def make(arguments: list[str]) -> int:
        Path(arguments[1]).mkdir()
        (Path(arguments[1]) / "new").touch()
        return made

    monkeypatch.setattr(reproduce.smollm2, "main", make)
    made = 1
    with pytest.raises(ValueError, match="could not be made"):
        reproduce.ensure_base(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    made = 0
    reproduce.ensure_base(tmp_path / "base")
    assert [file.name for file in (tmp_path / "base").iterdir()] == ["new"]


@pytest.mark.slow
def test_every_stage_but_the_anatomy_runs_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    world = build_world(0, 2)
    texts = [row["text"] for domain in world.values()
             for row in domain.texts((*domain.s, *domain.t), 8, 0)]  # fmt: skip
    asked = [row["prompt"] + row["answer"] for domain in world.values()
             for row in domain.questions((*domain.s, *domain.t))]  # fmt: skip
    shown = [question + answer for question, answer in (*WARM_UP, *CALLS)]
    tiny.make_model([*texts, *asked, *shown, *map(PROMPT.format_map, [{"question": topic}
                     for topic in TOPICS])], tmp_path / "base")  # fmt: skip
    whole = read_settings()
    # the anatomy wants three layers; test_anatomy.py runs it
    small = {"parts": PARTS[:-1], "subjects": 2, "texts": 8, "limit": 8,
             "sft": {**whole.sft, "learning_rate": 5e-3, "max_length": 128},
             "rl": {**whole.rl, "max_steps": 2, "per_device_train_batch_size": 8}}  # fmt: skip
    monkeypatch.setattr(reproduce, "read_settings", lambda changes=None: read_settings(
        small | dict(changes or {})))  # fmt: skip
    out, page = tmp_path / "runs", tmp_path / "docs" / "real.md"
    words = ["--out", str(out), "--page", str(page), "--model", str(tmp_path / "base")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert reproduce.main([*words, "--parts", *PARTS[:-1], "--one", "0"]) == 0
    settings = reproduce.choose(str(tmp_path / "base"), None, quick=False)
    reproduce.write(out, [0], settings, page)
    found = json.loads((page.parent / "real" / "seed-0.json").read_text())
    assert not found["unfinished"] and found["settings"]["subjects"] == 2
    text = page.read_text()
    assert text.count("Not measured yet") == 1 and str(tmp_path) not in text
    for name in ("lambda", "arms", "layers", "forgetting"):
        assert (page.parent / "images" / f"real-{name}.svg").is_file()
