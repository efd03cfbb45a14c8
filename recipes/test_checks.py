"""What is found before the first stage: every kind of fault, all in one answer, nothing written."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from skillvec.recipes import checks, past
from skillvec.recipes.dry_run import disk_of
from skillvec.recipes.past import Config, plan
from skillvec.recipes.test_past import trained, whole, write_base, written
from skillvec.recipes.trl_arguments import classes_of, contradiction, value_faults

__all__ = ["trained"]  # a fixture


def faults_of(tmp_path: Path, **changes: Any) -> list[str]:
    """Return what is wrong with a configuration that is right but for the changes."""
    settings = whole(tmp_path)
    for name, change in changes.items():
        settings[name] = settings.get(name, {}) | change if isinstance(change, dict) else change
    write_base(tmp_path / "base")
    return past.check(Config(**settings))[2]


def test_a_good_configuration_has_no_faults(tmp_path: Path) -> None:
    assert faults_of(tmp_path) == []
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sft": [{"learning_rat": 1}]},
         "sft, step 1: nothing is called `learning_rat`; did you mean `learning_rate`?"),
        ({"training": {"savesteps": 1}},
         "training: nothing is called `savesteps`; did you mean `save_steps`?"),
        ({"training": {"max_length": 64}},
         "rl: `max_length`, which `training` gives to every training: skillvec.recipes.grpo does"
         " not know it"),
        ({"rl": {"output_dir": "a"}}, "rl: `output_dir` is what the pipeline sets; leave it out"),
        ({"sft": [{"max_steps": 2.5}]},
         "sft, step 1: `max_steps`: expected a whole number, found 2.5"),
        ({"training": {"save_strategy": False}},
         "training: `save_strategy`: expected no or steps or epoch or best, found False (YAML reads"
         " yes, no, on and off so: put it in quotation marks)"),
        ({"rl": {"columns": "prompt"}}, "rl: `columns`: expected a list, found 'prompt'"),
        ({"rl": {"rewards": "a:b"}}, "rl: `rewards`: expected a list, found 'a:b'"),
        ({"rl": {"rewards": []}}, "rl: expected at least one reward, `rewards: [module:function]`"),
        ({"rl": {"rewards": ["nowhere:f"]}}, "rl: nowhere:f: No module named 'nowhere'"),
        ({"rl": {"rewards": ["json:nothing"]}},
         "rl: json:nothing: module 'json' has no attribute 'nothing'"),
        ({"rl": {"num_generations": 3}},
         "rl: generation_batch_size (8) must be divisible by num_generations (3)."),
        ({"training": {"use_cpu": False, "bf16": True}},
         "sft, step 1; rl: bf16 needs a GPU, and there is none here; use_cpu: true trains on the"
         " CPU, bf16: false in fp32"),
        ({"training": {"report_to": "wandb"}},
         "sft, step 1: report_to: wandb needs the package wandb, which is not installed here: pip"
         " install wandb"),
    ],
)  # fmt: skip
def test_settings_of_trainings_are_checked(
    changes: dict[str, Any], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    if "wandb" in fault:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fault in faults_of(tmp_path, **changes)


def test_values_that_trainings_take_pass() -> None:
    taken = {
        "learning_rate": "1e-3", "lora_target_modules": ["q_proj"], "model_init_kwargs": {"a": 1},
        "warmup_steps": 0.1, "report_to": "none", "num_generations": "8", "deepspeed": None,
        "bf16": "true", "lr_scheduler_type": "constant", "generation_kwargs": '{"a": 1}',
    }  # fmt: skip
    grpo = classes_of("skillvec.recipes.grpo")
    assert value_faults(grpo, taken | {"seed": [1]}).keys() == {"seed"}


def test_a_batch_is_checked_for_the_number_of_processes() -> None:
    given = {"data": "d", "model_name_or_path": "m", "output_dir": "o", "bf16": False,
             "per_device_train_batch_size": 1, "num_generations": 8}  # fmt: skip
    assert contradiction("skillvec.recipes.grpo", given, 8) is None
    said = contradiction("skillvec.recipes.grpo", given, 4)
    assert said == "generation_batch_size (4) must be divisible by num_generations (8)."
    said = contradiction("skillvec.recipes.grpo", given | {"global_batch": 12}, 8)
    assert said is not None and said.startswith("global_batch 12: cannot be cut into 8 equal parts")


# -------------------------------------------------------------------------------- modules


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"evaluate": {"with": {"metrics": ["exact"], "max_token": 5}}},
         "evaluate: skillvec.recipes.evaluate: unrecognized arguments: --max-token 5"),
        ({"evaluate": {"run": "nowhere.evaluate"}},
         "evaluate: cannot import nowhere.evaluate: No module named 'nowhere'"),
        ({"evaluate": {"run": "json"}}, "evaluate: json has no function `main`"),
        ({"evaluate": {"with": {"metrics": ["bleu"]}}},
         "evaluate: metrics: expected one or more of exact, f1, first_word, begins, contains, ends,"
         " judge, found bleu"),
        ({"controls": ["rotated"]},
         "controls/rotated.safetensors: skillvec.recipes.controls: argument --kind: invalid choice:"
         " 'rotated' (choose from 'random', 'shuffled')"),
        ({"angles": {"no_such_option": 3}},
         "angles: skillvec orthogonality: No such option '--no-such-option'."),
        ({"launch": "fsdp3"},
         "launch fsdp3: expected fsdp2, multi_gpu, zero3, an accelerate configuration, or a list of"
         " words"),
    ],
)  # fmt: skip
def test_modules_and_their_options_are_checked(
    changes: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    assert faults_of(tmp_path, **changes) == [fault]


def test_a_judge_needs_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_URL", raising=False)
    judged = {"with": {"metrics": ["judge"]}}
    (fault,) = faults_of(tmp_path, evaluate=judged)
    assert fault.startswith("evaluate: JUDGE_URL and JUDGE_MODEL not set")
    url = {"judge_url": "http://localhost:1", "judge_model": "m"}
    assert faults_of(tmp_path, evaluate={"with": judged["with"] | url}) == []


# -------------------------------------------------------------------------------- files and rows


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("s1.jsonl", '{"words": 1}', "round-1/sft: {}: no column 'text'; found words"),
        ("s1.jsonl", '{"text": " "}', "round-1/sft: {}: 'text' is empty in 1 rows: 0"),
        ("s1.jsonl", "", "round-1/sft: {}: no rows"),
        ("s1.jsonl", '{"text": "a"}\nno', "round-1/sft: {}, row 2: Expecting value: line 1 column"
         " 1 (char 0)"),
        ("s1.jsonl", "[1]", "round-1/sft: {}, row 1: expected an object, found [1]"),
        ("s1_questions.jsonl", '{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": [1]}',
         "round-1/rl: {}: the rows are not of one form"),
        ("s1_questions.jsonl", '{"prompt": "a"}',
         "round-1/rl: {}: no column 'answer', which skillvec.recipes.mini.reward:exact asks for"),
        ("t_questions.jsonl", '{"prompt": "a", "answer": ""}',
         "evaluate: {}: 1 rows lack `answer`: a text, or a list of texts, none empty; lines 1"),
    ],
)  # fmt: skip
def test_rows_are_checked(file: str, text: str, fault: str, tmp_path: Path) -> None:
    settings = whole(tmp_path)
    settings["rl"]["rewards"] = ["skillvec.recipes.mini.reward:exact"]
    write_base(tmp_path / "base")
    (tmp_path / file).write_text(text)
    (found,) = past.check(Config(**settings))[2]
    assert found.startswith(fault.format(tmp_path / file))


def narrow(completions: Sequence[str]) -> list[float]:
    """Take no columns, which TRL gives to every reward."""
    return [0.0 for _ in completions]


def test_rows_are_checked_for_what_trains_on_them(tmp_path: Path) -> None:
    settings = whole(tmp_path)
    write_base(tmp_path / "base")
    settings["rl"] |= {"columns": ["answer"], "rewards": [f"{__name__}:narrow"]}
    settings["sft"] = [{"columns": ["words"]}]
    for name in ("s1", "s2", "t"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"words": name}))
        (tmp_path / f"{name}_questions.jsonl").write_text(json.dumps({"answer": name}))
    found = past.check(Config(**settings))[2]
    for part in (
        "s1.jsonl: expected `text`, `messages`, or `prompt` and `completion` in every row; found",
        "s1_questions.jsonl: no column 'prompt', which GRPO asks",
        "narrow: expected **kwargs at its end: TRL gives it more than the columns",
    ):
        assert sum(part in fault for fault in found) == 1, part
    settings["sft"][0]["dataset_text_field"] = "words"
    assert not any("completion" in fault for fault in past.check(Config(**settings))[2])


def test_files_that_nothing_makes_must_be_there(tmp_path: Path) -> None:
    settings = whole(tmp_path)
    settings["source"][0]["sft"] = [str(tmp_path / "absent.jsonl")]
    reads = {"instructions": ["some/where/queries"], "test": ["a.json", "made/b.json"]}
    prepare = "skillvec.recipes.toolbench.prepare"
    settings["prepare"] = [
        {"run": "skillvec.recipes.mini.prepare", "out": "made"},
        {"run": prepare, "out": "the other", "with": reads},
    ]
    settings["targets"]["T"]["evaluate"] = {"data": "the other/questions.jsonl"}  # not there yet
    write_base(tmp_path / "base")
    assert past.check(Config(**settings))[2] == [
        "prepare-2: no such file, and no stage makes it: some/where/queries, a.json",
        f"round-1/sft: no such file, and no stage makes it: {tmp_path / 'absent.jsonl'}",
    ]


def test_what_prepare_makes_is_checked_before_anything_is_trained(
    tmp_path: Path, trained: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def prepare(arguments: Sequence[str]) -> int:
        Path(arguments[1]).mkdir()
        (Path(arguments[1]) / "s1.jsonl").write_text('{"words": "a"}')
        return 0

    fake = SimpleNamespace(main=prepare)
    monkeypatch.setitem(sys.modules, "skillvec.recipes.fake", fake)  # type: ignore[arg-type]
    made = tmp_path / "made"
    settings = whole(tmp_path, prepare=[{"run": "skillvec.recipes.fake", "out": str(made)}])
    settings["source"][0]["sft"] = [str(made / "s1.jsonl")]
    settings["source"][1]["sft"] = [str(made / "s2.jsonl")]
    write_base(tmp_path / "base")
    assert past.main([str(written(tmp_path, settings))]) == 2
    said = capsys.readouterr().err
    assert f"- round-1/sft: {made / 's1.jsonl'}: no column 'text'; found words" in said
    assert f"- round-2/sft: {made / 's2.jsonl'} does not exist: prepare-1 did not make it" in said
    assert trained == []


# -------------------------------------------------------------------------------- base and disk


def test_a_base_model_must_be_whole(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    assert checks.base_faults(str(tmp_path / "base")) == []
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).unlink()
    config, weights, tokenizer = checks.base_faults(str(tmp_path / "base"))
    assert config.endswith("no config.json") and "base" in weights
    assert "no tokenizer that transformers reads" in tokenizer
    assert checks.base_faults("no/such/folder") == [
        "base no/such/folder: no such folder, and not an id of the Hub"
    ]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (["model.safetensors", "config.json"], None),
        (["pytorch_model.bin", "config.json"], "expected config.json and weights in .safetensors"),
        (RepositoryNotFoundError, "no such folder, and no such model on the Hub"),
        (GatedRepoError, "its licence has to be accepted on the Hub"),
        (ConnectionError, "not in the cache, and the Hub cannot be asked: offline"),
    ],
)
def test_a_base_on_the_hub_is_asked_for(
    answer: Any, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        def auth_check(self, name: str) -> None:
            assert name == "org/name"
            if answer is ConnectionError:
                raise answer("offline")
            if not isinstance(answer, list):
                raise answer("refused", response=SimpleNamespace(headers={}, request=None))

        def model_info(self, name: str, revision: str | None, timeout: float) -> Any:
            assert (name, revision) == ("org/name", "abc")
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=one) for one in answer])

    def download(*_: Any, **__: Any) -> str:
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    found = checks.base_faults("org/name@abc")
    assert found == [] if fault is None else fault in found[0] and len(found) == 1


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    path = written(tmp_path, whole(tmp_path, parameters=7e9, base="org/name"))
    usage = SimpleNamespace(free=100e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert past.main([str(path), "--dry-run"]) == 2
    told = capsys.readouterr()
    # 5 trainings, 2 vectors, start and merged, each 28 GB; every training leaves one checkpoint
    assert "252 GB in fp32, and 420 GB of training checkpoints" in " ".join(told.out.split())
    assert "28 GB of it" in " ".join(told.out.split())  # what is merged
    assert f"- {tmp_path / 'out'}: 672 GB are needed at most, 100 GB are free" in told.err
    assert past.main([str(path)]) == 2  # a run does not start either
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "checkpoints"),
    [
        ({}, 1),
        ({"save_strategy": "no"}, 0),
        ({"max_steps": 100, "save_steps": 10}, 10),
        ({"max_steps": 100, "save_steps": 10, "save_total_limit": 2}, 3),
        ({"max_steps": 100, "save_steps": 0.25, "save_only_model": True}, 4 / 3),
    ],
)
def test_checkpoints_take_disk(
    settings: dict[str, Any], checkpoints: float, tmp_path: Path
) -> None:
    config = whole(tmp_path, parameters=1e3, sft=[settings], rl={"save_strategy": "no"})
    line = plan(Config(**config), "org/name")
    disk = disk_of(line, line.stages)
    assert disk is not None and disk.checkpoints == 3 * checkpoints * 12e3


# -------------------------------------------------------------------------------- the command


def test_every_fault_is_said_at_once_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    settings = whole(tmp_path, angles={"contrl": "random"})
    settings["sft"][0]["learning_rat"] = 1
    settings["targets"]["T"]["sft"] = [str(tmp_path / "absent.jsonl")]
    (tmp_path / "s1.jsonl").write_text("{}")
    path = written(tmp_path, settings)
    before = sorted(tmp_path.rglob("*"))
    for words in ([str(path)], [str(path), "--dry-run"]):
        assert past.main(words) == 2
        said = capsys.readouterr().err
        assert "past: 4 to mend:" in said
        for part in ("learning_rat`", "--contrl", "absent.jsonl", "s1.jsonl: no column 'text'"):
            assert part in said
    assert sorted(tmp_path.rglob("*")) == before


def test_something_is_printed_before_the_long_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        assert "checking settings, modules, files and disk" in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(past, "require_training", stop)
    with pytest.raises(KeyboardInterrupt):
        past.main([str(written(tmp_path, whole(tmp_path))), "--dry-run"])


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert past.main([str(written(tmp_path, whole(tmp_path)))]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("past: a pipeline needs trl") and '"skillvec[train]"' in said
    assert "\n" not in said


def test_configurations_of_the_package_go_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert past.main(["squad", "--show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["out"] == "runs/squad"
    (tmp_path / "squad").mkdir()  # a folder of the user's is no configuration
    assert past.find_config("squad").name == "past.yaml"
    (tmp_path / "mini").write_text("out: mine")
    assert past.find_config("mini") == Path("mini")
