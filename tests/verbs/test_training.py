"""The callback: the vector beside every checkpoint, and what it refuses when."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import perturbed, save, toy

import skillvec as sv


def call(callback: object, folder: Path, step: int, first: bool = True) -> None:
    """Save as a Trainer does: the checkpoint is there when on_save is called."""
    state = SimpleNamespace(global_step=step, is_world_process_zero=first)
    callback.on_save(SimpleNamespace(output_dir=str(folder)), state, None)


def test_every_checkpoint_has_its_vector_beside_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base", toy(0, "F32"))
    callback = sv.SkillVectorCallback(base, method="grpo")
    for step in (10, 20):
        save(tmp_path / "out" / f"checkpoint-{step}", perturbed(toy(0, "F32"), step))
        call(callback, tmp_path / "out", step)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["checkpoint-10", "checkpoint-20", "skill-10.safetensors",
                     "skill-20.safetensors"]  # fmt: skip
    assert callback.written == [tmp_path / "out" / name for name in names[2:]]
    for step, path in zip((10, 20), callback.written, strict=True):
        vector = sv.SkillVector.open(path)
        assert vector.manifest["training"]["method"] == "grpo"
        assert sv.verify(path).facts["verified"]  # base + v is the checkpoint
        assert vector.manifest["tuned"]["ref"].endswith(f"checkpoint-{step}")
    call(callback, tmp_path / "out", 20)  # a resumed run saves it again
    assert len(callback.written) == 3


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    base = save(tmp_path / "base", toy(0, "F32"))
    callback = sv.SkillVectorCallback(base)
    call(callback, tmp_path / "out", 10, first=False)  # nor does it look for a checkpoint
    assert callback.written == []


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(sv.UsageError, match="no such"):
        sv.SkillVectorCallback(tmp_path / "absent")


def test_of_an_adapter_it_writes_what_the_adapter_adds(tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("skillvec.verbs.training.logger.warning_once", said.append)
    base = save(tmp_path / "base", toy(0, "BF16"))
    name = "model.layers.0.self_attn.q_proj"
    pair = {
        f"base_model.model.{name}.lora_A.weight": torch.eye(2, 24),
        f"base_model.model.{name}.lora_B.weight": torch.ones(24, 2),
    }
    folder = tmp_path / "out" / "checkpoint-3"
    save(folder / "adapter_model.safetensors", pair)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    callback = sv.SkillVectorCallback(base, method="grpo")
    call(callback, tmp_path / "out", 3)
    vector = sv.SkillVector.open(callback.written[0])
    changed = {n: e["changed"] for n, e in vector.manifest["tensors"].items() if e["changed"]}
    assert changed == {f"{name}.weight": 48} and not said
    assert vector.manifest["tensors"][f"{name}.weight"]["norm"] == pytest.approx(3 * 48**0.5, 1e-3)


def test_a_vector_that_cannot_be_written_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("skillvec.verbs.training.logger.error", said.append)
    base = save(tmp_path / "base", toy(0, "F32"))
    callback = sv.SkillVectorCallback(base)
    save(tmp_path / "out" / "checkpoint-5", toy(0, "F32", width=16))
    call(callback, tmp_path / "out", 5)
    (words,) = said
    assert "no skill vector of" in words and f"skillvec diff {tmp_path}/out/checkpoint-5" in words
    assert callback.written == [] and not (tmp_path / "out" / "skill-5.safetensors").exists()


def test_16_bit_checkpoints_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("skillvec.verbs.training.logger.warning_once", said.append)
    for dtype, warnings in (("F32", 0), ("BF16", 1)):
        base = save(tmp_path / f"{dtype}-base", toy(0, dtype))
        save(tmp_path / dtype / "checkpoint-1", perturbed(toy(0, dtype)))
        call(sv.SkillVectorCallback(base), tmp_path / dtype, 1)
        assert len(said) == warnings


def test_a_step_that_moved_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("skillvec.verbs.training.logger.warning", said.append)
    base = save(tmp_path / "base", toy(0, "F32"))
    callback = sv.SkillVectorCallback(base)
    for step, seed in ((1, 1), (2, None)):
        tensors = toy(0, "F32") if seed is None else perturbed(toy(0, "F32"), seed)
        save(tmp_path / "out" / f"checkpoint-{step}", tensors)
        call(callback, tmp_path / "out", step)
        assert len(said) == step - 1
    assert "skill-2.safetensors: no value differs: the vector is zero" in said[0]


@pytest.mark.slow
def test_a_real_trainer_calls_it(tmp_path: Path) -> None:
    """Two steps of TRL's SFTTrainer from an fp32 model; every checkpoint is base + v."""
    for package in ("trl", "datasets", "accelerate"):
        pytest.importorskip(package)
    import datasets
    import trl
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from skillvec.recipes.mini.world import WorldConfig, build_tokenizer, build_world

    world = WorldConfig(base=8, s=4, t=4, first_names=4, values=3)
    tokenizer = build_tokenizer(build_world(world))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), **shape, **heads, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    callback = sv.SkillVectorCallback(tmp_path / "base", method="sft")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, save_steps=1, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], per_device_train_batch_size=2,
        learning_rate=1e-2, warmup_steps=0, disable_tqdm=True,
    )  # fmt: skip
    texts = [{"text": " ".join(list(tokenizer.get_vocab())[:6])}] * 4
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert [path.name for path in callback.written] == [
        "skill-1.safetensors", "skill-2.safetensors",
    ]  # fmt: skip
    for path in callback.written:
        assert sv.verify(path).facts["verified"]
        assert sv.SkillVector.open(path).manifest["exactness"]["claim"] in ("bitwise", "partial")
