"""The pipeline: its configuration, the order and arithmetic of the rounds, resuming, a real run."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from skillvec.recipes import checks, grpo, past, sft, stages
from skillvec.recipes.dry_run import show_stages
from skillvec.recipes.evaluate import load_tokenizer
from skillvec.recipes.past import Config, plan, read_config, row_faults
from skillvec.recipes.stages import Pipeline, flags, run_stages, states

MINI = Path(__file__).parents[1] / "recipes" / "mini" / "past.yaml"


def whole(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Return a configuration with two parts and one target, all files in tmp_path."""
    for name in ("s1", "s2", "t"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"about {name}"}))
        asked = {"prompt": f"who is {name}?", "answer": name}
        (tmp_path / f"{name}_questions.jsonl").write_text(json.dumps(asked))
    parts = [{"sft": [str(tmp_path / f"s{k}.jsonl")], "rl": str(tmp_path / f"s{k}_questions.jsonl")}
             for k in (1, 2)]  # fmt: skip
    asked = {"data": str(tmp_path / "t_questions.jsonl")}
    target = {"sft": [str(tmp_path / "t.jsonl")], "evaluate": asked}
    return {
        "out": str(tmp_path / "out"), "base": str(tmp_path / "base"),
        "training": {"use_cpu": True, "bf16": False, "report_to": "none"},
        "sft": [{"learning_rate": 1e-3}],
        "rl": {"max_steps": 2, "rewards": ["skillvec.recipes.test_past:vary"]},
        "source": parts, "targets": {"T": target},
        "evaluate": {"run": "skillvec.recipes.evaluate", "with": {"metrics": ["exact"]}},
    } | changes  # fmt: skip


def written(tmp_path: Path, settings: Any) -> Path:
    path = tmp_path / "past.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


# -------------------------------------------------------------------------------- configuration


def test_the_configurations_in_the_repository_are_read() -> None:
    found = sorted(MINI.parents[1].glob("*/past.yaml"))
    assert {path.parent.name for path in found} == {"mini", "squad", "loogle", "toolbench"}
    for path in found:
        line = plan(read_config(path), "base")
        assert line.scores and len({stage.name for stage in line.stages}) == len(line.stages)


