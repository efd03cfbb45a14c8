"""The benchmarks' configurations against the checks, and their small forms from the READMEs."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from skillvec.recipes import checks, judges, past, stand_in, tiny
from skillvec.recipes.loogle import reward
from skillvec.recipes.squad import judge as squad
from skillvec.recipes.toolbench import judge as toolbench

for package in ("trl", "datasets", "accelerate", "peft", "openai"):
    pytest.importorskip(package)

RECIPES = Path(__file__).parent
ROOT = RECIPES.resolve().parents[0]
SMALL = ("squad", "loogle", "toolbench")
LARGE = ("squad/past", "squad/full", "loogle/past", "toolbench/past")
NO_GPU = "bf16 needs a GPU"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder that looks like a clone, whose `runs` are its own."""
    for name in ("recipes", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a pipeline sets variables
    return tmp_path


@pytest.mark.parametrize("name", SMALL)
def test_a_small_form_has_the_stages_of_the_large_one_and_passes_the_checks(
    name: str, clone: Path
) -> None:
    small, large = (past.read_config(RECIPES / name / f"{kind}.yaml") for kind in ("small", "past"))
    faults = past.check(small)[2]
    assert not faults
    ran = [[entry["run"] for entry in config.prepare] for config in (small, large)]
    assert ran[0] == ["skillvec.recipes.tiny", *ran[1]]
    stages = [
        {stage.name for stage in past.plan(config, config.base).stages if "round" in stage.name}
        for config in (small, large)
    ]
    assert stages[0] == stages[1]
    files = json.dumps([small.source, [*small.targets.values()]]).replace("-small", "")
    assert set(re.findall(r"runs/[^\"]*", files)) <= set(
        re.findall(r"runs/[^\"]*", json.dumps([large.source, [*large.targets.values()]]))
    )
    assert len(small.source) == len(large.source)
    assert small.rl.keys() <= large.rl.keys() and small.controls == large.controls
    assert [step.get("use_peft") for step in small.sft] == [s.get("use_peft") for s in large.sft]
    assert small.evaluate["run"] == large.evaluate["run"]


@pytest.mark.parametrize("name", LARGE)
def test_a_large_form_passes_the_checks_for_eight_processes(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    faults = checks.setting_faults(dataclasses.replace(past.read_config(path), processes=8))
    assert all(NO_GPU in fault for fault in faults)
    text = re.sub(r"(?m)^  # (use_vllm: true)", r"  \1", path.read_text())
    config = past.Config(**yaml.safe_load(text), processes=8)
    assert config.rl["use_vllm"] is True  # the line can be taken as it stands
    told = [fault for fault in checks.setting_faults(config) if NO_GPU not in fault]
    assert all("needs the package vllm" in fault for fault in told)
    assert config.launch == "fsdp2" and "report_to" in config.training
    assert config.rl["lr_scheduler_type"] == "constant" and config.rl["global_batch"] == 64
    assert "save_strategy" not in config.training  # so that a launched training can go on


def test_sizes_are_those_of_the_readme() -> None:
    for name, count in (("squad", 11), ("loogle", 14), ("toolbench", 90)):
        config = past.read_config(RECIPES / name / "past.yaml")
        rounds, steps = len(config.source), len(config.sft)
        noise, lams, targets = len(config.controls), len(config.lam), len(config.targets)
        line = past.plan(config, config.base)
        formula = rounds * (steps + 3) - 1 + noise + targets * (steps + lams + noise)
        assert sum(stage.models for stage in line.stages) == formula == count
        text = (RECIPES / name / "README.md").read_text()
        assert f"{count} x 30.4 GB" in text


def test_full_fine_tuning_differs_in_the_knowledge_only() -> None:
    lora, full = (past.read_config(RECIPES / "squad" / f"{n}.yaml") for n in ("past", "full"))
    changed = {key for key in vars(lora) if getattr(lora, key) != getattr(full, key)}
    assert changed == {"out", "prepare", "sft"} and not full.prepare
    (one,), (other,) = lora.sft, full.sft
    assert {key for key in one if key not in other} == {
        "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    }  # fmt: skip
    assert {key for key in other if other[key] != one[key]} == {"learning_rate"}
    made = {entry["out"] for entry in lora.prepare}
    read = [*full.source, *full.targets.values()]
    assert all(str(Path(file).parent) in made for part in read for file in part["sft"])


# --------------------------------------------------------------------- the endpoint without a model


def shown(template: str, **fields: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: fields[found[1]], template)


@pytest.mark.parametrize(
    ("template", "right", "wrong"),
    [
        (judges.SAME_ANSWER, "yes", "no"),
        (squad.TEMPLATE, "yes", "no"),
        (reward.SAME_MEANING, "True", "False"),
    ],
)
def test_rules_judge_by_words(template: str, right: str, wrong: str) -> None:
    fields = {"question": "Who\ndug it?", "gold": "Maren Toll"}
    assert stand_in.answer(shown(template, said="It was\ntoll.", **fields)) == right
    assert stand_in.answer(shown(template, said="Nobody", **fields)) == wrong


def test_rules_grade_dialogues_and_refuse_other_prompts() -> None:
    seen = 'Action: f\nAction Input: {}\nObservation: {"error": "", "response": "42 films"}\n'
    failed = seen.replace('"error": ""', '"error": "no"')
    for dialogue, verdict in (
        (seen + 'Action: Finish\nAction Input: {"final_answer": "films"}', "solved"),
        (seen + 'Action: Finish\nAction Input: {"final_answer": "none"}', "partial"),
        (failed + 'Action: Finish\nAction Input: {"final_answer": "films"}', "unsolved"),
    ):
        assert stand_in.answer(shown(toolbench.TEMPLATE, question="q", said=dialogue)) == verdict
    with pytest.raises(ValueError, match="no recipe asks this: 'Hello'"):
        stand_in.answer("Hello")


def test_a_tiny_model_is_the_same_each_time_and_reads_chatml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "texts").write_text("The harbour of Veldt was dug in 1871.")
    for name in ("a", "b"):
        words = ["--texts", str(tmp_path / "texts"), "--output", str(tmp_path / name)]
        assert tiny.main(words) == 0
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    said = [{"role": "user", "content": "harbour"}, {"role": "assistant", "content": "1871"}]
    text = "<|im_start|>user\nharbour<|im_end|>\n<|im_start|>assistant\n"
    asked = tokenizer.apply_chat_template(said[:1], tokenize=False, add_generation_prompt=True)
    assert asked == text
    assert tokenizer.apply_chat_template(said, tokenize=False) == f"{text}1871<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert str(model.dtype) == "torch.float32" and model.config.vocab_size == len(tokenizer)
    assert tiny.main(["--texts", str(tmp_path / "absent"), "-o", str(tmp_path / "c")]) == 2
    assert "absent" in capsys.readouterr().err


# --------------------------------------------------------------------------------- from the README


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_small_form_runs_from_its_readme(name: str, clone: Path) -> None:
    text = (RECIPES / name / "README.md").read_text()
    section = text.partition("## Small form\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    assert f"recipes/{name}/small.yaml" in code
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                                "OMP_NUM_THREADS": "1"}  # fmt: skip
    with (clone / "log").open("wb") as log:  # not a pipe: servers that are left would hold it
        shell = subprocess.Popen(["bash", "-ec", code], env=environment, start_new_session=True,
                                 stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        code_of_exit = shell.wait(timeout=1800)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # with -e, a failure leaves the servers
    assert code_of_exit == 0, (clone / "log").read_text()[-3000:]
    out = clone / "runs" / f"{name}-small"
    (scores,) = json.loads((out / "scores.json").read_text()).values()
    assert set(scores) == {"base", "SFT only", "lambda 1", "random, lambda 1"}
    assert all("judge" in metrics for metrics in scores.values())
    for number in (1, 2):
        record = json.loads((out / "stages" / f"round-{number}-rl.json").read_text())
        assert record["finished"]
    assert (out / "round-2" / "skill.safetensors").is_file()
