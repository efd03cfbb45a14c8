"""How trainings are spread, and the memory that they need: names, files, words, numbers by hand."""

from pathlib import Path

import pytest
import yaml

from skillvec.recipes import launch, memory
from skillvec.recipes.launch import CONFIGS, count_processes, launch_words, sharding
from skillvec.recipes.memory import adapter_parameters, print_memory, training_memory
from skillvec.recipes.stages import Pipeline, as_run, command

B7 = 7.6e9


def test_a_name_a_file_and_words_launch() -> None:
    words = launch_words("fsdp2", 8)
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    assert words[3:] == ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "8"]
    mine = str(CONFIGS / "multi_gpu.yaml")
    assert launch_words(mine, 2)[4] == mine
    assert launch_words(["torchrun", "--standalone"], 2) == ["torchrun", "--standalone"]
    with pytest.raises(ValueError, match="fsdp3: expected fsdp2, multi_gpu, zero3"):
        launch_words("fsdp3")


def test_processes_are_those_stated_or_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_processes("fsdp2") == 4 and count_processes("fsdp2", 2) == 2
    assert count_processes(["accelerate", "launch", "--num_processes", "3"], 2) == 3
    assert count_processes([]) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_processes("fsdp2") == 1


def test_what_is_not_installed_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_is_there", lambda package: package != "deepspeed")
    with pytest.raises(ValueError, match="zero3: needs the package deepspeed"):
        launch_words("zero3", 2)
    assert launch_words("fsdp2", 2)


def test_configurations_that_ship_spread_what_they_say() -> None:
    spread = {path.stem: sharding(path.stem) for path in CONFIGS.glob("*.yaml")}
    assert spread == {"fsdp2": "all", "zero3": "all", "multi_gpu": "none"}
    for path in CONFIGS.glob("*.yaml"):
        # TRL's `bf16` says the precision, and not two files that may differ
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
    given = ["accelerate", "launch", "--config_file", str(CONFIGS / "zero3.yaml")]
    assert sharding(given) == "all" and sharding(["torchrun"]) == "none"


def test_a_launched_training_can_go_on_unless_it_says_when_to_save(tmp_path: Path) -> None:
    line = Pipeline(tmp_path, "base", {"seed": 1}, "fsdp2", processes=2)
    line.sft("sft", "base", [{"learning_rate": 1e-5}], ["texts.jsonl"])
    line.rl("rl", tmp_path / "sft", {"rewards": ["a:b"], "save_steps": 5}, "questions.jsonl")
    sft, rl = line.stages
    assert as_run(line, sft)["save_total_limit"] == 1 and as_run(line, sft)["remove_checkpoints"]
    assert "save_total_limit" not in as_run(line, rl) and "allow_no_reward" not in as_run(line, rl)
    assert sft.settings is not None and "save_total_limit" not in sft.settings  # nor in digests
    assert command(line, sft)[-4:] == ["-m", *sft.words]
    line.launch, line.allow_no_reward = (), True
    assert as_run(line, sft) == sft.settings and as_run(line, rl)["allow_no_reward"] is True


def test_the_memory_of_seven_billion_parameters() -> None:
    one = training_memory(B7, reference=True)
    assert (one.weights, one.gradients, one.moments) == (4 * B7, 4 * B7, 8 * B7)
    assert one.gpu == 16 * B7 + 4 * B7 and one.checkpoint == 12 * B7
    eight = training_memory(B7, processes=8, spread="all")
    assert eight.gpu == pytest.approx(16 * B7 / 8)
    asked = training_memory(B7, processes=8, spread="all", reference=True).reference
    assert asked == pytest.approx(4 * B7 / 8 + 2 * B7)
    copied = training_memory(B7, processes=8)
    assert copied.gpu == (4 + 8 + 8) * B7  # gradients once more, in the buckets they are sent from
    assert training_memory(B7, processes=4, spread="gradients").gradients == B7
    assert training_memory(B7, processes=4, spread="optimizer").gradients == 4 * B7
    assert training_memory(B7, optim="adamw_8bit").moments == 2 * B7
    assert training_memory(B7, optim="adamw_torch_fused").moments == 8 * B7
    assert training_memory(B7, dtype="bfloat16").weights == 2 * B7
    adapter = training_memory(B7, trained=1e6)
    assert adapter.gpu == pytest.approx(4 * B7 + 16e6) and adapter.checkpoint == 12e6


def test_an_adapter_counts_what_its_targets_say() -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (8, 4), "model.norm.weight": (4,),
              "model.layers.0.mlp.up_proj.weight": (16, 4), "lm_head.weight": (99, 4)}  # fmt: skip
    assert adapter_parameters(shapes, {"lora_target_modules": ["q_proj"], "lora_r": 2}) == 24
    assert adapter_parameters(shapes, {"lora_target_modules": "all-linear"}) == 16 * (12 + 20)


def test_a_dry_run_says_the_memory_and_compares_it_with_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    line = Pipeline(tmp_path, str(tmp_path / "absent"), {}, "fsdp2", B7, 8)
    sft = line.sft("round-1/sft", line.base, [{"learning_rate": 1e-5}], ["texts.jsonl"])
    asked = {
        "rewards": ["a:b"],
        "beta": 0.001,
        "use_vllm": True,
        "vllm_gpu_memory_utilization": 0.4,
    }
    line.diff("skill", line.rl("round-1/rl", sft, asked, "questions.jsonl"), sft, "grpo")
    print_memory(line)
    told = capsys.readouterr().out
    assert "no GPU is visible" in told and "round-1/sft" in told and "skill" not in told
    assert "15.2 GB" in told and "122 GB" in told  # 16 bytes a parameter over 8, and all
    assert "besides activations" in told
    monkeypatch.setattr(memory, "visible_gpus", lambda: [80 * 10**9] * 8)
    print_memory(line)
    told = capsys.readouterr().out
    assert "32 GB" in told  # .4 of 80 GB for vLLM
    assert "NOT ENOUGH" not in told and "8 GPUs of 80 GB" in told
    line.launch = ()
    print_memory(line)
    assert capsys.readouterr().out.count("NOT ENOUGH") == 2
