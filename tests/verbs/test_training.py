"""The callback: the vector beside every checkpoint, and what it refuses when."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families import load, perturbed, save, toy

import skillvec as sv
from skillvec.verbs.reprs import cut


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
    said = f"<SkillVectorCallback of {cut(base)}: 3 vectors written, method='grpo'>"
    assert repr(callback) == said


def test_an_evaluation_says_its_vector_and_its_options(tmp_path: Path) -> None:
    base, tuned = toy(0, "F32"), perturbed(toy(0, "F32"), 1)
    sides = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    v = sv.diff(*sides, tmp_path / "v.safetensors")
    callback = sv.SkillVectorEvaluation(None, v, lam=0.5, exclude=["lm_head.*"] * 9)
    said = repr(callback)
    assert said.startswith(f"<SkillVectorEvaluation of {cut(v.ref)}: logs eval_skill_*, exclude=")
    assert said.endswith(", lam=0.5>") and len(said) < 200


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


# ------------------------------------------------------------- evaluations with a vector attached


class Trained(NamedTuple):
    """A model after a few steps, and what its trainer has logged."""

    state: dict[str, torch.Tensor]
    log: list[dict[str, float]]
    drawn: tuple[float, float]  # next of Python's and of numpy's random numbers


class Accuracy:
    """A metric of the trainer; `fails_at` is the call that raises."""

    def __init__(self, fails_at: int = -1) -> None:
        self.calls, self.fails_at, self.seen = 0, fails_at, []

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise ArithmeticError("a metric that fails")
        random.random(), np.random.random()  # as a bootstrap would
        return {"argmax": float(prediction.predictions.argmax(-1).mean())}


def gpt2(folder: Path) -> Any:
    """Return a model with dropout, whose training depends on random numbers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    return model


def trainer_of(model: Any, folder: Path, metric: Accuracy | None = None) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(32, (12, 8), generator=torch.manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=4, eval_strategy="steps", eval_steps=2, logging_steps=1,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, seed=3,
    )  # fmt: skip
    return Trainer(
        model, settings, train_dataset=data[:8], eval_dataset={"a": data[8:], "b": data[6:]},
        compute_metrics=metric,
    )  # fmt: skip


