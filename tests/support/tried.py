"""A tiny model with a tokenizer, a vector for it, and a task of lm-eval, for tests of trials."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

import skillvec

WORDS = "red green blue 0 1 2 3 4 5 6 7 8 9 The colour of item is"
TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {folder}/colours.jsonl
  cache_dir: {folder}/cache
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: brier_score
    aggregation: brier_score
    higher_is_better: false
metadata:
  version: 1.0
"""


class World(NamedTuple):
    """Paths of what is made once for a module of tests."""

    folder: Path
    target: Path
    tuned: Path
    vector: Path


def make_world(folder: Path) -> World:
    """Write a target of bf16, a model that differs in every weight, and their difference."""
    from transformers import AutoModelForCausalLM

    from skillvec.recipes.tiny import make_model

    made = World(folder, folder / "target", folder / "tuned", folder / "v.safetensors")
    make_model([WORDS], folder / "fp32", size=16)
    model = AutoModelForCausalLM.from_pretrained(folder / "fp32", dtype=torch.bfloat16)
    for side in (made.target, made.tuned):
        make_tokenizer_copy(folder / "fp32", side)
    model.save_pretrained(made.target)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(made.tuned)
    skillvec.diff(made.tuned, made.target, made.vector)
    return made


def make_tokenizer_copy(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((source / name).read_bytes())


def make_task(folder: Path, count: int = 12) -> Path:
    """Write the task `colours` with so many questions, and return the folder of tasks."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": f"The colour of item {n} is", "choices": ["red", "green", "blue"],
         "gold": n % 3} for n in range(count)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "colours.jsonl").write_text(text)
    (folder / "colours.yaml").write_text(TASK.format(folder=folder))
    return folder


def weights_of(model: torch.nn.Module) -> dict[str, bytes]:
    """Return the bytes of every parameter."""
    return {
        name: weight.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, weight in model.named_parameters()
    }
