"""The SFT and GRPO recipes: data that is refused, and real steps on a tiny model (slow)."""

import builtins
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import save, toy
from safetensors.torch import load_file
from tiny_training import make_start, write_config, write_rows

import skillvec as sv
from skillvec.recipes import grpo, sft
from skillvec.recipes.training import (
    Data,
    RecipeError,
    callbacks_for,
    cut_batch,
    find_missing,
    load_function,
    load_rows,
    model_arguments,
    run_alone,
    trainer_arguments,
)


def test_functions_are_found_by_name_or_refused() -> None:
    found = load_function("skillvec.recipes.mini.reward:exact")
    assert found(["one", "two"], answer=["one", "three"]) == [1.0, 0.0]
    for name, words in (
        ("skillvec.recipes.mini.reward", "expected module:function"),
        ("skillvec.recipes.mini.reward:absent", "absent"),
        ("no_such_module:reward", "no_such_module"),
        ("skillvec.recipes.mini.reward:__doc__", "expected module:function"),
    ):
        with pytest.raises(ValueError, match=words):
            load_function(name)


def test_vectors_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    model = SimpleNamespace(model_name_or_path=str(save(tmp_path / "base", toy())))
    (callback,) = callbacks_for(Data(data="x.json", vectors=True), model, "sft")
    assert callback.base.path == tmp_path / "base" and callback.options == {"method": "sft"}
    assert callbacks_for(Data(data="x.json"), model, "sft") == []


def test_models_are_loaded_in_the_dtype_asked_for() -> None:
    model = SimpleNamespace(model_revision="main", dtype="float32", attn_implementation=None)
    assert model_arguments(model) == {"revision": "main", "dtype": "float32"}


def batch(**given: Any) -> SimpleNamespace:
    default = {"global_batch": 64, "per_device_train_batch_size": 8,
               "gradient_accumulation_steps": None}  # fmt: skip
    return SimpleNamespace(**default | given)


@pytest.mark.parametrize(
    ("processes", "most", "each", "accumulated"),
    [(1, 8, 8, 8), (8, 8, 8, 1), (8, 3, 2, 4), (2, 64, 32, 1), (64, 8, 1, 1), (4, 5, 4, 4)],
)
def test_a_global_batch_is_kept_for_any_number_of_processes(
    processes: int, most: int, each: int, accumulated: int
) -> None:
    given = batch(per_device_train_batch_size=most)
    cut_batch(given, processes)
    assert given.per_device_train_batch_size == each
    assert given.gradient_accumulation_steps == accumulated
    assert processes * each * accumulated == 64


def test_a_batch_that_cannot_be_cut_is_refused_with_its_numbers() -> None:
    grouped = {"num_generations": 8, "generation_batch_size": None, "steps_per_generation": None}
    for given, processes, words in (
        (batch(), 6, "64: cannot be cut into 6 equal parts"),
        (batch(global_batch=0), 1, "0: cannot be cut"),
        (batch(gradient_accumulation_steps=2), 1, "gradient_accumulation_steps says"),
        (batch(**grouped | {"steps_per_generation": 2}), 1, "steps_per_generation says"),
        (batch(**grouped, global_batch=12), 1, r"global_batch 12 .* num_generations \(8\)"),
        (batch(**grouped | {"generation_batch_size": 96}), 1, r"96 .* global_batch \(64\)"),
    ):
        with pytest.raises(RecipeError, match=words):
            cut_batch(given, processes)
    # four optimiser steps from one sampling; a step may hold part of a group
    given = batch(**grouped | {"generation_batch_size": 256}, global_batch=4)
    cut_batch(given, 1)
    assert given.gradient_accumulation_steps == 1 and given.per_device_train_batch_size == 4
    given = batch(global_batch=None, gradient_accumulation_steps=3)
    cut_batch(given, 6)
    assert given.gradient_accumulation_steps == 3  # as TRL has it, without a global batch