@pytest.fixture(scope="module")
def skill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, base, and a vector that moves every tensor of it."""
    folder = tmp_path_factory.mktemp("skill")
    gpt2(folder / "base")
    save(folder / "tuned", perturbed(load(folder / "base"), 5, size=0.3))
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    return folder


def train(skill: Path, folder: Path, with_vector: bool) -> Trained:
    trainer = trainer_of(gpt2(folder / "start"), folder, Accuracy())
    if with_vector:
        trainer.add_callback(sv.SkillVectorEvaluation(trainer, skill / "v.safetensors", lam=0.5))
    trainer.train()
    drawn = random.random(), np.random.random()
    trainer.model.save_pretrained(folder / "end")
    state = {name: values.clone() for name, values in trainer.model.state_dict().items()}
    return Trained(state, trainer.state.log_history, drawn)


def test_an_evaluation_with_a_vector_changes_nothing_of_the_training(
    skill: Path, tmp_path: Path
) -> None:
    """Losses and weights are the same bits; the metrics are those of the model that apply makes."""
    from transformers import AutoModelForCausalLM

    alone = train(skill, tmp_path / "alone", False)
    beside = train(skill, tmp_path / "beside", True)
    for name, values in alone.state.items():
        assert (values.view(torch.uint8) == beside.state[name].view(torch.uint8)).all(), name
    assert alone.drawn == beside.drawn
    keys = ("loss", "grad_norm", "eval_a_loss", "eval_b_loss", "eval_b_argmax", "epoch", "step")
    plain = [line for line in beside.log if not any("skill" in key for key in line)]
    for one, other in zip(alone.log, plain, strict=True):
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys]
    skilled = [line for line in beside.log if any("skill" in key for key in line)]
    assert [line["step"] for line in skilled] == [2, 2, 4, 4]
    assert all(0.99 < value < 1.01 for line in skilled for key, value in line.items()
               if key.endswith("_gain"))  # fmt: skip
    sv.apply(tmp_path / "beside" / "end", skill / "v.safetensors", tmp_path / "merged", lam=0.5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = trainer_of(merged, tmp_path / "again", Accuracy()).evaluate()
    for key in ("a_loss", "a_argmax", "b_loss", "b_argmax"):
        (last,) = [line[f"eval_skill_{key}"] for line in skilled[2:] if f"eval_skill_{key}" in line]
        assert last == expected[f"eval_{key}"] != beside.log[-2].get(f"eval_{key}")


def test_where_the_evaluation_fails_the_model_has_its_bits(skill: Path, tmp_path: Path) -> None:
    metric = Accuracy(fails_at=2)  # of the first evaluation with the vector
    trainer = trainer_of(gpt2(tmp_path / "start"), tmp_path, metric)
    trainer.add_callback(sv.SkillVectorEvaluation(trainer, skill / "v.safetensors"))
    before = {name: values.clone() for name, values in trainer.model.state_dict().items()}
    with pytest.raises(ArithmeticError, match="a metric that fails"):
        trainer.evaluate()
    for name, values in trainer.model.state_dict().items():
        assert (values.view(torch.uint8) == before[name].view(torch.uint8)).all(), name
    sv.attach(trainer.model, skill / "v.safetensors").detach()  # nothing is attached


def test_a_vector_that_does_not_fit_is_refused_before_the_first_step(
    skill: Path, tmp_path: Path
) -> None:
    save(tmp_path / "base", toy(0, "F32"))
    save(tmp_path / "tuned", perturbed(toy(0, "F32")))
    other = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    trainer = trainer_of(gpt2(tmp_path / "start"), tmp_path)
    trainer.add_callback(sv.SkillVectorEvaluation(trainer, other))
    with pytest.raises(sv.IncompatibleError):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.model.peft_config = {}
    with pytest.raises(sv.IncompatibleError, match="with an adapter of PEFT in it"):
        trainer.train()
    with pytest.raises(sv.UsageError, match="no such"):
        sv.SkillVectorEvaluation(SimpleNamespace(model=None), tmp_path / "absent")


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
        learning_rate=1e-2, warmup_steps=0, disable_tqdm=True, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    texts = datasets.Dataset.from_list([{"text": " ".join(list(tokenizer.get_vocab())[:6])}] * 4)
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=texts, eval_dataset=texts,
        processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip
    save(tmp_path / "skilled", perturbed(load(tmp_path / "base"), 5, size=0.3))
    skill = sv.diff(tmp_path / "skilled", tmp_path / "base", tmp_path / "v.safetensors")
    trainer.add_callback(sv.SkillVectorEvaluation(trainer, skill))
    trainer.train()
    for step in (1, 2):  # what TRL notes itself stands under one name each
        lines = [line for line in trainer.state.log_history if line["step"] == step]
        (plain,) = [line for line in lines if "eval_loss" in line]
        (skilled,) = [line for line in lines if "eval_skill_loss" in line]
        assert skilled["eval_skill_loss"] != plain["eval_loss"]
        noted = {key.removeprefix("eval_") for key in plain if "runtime" not in key}
        noted -= {"samples_per_second", "steps_per_second", "epoch", "step"}
        assert noted >= {"loss", "mean_token_accuracy", "entropy"}
        assert noted <= {key.removeprefix("eval_skill_") for key in skilled}
        assert not any(key.startswith("eval_") and "skill" not in key for key in skilled)
    assert [path.name for path in callback.written] == [
        "skill-1.safetensors", "skill-2.safetensors",
    ]  # fmt: skip
    for path in callback.written:
        assert sv.verify(path).facts["verified"]
        assert sv.SkillVector.open(path).manifest["exactness"]["claim"] in ("bitwise", "partial")
