"""The SFT and GRPO recipes: data that is refused, and real steps on a tiny model (slow)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import save, toy
from safetensors.torch import load_file

import skillvec as sv
from skillvec.recipes.mini.world import WorldConfig, build_tokenizer, build_world
from skillvec.recipes.training import Data, callbacks_for, load_function, load_rows, model_arguments

WORLD = WorldConfig(base=8, s=4, t=4, first_names=4, values=3, texts=2)


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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def config(path: Path, **entries: Any) -> list[str]:
    """Write a configuration for the CPU and return the command line that takes it."""
    entries |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False,
                "report_to": "none", "disable_tqdm": True, "max_steps": 2, "save_steps": 1,
                "learning_rate": 1e-2, "warmup_steps": 0}  # fmt: skip
    path.write_text(json.dumps(entries))  # JSON is YAML
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model in fp32, texts and questions."""
    for package in ("trl", "datasets", "accelerate", "peft"):
        pytest.importorskip(package)
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("start")
    world = build_world(WORLD)
    tokenizer = build_tokenizer(world)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    people = world.domains["people"]
    texts = [{"text": told} for person in people.s for told in person.texts]
    write_rows(folder / "texts.jsonl", texts)
    asked = [{"prompt": q.prompt, "answer": q.answer} for q in people.questions(people.s)]
    write_rows(folder / "questions.jsonl", asked)
    return folder


@pytest.mark.slow
def test_sft_saves_a_whole_model_and_its_vectors(start: Path, tmp_path: Path) -> None:
    from skillvec.recipes import sft

    words = config(tmp_path / "sft.yaml", data=str(start / "texts.jsonl"), vectors=True,
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
    from skillvec.recipes import sft

    words = config(
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
    from skillvec.recipes import grpo

    words = config(
        tmp_path / "grpo.yaml", data=str(start / "questions.jsonl"), columns=["prompt", "answer"],
        rewards=["test_recipes_training:first_letter"], vectors=True,
        model_name_or_path=str(start / "model"), num_generations=4,
        per_device_train_batch_size=8, max_completion_length=3, beta=0.0,
    )  # fmt: skip
    REWARDED.clear()
    grpo.main([*words, "--output_dir", str(tmp_path / "out")])
    assert REWARDED and all(answer for answer in REWARDED)
    vector = sv.SkillVector.open(tmp_path / "out" / "skill-2.safetensors")
    assert vector.manifest["training"]["method"] == "grpo"
    words = config(tmp_path / "none.yaml", data=str(start / "questions.jsonl"))
    with pytest.raises(ValueError, match="rewards: expected at least one"):
        grpo.main([*words, "--output_dir", str(tmp_path / "other")])


REWARDED: list[str] = []


def first_letter(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Reward something that a model without training gives now and then."""
    REWARDED.extend(answer)
    return [float(len(said.split()) % 2) for said in completions]