def test_the_configuration_in_the_documentation_is_read(tmp_path: Path) -> None:
    text = (MINI.parents[2] / "docs" / "past.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    path = tmp_path / "past.yaml"
    path.write_text(shown)
    line = plan(read_config(path), "base")
    assert ("news", "lambda -1") in line.scores and ("news", "shuffled, lambda 1") in line.scores
    assert set(yaml.safe_load(shown)) == set(Config.__dataclass_fields__)  # every setting is shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lamda": 1}, "unknown lamda; did you mean `lam`"),
        ({"sft": {"max_steps": 1}}, "sft: expected a list, found"),
        ({"lam": ["one"]}, "lam: expected a finite number, found 'one'"),
        ({"lam": [float("nan")]}, "lam: expected a finite number, found nan"),
        ({"parameters": -1}, "parameters: expected a finite number, found -1"),
        ({"processes": 0}, "processes: expected a whole number of at least 1, found 0"),
        ({"launch": {"a": 1}}, "launch: expected a name, a file or a list of words, found"),
        ({"launch": ["no-such-command"]}, "launch: no command no-such-command here"),
        ({"sft": [None]}, "sft: expected settings, found None"),
        ({"targets": {"../x": {"sft": ["a.jsonl"], "evaluate": {}}}}, "target '../x': its name"),
        ({"targets": {3: {"sft": ["a.jsonl"], "evaluate": {}}}}, "target 3: its name becomes"),
        ({"targets": {"t": {"sft": ["a.jsonl"], "evaluate": "q.jsonl"}}}, "target t: expected"),
        ({"source": [{"sft": ["a.jsonl"], "rl": ["q.jsonl"]}]}, "source part 1: expected"),
        ({"evaluate": {"run": "skillvec.recipes.evaluate", "with": []}}, "evaluate: expected run"),
        ({"prepare": [{"run": "a"}]}, "prepare 1: expected out, run and `with`"),
        (
            {"prepare": [{"run": "skillvec.recipes.sft", "out": "a"}]},
            "prepare 1: expected data and model_name_or_path in `with`",
        ),
        ({"evaluate": {"runs": "a"}}, "evaluate: expected run and `with`"),
        ({"source": []}, "at least one part in source"),
        ({"targets": {}}, "at least one part in source and one in targets"),
        ({"sft": [{}, {}]}, "source part 1: expected rl and sft, with a list of 2 files"),
        ({"targets": {"T": {"sft": ["a"]}}}, "target T: expected evaluate and sft"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = written(tmp_path, whole(tmp_path, **change))
    with pytest.raises(ValueError, match=words):
        read_config(path)


def test_missing_settings_and_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = whole(tmp_path)
    del settings["rl"]
    del settings["sft"]
    with pytest.raises(ValueError, match=r"rl is missing\n.*sft is missing"):
        read_config(written(tmp_path, settings))
    with pytest.raises(ValueError, match="expected settings"):
        read_config(written(tmp_path, "words"))
    assert past.main([str(tmp_path / "absent.yaml")]) == 2
    said = capsys.readouterr().err
    assert "absent.yaml: no such file" in said and "loogle, mini, squad, toolbench" in said


def test_parts_that_share_a_row_are_refused(tmp_path: Path) -> None:
    settings = whole(tmp_path)
    config = Config(**settings)
    assert row_faults(config) == []
    with open(tmp_path / "s2.jsonl", "a") as file:
        file.write("\n" + json.dumps({"text": "about s1"}))
    (fault,) = row_faults(config)
    assert re.search(r"parts 1 and 2 share 1 rows.*about s1", fault)


def test_a_target_that_rl_saw_is_refused(tmp_path: Path) -> None:
    settings = whole(tmp_path)
    seen = {"prompt": "who is s1?", "answer": "someone", "group": "1"}
    (tmp_path / "t_questions.jsonl").write_text(json.dumps(seen))
    (fault,) = row_faults(Config(**settings))
    assert re.search(r"target T: 1 of its questions .* RL data", fault)


def test_options_are_spelled_as_flags() -> None:
    options = {"max_new_tokens": 5, "metrics": ["exact", "f1"], "figures": True, "limit": None}
    words = ["--max-new-tokens", "5", "--metrics", "exact", "f1", "--figures"]
    assert flags(options | {"other": False}) == words


def test_a_base_on_the_hub_is_fetched_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(
        name: str, revision: str | None, local_files_only: bool, allow_patterns: list[str]
    ) -> str:
        asked.append((name, revision, local_files_only))
        assert "*.safetensors" in allow_patterns and "*.bin" not in allow_patterns
        if local_files_only or name == "absent/model":
            raise OSError("not in the cache")
        return "cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = Config(**whole(tmp_path, base="org/name@abc"))
    assert past.find_base(config, fetch=True) == "cache/snapshot"
    assert past.find_base(config, fetch=False) == "org/name@abc"  # a dry run fetches nothing
    assert asked == [("org/name", "abc", False), ("org/name", "abc", True)]
    with pytest.raises(ValueError, match="base absent/model: no such folder"):
        past.find_base(Config(**whole(tmp_path, base="absent/model")), fetch=True)
    made = [{"run": "skillvec.recipes.mini.prepare", "out": "made"}]
    config = Config(**whole(tmp_path, base="made/model", prepare=made))
    assert past.find_base(config, fetch=True) == "made/model"


# -------------------------------------------------------------------------------- the plan


def names_of(line: Pipeline) -> list[str]:
    return [stage.name for stage in line.stages]


def test_rounds_come_in_the_order_of_the_paper(tmp_path: Path) -> None:
    line = plan(Config(**whole(tmp_path, lam=[1.0, -1.0], controls=["random"])), "base")
    assert names_of(line) == [
        "round-1/sft", "round-1/rl", "round-1/skill.safetensors",
        "round-2/sft", "round-2/start", "round-2/rl", "round-2/skill.safetensors",
        "controls/random.safetensors", "targets/T/sft",
        "targets/T/lambda_1", "targets/T/lambda_-1", "targets/T/random_lambda_1",
        "scores/T/base.json", "scores/T/SFT_only.json", "scores/T/lambda_1.json",
        "scores/T/lambda_-1.json", "scores/T/random_lambda_1.json", "angles",
    ]  # fmt: skip
    by = {stage.name: stage for stage in line.stages}
    out = tmp_path / "out"
    for name in ("round-1/sft", "round-2/sft", "targets/T/sft"):
        assert by[name].settings is not None
        assert by[name].settings["model_name_or_path"] == "base"
    begun = by["round-2/rl"].settings
    assert begun is not None and begun["model_name_or_path"] == str(out / "round-2" / "start")
    assert by["round-2/start"].reads == (
        str(out / "round-2" / "sft"), str(out / "round-1" / "skill.safetensors"),
    )  # fmt: skip
    # v_2 is against the round's SFT model, not against where RL began
    assert by["round-2/skill.safetensors"].reads == (
        str(out / "round-2" / "rl"), str(out / "round-2" / "sft"),
    )  # fmt: skip


def test_two_steps_of_sft_follow_each_other(tmp_path: Path) -> None:
    line = Pipeline(tmp_path, "base")
    line.sft("sft", "base", [{"num_train_epochs": 3}, {"num_train_epochs": 1}], ["a", "b"])
    first, second = line.stages
    assert first.name == "sft-step-1" and second.name == "sft"
    assert second.settings is not None
    assert second.settings["model_name_or_path"] == str(first.output)
    assert second.settings["data"] == "b" and second.settings["num_train_epochs"] == 1
    with pytest.raises(ValueError, match="two stages are named sft"):
        line.sft("sft", "base", [{}], ["a"])


def test_a_launcher_stands_before_training_alone(tmp_path: Path) -> None:
    config = Config(**whole(tmp_path, launch=["accelerate", "launch", "--num_processes", "8"]))
    line = plan(config, "base")
    words = {stage.name: stages.command(line, stage) for stage in line.stages}
    assert words["round-1/rl"][:5] == ["accelerate", "launch", "--num_processes", "8", "-m"]
    assert words["round-1/rl"][5] == "skillvec.recipes.grpo"
    assert words["scores/T/base.json"][:3] == [sys.executable, "-m", "skillvec.recipes.evaluate"]
    assert words["round-1/skill.safetensors"][:3] == [sys.executable, "-m", "skillvec"]


# -------------------------------------------------------------------------------- running


def write_model(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')


def write_base(folder: Path) -> None:
    """Write a model of one tensor with a tokenizer of two words."""
    write_model(folder, {"model.norm.weight": torch.zeros(64)})
    words = Tokenizer(WordLevel({"who": 0, "is": 1}, unk_token="is"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


MOVED = {"s1.jsonl": 1.0, "s2.jsonl": 2.0, "t.jsonl": 4.0,
         "s1_questions.jsonl": 8.0, "s2_questions.jsonl": 16.0}  # fmt: skip


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace both trainers by one that adds a known number, and the evaluation by a sum."""
    calls: list[dict[str, Any]] = []

    def train(arguments: Sequence[str]) -> int:
        settings = yaml.safe_load(Path(arguments[1]).read_text())
        calls.append(settings)
        weights = load_file(Path(settings["model_name_or_path"]) / "model.safetensors")
        by = MOVED[Path(settings["data"]).name]
        moved = {name: weight + by for name, weight in weights.items()}
        write_model(Path(settings["output_dir"]), moved)
        return 0

    def evaluate(arguments: Sequence[str]) -> int:
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        weights = load_file(Path(given["--model"]) / "model.safetensors")
        mean = float(weights["model.norm.weight"].mean())
        metrics = {"exact": {"mean": mean, "standard_error": None}}
        Path(given["--output"]).write_text(json.dumps({"metrics": metrics}))
        return 0

    for module in (sft, grpo):
        fake = SimpleNamespace(main=train, dataclasses=module.dataclasses)
        monkeypatch.setitem(sys.modules, module.__name__, fake)  # type: ignore[arg-type]
    fake = SimpleNamespace(main=evaluate, load_tokenizer=load_tokenizer)
    monkeypatch.setitem(sys.modules, "skillvec.recipes.evaluate", fake)  # type: ignore[arg-type]
    return calls


@pytest.mark.slow
def test_skills_add_up_over_the_rounds(
    tmp_path: Path,
    trained: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_base(tmp_path / "base")
    path = written(tmp_path, whole(tmp_path, lam=[-0.5]))
    assert past.main([str(path), "--dry-run"]) == 0
    assert trained == [] and not (tmp_path / "out").exists()
    assert past.main([str(path)]) == 0
    assert len(trained) == 5  # 2 x SFT and RL on the source, SFT on the target
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["T"]
    # v_1 = 8; RL of round 2 begins at sft_2 + 8 and adds 16; v_2 = 24 holds both
    means = {arm: metrics["exact"]["mean"] for arm, metrics in scores.items()}
    assert means == {"base": 0.0, "SFT only": 4.0, "lambda -0.5": -8.0}
    assert (tmp_path / "out" / "angles" / "report.json").is_file()
    shown = capsys.readouterr().out
    assert "$ skillvec diff" in shown and "SFT only" in shown
    # a second run trains nothing; a changed text trains its stage and what follows
    trained.clear()
    assert past.main([str(path)]) == 0 and trained == []
    with monkeypatch.context() as patched:  # what is done needs nothing that a training needs
        patched.delattr(checks, "setting_faults")
        patched.delattr(checks, "base_faults")
        assert past.main([str(path), "--dry-run"]) == 0
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "news about t"}))
    monkeypatch.setitem(MOVED, "t.jsonl", 5.0)
    capsys.readouterr()
    assert past.main([str(path)]) == 0
    assert [call["output_dir"] for call in trained] == [str(tmp_path / "out" / "targets/T/sft")]
    shown = capsys.readouterr().out
    assert "round-2/skill.safetensors: done before" in shown
    assert "$ skillvec apply" in shown and "$ skillvec orthogonality" in shown


def test_a_stage_that_was_cut_is_run_again(
    tmp_path: Path, trained: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "s1.jsonl").write_text("{}")
    line = Pipeline(tmp_path / "out", str(tmp_path / "base"))
    output = line.sft("sft", tmp_path / "base", [{}], [tmp_path / "s1.jsonl"])
    train = sys.modules["skillvec.recipes.sft"].main

    def stop(arguments: Sequence[str]) -> int:
        for step in (7, 10, 13):
            (output / f"checkpoint-{step}").mkdir(parents=True)
            if step != 13:  # cut while it was written
                (output / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["skillvec.recipes.sft"], "main", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stages(line)
    assert [state for _, state, _ in states(line)] == ["begun"]
    monkeypatch.setattr(sys.modules["skillvec.recipes.sft"], "main", train)
    run_stages(line)
    assert trained[0]["resume_from_checkpoint"] == str(output / "checkpoint-10")
    assert [state for _, state, _ in states(line)] == ["done"]
    # other settings: what was begun is thrown away
    marker = tmp_path / "out" / "stages" / "sft.json"
    marker.write_text(marker.read_text().replace('"finished": true', '"finished": false'))
    changed = Pipeline(tmp_path / "out", str(tmp_path / "base"), {"seed": 1})
    changed.sft("sft", tmp_path / "base", [{}], [tmp_path / "s1.jsonl"])
    (output / "checkpoint-9").mkdir()
    run_stages(changed)
    assert "resume_from_checkpoint" not in trained[1]
    assert not (output / "checkpoint-9").exists()
    # a torn marker is no marker
    marker.write_text('{"dig')
    assert [state for _, state, _ in states(changed)] == ["to do"]


def test_files_of_others_are_never_removed(
    tmp_path: Path, trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    mine = tmp_path / "out" / "round-1" / "sft" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for words in ([], ["--dry-run"]):
        assert past.main([str(written(tmp_path, whole(tmp_path))), *words]) == 2
        said = capsys.readouterr().err
        assert "to mend" in said and "round-1/sft: exists and was not made by this pipeline" in said
    assert mine.read_text() == "mine" and trained == []


def test_a_command_that_fails_stops_the_pipeline(
    tmp_path: Path, trained: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    settings = whole(tmp_path, angles={"against": str(tmp_path / "absent")})
    settings["source"].pop()
    assert past.main([str(written(tmp_path, settings))]) == 2
    assert "past: stopped, exit code" in capfd.readouterr().err
    assert not (tmp_path / "out" / "scores.json").exists()
    line = plan(Config(**settings), settings["base"])
    assert [stage.name for stage, state, _ in states(line) if state != "done"] == ["angles"]


def test_a_module_that_fails_stops_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(main=lambda _: 3)
    monkeypatch.setitem(sys.modules, "skillvec.recipes.fake", fake)  # type: ignore[arg-type]
    line = Pipeline(tmp_path, "base")
    line.module("one", "skillvec.recipes.fake", {})
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_stages(line)
    assert failed.value.returncode == 3


# -------------------------------------------------------------------------------- a dry run


def test_a_dry_run_shows_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = {"dtype": "BF16", "shape": [7000, 100], "data_offsets": [0, 1_400_000]}
    header = json.dumps({"model.norm.weight": spec}).encode()
    (tmp_path / "base").mkdir()
    content = len(header).to_bytes(8, "little") + header + bytes(1_400_000)
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    config = Config(**whole(tmp_path))
    show_stages(plan(config, str(tmp_path / "base")))
    shown = capsys.readouterr().out
    assert "2.8 MB" in shown  # in fp32
    assert "25.2 MB in fp32" in shown  # 5 trainings, 2 vectors, start and merged
    show_stages(plan(config, "org/name"))
    assert "unknown until the base model is on disk" in capsys.readouterr().out
    show_stages(plan(Config(**whole(tmp_path, parameters="1e3")), "org/name"))
    assert "4 kB" in capsys.readouterr().out


# -------------------------------------------------------------------------------- with TRL


def test_the_miniature_runs_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every stage of recipes/mini/past.yaml with real, few steps of SFTTrainer and GRPOTrainer."""
    for package in ("trl", "datasets", "accelerate"):
        pytest.importorskip(package)
    text = MINI.read_text().replace("runs/mini", str(tmp_path / "mini"))
    settings = yaml.safe_load(text)
    settings["training"]["max_steps"] = 2
    settings["rl"] |= {"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4,
                       "rewards": ["skillvec.recipes.test_past:vary"]}  # fmt: skip
    settings["prepare"][1]["with"]["max_steps"] = 2
    settings |= {"lam": [1.0], "controls": [], "angles": {"control": "random"}}
    settings["evaluate"]["with"]["limit"] = 8
    for name in settings["environment"]:
        monkeypatch.setenv(name, "")  # so that what the run sets is taken back
    assert past.main([str(written(tmp_path, settings))]) == 0
    out = tmp_path / "mini"
    scores = json.loads((out / "scores.json").read_text())["people"]
    assert set(scores) == {"base", "SFT only", "lambda 1"}
    at = ("targets/people/sft", "targets/people/lambda_1", "round-1/rl", "round-1/sft")
    target, merged, rl, sft = (load_file(out / name / "model.safetensors") for name in at)
    name = "model.norm.weight"
    torch.testing.assert_close(merged[name], target[name] + (rl[name] - sft[name]))
    assert (rl[name] != sft[name]).any() and rl[name].dtype == torch.float32
    shown = capfd.readouterr().out
    assert shown.count("  2 steps in") == 3 and shown.count("  1 steps in") == 1
    assert "done before" not in shown


@pytest.mark.slow
def test_a_training_that_was_cut_ends_in_the_same_bytes(tmp_path: Path) -> None:
    for package in ("trl", "datasets", "accelerate"):
        pytest.importorskip(package)
    from skillvec.recipes.mini import prepare

    assert prepare.main(["--output", str(tmp_path / "start")]) == 0
    settings = yaml.safe_load(MINI.read_text())["training"] | {"max_length": 64, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    start, data = tmp_path / "start" / "model", tmp_path / "start" / "people" / "t_texts.jsonl"
    line = Pipeline(tmp_path / "out", str(start), settings)
    weights = line.sft("sft", start, [{}], [data]) / "model.safetensors"
    run_stages(line)
    whole = weights.read_bytes()
    weights.unlink()  # as if it was cut after the first of two checkpoints
    (weights.parent / "checkpoint-4" / "trainer_state.json").unlink()
    marker = tmp_path / "out" / "stages" / "sft.json"
    marker.write_text(marker.read_text().replace('"finished": true', '"finished": false'))
    run_stages(line)
    config = yaml.safe_load((tmp_path / "out" / "stages" / "sft.yaml").read_text())
    assert config["resume_from_checkpoint"] == str(weights.parent / "checkpoint-2")
    assert weights.read_bytes() == whole


def vary(completions: list[str], **_: Any) -> list[float]:
    """Reward something that a model without training gives now and then."""
    return [float(len(said) % 2) for said in completions]