def test_one_process_does_not_copy_a_model_to_every_gpu() -> None:
    with pytest.raises(RecipeError, match="one process sees 8 GPUs"):
        trainer_arguments(Data(data="x.jsonl"), SimpleNamespace(n_gpu=8), None, "sft")


@pytest.mark.parametrize(("rank", "told"), [("0", "sft: nothing is there\n"), ("1", "")])
def test_what_is_refused_is_one_sentence_and_exit_code_1(
    rank: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> int:
        raise RecipeError("nothing is there")

    monkeypatch.setenv("RANK", rank)
    assert run_alone(refuse, "sft") == 1
    assert capsys.readouterr().err == told


def test_packages_that_are_not_installed_are_named() -> None:
    asked = {"report_to": ["trackio", "none", "wandb"], "use_vllm": True, "use_peft": False}
    missing = {name for name in ("trackio", "wandb", "vllm") if not find_spec(name)}
    told = find_missing(asked)
    assert {line.rpartition(" ")[2] for line in told} == missing
    assert find_missing({"report_to": "none", "use_vllm": False}) == []


def test_rewards_that_tell_nothing_apart_are_refused() -> None:
    still = {"frac_reward_zero_std": "1", "reward": "0.25", "loss": "0"}
    with pytest.raises(RecipeError, match=r"same reward at every step \(mean reward 0.25\)"):
        grpo.check_rewards([still, {"train_runtime": 1.0}, still])
    grpo.check_rewards([still, still | {"frac_reward_zero_std": 0.9}])
    with pytest.raises(RecipeError, match=r"mean reward 0\)"):
        grpo.check_rewards([{"frac_reward_zero_std": 1.0, "reward": None}])


@pytest.mark.parametrize("recipe", [sft, grpo])
def test_something_is_printed_before_the_slow_imports(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = builtins.__import__

    def stop(name: str, *rest: Any, **more: Any) -> Any:
        if name in ("torch", "trl", "transformers"):
            raise KeyboardInterrupt
        return plain(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "trl", raising=False)
    monkeypatch.setattr(builtins, "__import__", stop)
    with pytest.raises(KeyboardInterrupt):
        recipe.main([])
    assert "loading PyTorch and TRL" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": " "}, {"text": None}])
    with pytest.raises(ValueError, match=r"'text' is empty in 2 rows: 1, 2$"):
        load_rows(Data(data=str(path)))
    with pytest.raises(ValueError, match="no column 'prompt'; found text"):
        load_rows(Data(data=str(path), columns=["prompt"]))
    with pytest.raises(ValueError, match="no such file"):
        load_rows(Data(data=str(tmp_path / "absent.parquet")))
    good = write_rows(tmp_path / "good.json", [{"text": "a", "n": 0}] * 3)
    assert load_rows(Data(data=str(good), columns=["text", "n"])).num_rows == 3


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model in fp32, texts and questions."""
    for package in ("trl", "datasets", "accelerate", "peft"):
        pytest.importorskip(package)
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.mark.slow
def test_sft_saves_a_whole_model_and_its_vectors(start: Path, tmp_path: Path) -> None:
    words = write_config(tmp_path / "sft.yaml", data=str(start / "texts.jsonl"), vectors=True,
                   model_name_or_path=str(start / "model"))  # fmt: skip
    sft.main([*words, "--output_dir", str(tmp_path / "out"), "--max_length", "64"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(start / "model" / "model.safetensors")
    assert weights.keys() == before.keys()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for step in (1, 2):
        vector = sv.SkillVector.open(tmp_path / "out" / f"skill-{step}.safetensors")
        assert vector.manifest["training"]["method"] == "sft"
        assert sv.verify(tmp_path / "out" / f"skill-{step}.safetensors").facts["verified"]
    last = sv.diff(tmp_path / "out", tmp_path / "out" / "checkpoint-2")
    last = last.save(tmp_path / "nothing.safetensors")
    assert last.report.facts["changed"] == 0  # what is saved at the end is the last checkpoint


@pytest.mark.slow
def test_lora_is_merged_into_what_is_saved(start: Path, tmp_path: Path) -> None:
    words = write_config(
        tmp_path / "sft.yaml", data=str(start / "texts.jsonl"), use_peft=True, lora_r=4,
        vectors=True, lora_target_modules=["q_proj", "v_proj"],
        model_name_or_path=str(start / "model"),
    )  # fmt: skip
    sft.main([*words, "--output_dir", str(tmp_path / "out"), "--max_length", "64"])
    vector = sv.diff(tmp_path / "out", start / "model", tmp_path / "v.safetensors")
    moved = {line["name"] for line in vector.report.ledger if line["status"] == "delta"}
    assert moved == {f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qv"}
    # the callback saw checkpoints of adapters: s B A, which is what was merged at the end
    skill = tmp_path / "out" / "skill-2.safetensors"
    assert sv.verify(skill).facts["verified"]
    sv.apply(start / "model", skill, tmp_path / "again")
    merged, again = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    for name in merged:
        torch.testing.assert_close(again[name], merged[name], rtol=0, atol=1e-7)


@pytest.mark.slow
def test_grpo_asks_rewards_and_writes_the_skill(start: Path, tmp_path: Path) -> None:
    words = write_config(
        tmp_path / "grpo.yaml", data=str(start / "questions.jsonl"), columns=["prompt", "answer"],
        rewards=[f"{__name__}:first_letter"], vectors=True,
        model_name_or_path=str(start / "model"), num_generations=4,
        per_device_train_batch_size=8, max_completion_length=3, beta=0.0,
    )  # fmt: skip
    REWARDED.clear()
    grpo.main([*words, "--output_dir", str(tmp_path / "out")])
    assert REWARDED and all(answer for answer in REWARDED)
    vector = sv.SkillVector.open(tmp_path / "out" / "skill-2.safetensors")
    assert vector.manifest["training"]["method"] == "grpo"
    words = write_config(tmp_path / "none.yaml", data=str(start / "questions.jsonl"))
    with pytest.raises(ValueError, match="rewards: expected at least one"):
        grpo.main([*words, "--output_dir", str(tmp_path / "other")])


@pytest.mark.slow
def test_rl_without_a_reward_stops_unless_it_is_allowed(start: Path, tmp_path: Path) -> None:
    words = write_config(
        tmp_path / "grpo.yaml", data=str(start / "questions.jsonl"), columns=["prompt", "answer"],
        rewards=[f"{__name__}:nothing"], model_name_or_path=str(start / "model"),
        num_generations=2, global_batch=4, max_completion_length=2, save_strategy="no",
    )  # fmt: skip
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(RecipeError, match="RL has no reward to begin with"):
        grpo.main([*words, *out])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert grpo.main([*words, *out, "--allow_no_reward", "true"]) == 0
    assert (
        sv.diff(tmp_path / "out", start / "model", tmp_path / "v.safetensors").report.facts[
            "changed"
        ]
        == 0
    )


@pytest.mark.slow
def test_the_rate_of_rl_is_constant_and_its_batch_global(start: Path, tmp_path: Path) -> None:
    from skillvec.recipes.training import parse

    words = write_config(
        tmp_path / "grpo.yaml", data="x", rewards=["a:b"], global_batch=24, num_generations=4,
        output_dir=str(tmp_path), per_device_train_batch_size=8, generation_batch_size=48,
    )  # fmt: skip
    _, settings, _ = parse(grpo.dataclasses(), words, "", grpo.DEFAULTS)
    assert settings.lr_scheduler_type == "constant" and settings.gradient_accumulation_steps == 3
    assert settings.steps_per_generation == 6  # micro-batches: two optimiser steps
    more = ["--lr_scheduler_type", "linear"]
    assert parse(grpo.dataclasses(), [*words, *more], "", grpo.DEFAULTS)[1].lr_scheduler_type == (
        "linear"
    )


REWARDED: list[str] = []


def nothing(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def first_letter(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Reward something that a model without training gives now and then."""
    REWARDED.extend(answer)
    return [float(sum(map(ord, said)) % 3) for said in completions]
