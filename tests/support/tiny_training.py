"""A tiny model with data to train it on, and configurations of trainings for a CPU."""

import json
from pathlib import Path
from typing import Any

import torch

from skillvec.recipes.mini.world import WorldConfig, build_tokenizer, build_world

WORLD = WorldConfig(base=8, s=4, t=4, first_names=4, values=3, texts=2)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def write_config(path: Path, **entries: Any) -> list[str]:
    """Write a configuration of two steps on the CPU; return the command line that takes it."""
    default = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 2,
               "report_to": "none", "disable_tqdm": True, "save_steps": 1, "learning_rate": 1e-2,
               "warmup_steps": 0}  # fmt: skip
    path.write_text(json.dumps(default | entries))  # JSON is YAML
    return ["--config", str(path)]


def make_start(folder: Path) -> Path:
    """Make model/ (one layer, fp32), texts.jsonl and questions.jsonl in a folder; return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
