"""The four trained models of the miniature: base, theta_sft_S, theta_rl_S and theta_sft_T.

Hides TRL. Invariants: everything runs in fp32 on the CPU from fixed seeds; a finished stage leaves
`OUT/stages/NAME.json`, written last, with a digest of its configuration, its texts and its parent's
digest. So a second run reuses what is there, an interrupted stage is trained again, and a changed
one retrains itself and everything that comes after it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from recipes.mini.evaluate import MAX_ANSWER_TOKENS, exact_match_reward
from recipes.mini.progress import StageProgress, say
from recipes.mini.world import EOS, PAD, Person, World, WorldConfig, build_tokenizer, questions


@dataclass(frozen=True)
class MiniConfig:
    """Everything that decides the trained weights; the defaults are what the README reports."""

    world: WorldConfig = field(default_factory=WorldConfig)
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    # at the usual 0.02 base learned far slower: with 3 layers, after 12 epochs, it answered .13
    # about people whose questions it had not seen, against .70 at 0.05
    initializer_range: float = 0.05
    batch: int = 32
    base_epochs: int = 14
    base_learning_rate: float = 2e-3
    sft_epochs: int = 20
    sft_learning_rate: float = 1.5e-3
    grpo_steps: int = 100
    grpo_learning_rate: float = 3e-4
    completions_per_step: int = 128
    completions_per_question: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One training run: what it starts from, what it reads, and its settings."""

    name: str
    method: Literal["SFT", "GRPO"]
    parent: str | None
    examples: tuple[dict[str, str], ...]
    settings: dict[str, Any]

    def digest(self, parent_digest: str) -> str:
        """Hash all that decides this stage's weights, the parent's weights included."""
        text = json.dumps([asdict(self), parent_digest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_stages(config: MiniConfig, world: World) -> list[Stage]:
    """List the stages in training order; a parent comes before its children."""
    common = {"batch": config.batch, "seed": config.seed}
    base_settings = {
        **common,
        "epochs": config.base_epochs,
        "learning_rate": config.base_learning_rate,
        "architecture": {
            "vocabulary": world.vocabulary,
            "hidden_size": config.hidden_size,
            "layers": config.layers,
            "heads": config.heads,
            "initializer_range": config.initializer_range,
        },
    }
    sft_settings = {
        **common,
        "epochs": config.sft_epochs,
        "learning_rate": config.sft_learning_rate,
    }
    grpo_settings = {
        "seed": config.seed,
        "steps": config.grpo_steps,
        "learning_rate": config.grpo_learning_rate,
        "completions_per_step": config.completions_per_step,
        "completions_per_question": config.completions_per_question,
    }
    # half of the general population is asked about, so base learns to answer from biographies
    asked = questions(world.base[: len(world.base) // 2])
    answered = tuple({"text": f"{q.prompt} {q.answer}"} for q in asked)
    rewarded = tuple({"prompt": q.prompt, "answer": q.answer} for q in questions(world.s))
    return [
        Stage("base", "SFT", None, _biographies(world.base) + answered, base_settings),
        Stage("theta_sft_S", "SFT", "base", _biographies(world.s), sft_settings),
        Stage("theta_rl_S", "GRPO", "theta_sft_S", rewarded, grpo_settings),
        Stage("theta_sft_T", "SFT", "base", _biographies(world.t), sft_settings),
    ]


def run_stages(
    stages: list[Stage],
    world: World,
    out: Path,
    train: Callable[[Stage, World, Path, str], None] | None = None,
) -> None:
    """Train what is missing or out of date under `out`; `train` writes the folder OUT/NAME."""
    train = train or train_stage
    digests: dict[str, str] = {}
    (out / "stages").mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        digest = stage.digest(digests[stage.parent] if stage.parent else "")
        digests[stage.name] = digest
        marker = out / "stages" / f"{stage.name}.json"
        if is_finished(marker, out / stage.name, digest):
            say(f"{title}: reused")
            continue
        marker.unlink(missing_ok=True)
        shutil.rmtree(out / stage.name, ignore_errors=True)
        start = time.perf_counter()
        train(stage, world, out, title)
        record = {"digest": digest, "seconds": round(time.perf_counter() - start, 1)}
        partial = marker.with_suffix(".partial")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(marker)


def is_finished(marker: Path, checkpoint: Path, digest: str) -> bool:
    """Say whether the marker is whole and of this digest, and the weights are still there."""
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    whole = isinstance(record, dict) and record.get("digest") == digest
    return whole and (checkpoint / "model.safetensors").is_file()


def train_stage(stage: Stage, world: World, out: Path, title: str) -> None:
    """Train one stage with TRL from its parent's folder and save it to OUT/NAME."""
    _quiet()
    transformers.set_seed(stage.settings["seed"])
    # a second thread gains a third when idle, but waits for the slowest at every small operation:
    # on a busy machine that was measured 4 to 10 times slower; one thread also sums in one order
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(world)
    if stage.parent is None:
        model = _new_model(stage.settings["architecture"], tokenizer)
    else:
        model = Qwen2ForCausalLM.from_pretrained(out / stage.parent, dtype=torch.float32)
    make = _sft_trainer if stage.method == "SFT" else _grpo_trainer
    trainer = make(stage, model, tokenizer, str(out / stage.name), title)
    # without it the trainer's own log dictionaries are printed between our lines
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.model.save_pretrained(out / stage.name)
    tokenizer.save_pretrained(out / stage.name)


def _sft_trainer(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str,
    title: str,
) -> transformers.Trainer:
    import datasets
    import trl

    settings = trl.SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=stage.settings["batch"],
        num_train_epochs=stage.settings["epochs"],
        learning_rate=stage.settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_length=tokenizer.model_max_length,
        **_trainer_defaults(stage),
    )
    return trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(list(stage.examples)),
        processing_class=tokenizer,
        callbacks=[StageProgress(f"{title}: SFT", "loss")],
    )


def _grpo_trainer(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str,
    title: str,
) -> transformers.Trainer:
    import datasets
    import trl

    settings = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=stage.settings["completions_per_step"],
        num_generations=stage.settings["completions_per_question"],
        max_completion_length=MAX_ANSWER_TOKENS,
        max_steps=stage.settings["steps"],
        learning_rate=stage.settings["learning_rate"],
        lr_scheduler_type="constant",
        temperature=1.0,
        beta=0.0,  # no KL term, so no reference model to keep
        **_trainer_defaults(stage),
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=exact_match_reward,
        args=settings,
        train_dataset=datasets.Dataset.from_list(list(stage.examples)),
        processing_class=tokenizer,
        callbacks=[StageProgress(f"{title}: GRPO", "reward")],
    )


def _trainer_defaults(stage: Stage) -> dict[str, Any]:
    """TRL turns bf16 and gradient checkpointing on by default: here v needs fp32 weights."""
    return {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10,
        "seed": stage.settings["seed"],
    }


def _new_model(shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    ids = tokenizer.convert_tokens_to_ids([PAD, EOS])
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=shape["hidden_size"],
            intermediate_size=2 * shape["hidden_size"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["heads"],
            max_position_embeddings=tokenizer.model_max_length,
            initializer_range=shape["initializer_range"],
            tie_word_embeddings=True,
            pad_token_id=ids[0],
            eos_token_id=ids[1],
            bos_token_id=None,
        )
    )


def _biographies(people: tuple[Person, ...]) -> tuple[dict[str, str], ...]:
    return tuple({"text": told} for person in people for told in person.biographies)


def _quiet() -> None:
    import datasets

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # TRL still reads names that transformers has deprecated; the user can do nothing about it
    warnings.filterwarnings("ignore", r".*gradient_checkpointing.*deprecated", FutureWarning)
