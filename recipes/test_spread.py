"""Two processes that share a model end where one does: FSDP2 and ZeRO-3, SFT and GRPO, LoRA.

Every run is a process or two of its own, which import torch: all of it is slow. The processes talk
by gloo on the CPU (tests/support/spread.py). Sums over processes are added in another order than
those of one, and Adam divides by their roots, so weights may differ by a few roundings of fp32:
1e-6 at most, where the training moves them by 1e-2.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import spread
from safetensors.torch import load_file
from tiny_training import make_start, write_config

import skillvec as sv
from skillvec.recipes.launch import launch_words

pytestmark = pytest.mark.slow
TOLERANCE, MOVED = 1e-6, 5e-3
SPREAD = ["fsdp2", pytest.param("zero3", marks=pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is installed by `make slow`"))]  # fmt: skip
LORA = {
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
}
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 64},
    "sft-lora": {"max_length": 64, **LORA},
    "grpo": {"beta": 0.1, "rewards": ["spread:reward"], "num_generations": 4,
             "max_completion_length": 3},
}  # fmt: skip
KINDS["grpo-lora"] = KINDS["grpo"] | LORA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the start, and the model that one process makes of it, by kind."""
    return make_start(tmp_path_factory.mktemp("spread"))


def train(folder: Path, kind: str, out: Path, words: list[str], **more: Any) -> str:
    """Run a recipe; return what it printed, or raise with it if it failed."""
    module = kind.removesuffix("-lora")
    data = "texts.jsonl" if module == "sft" else "questions.jsonl"
    settings: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "data": str(folder / data),
        "columns": ["text"] if module == "sft" else ["prompt", "answer"],
        "save_strategy": "no",
        "global_batch": 8,
        "per_device_train_batch_size": 4,
    }
    config = out.with_suffix(".yaml")
    config.parent.mkdir(exist_ok=True)
    given = write_config(config, **settings | KINDS[kind] | {"output_dir": str(out)} | more)
    paths = [str(Path(sv.__file__).parents[1]), str(Path(spread.__file__).parent)]
    done = subprocess.run(
        [*words, spread.__file__, f"skillvec.recipes.{module}", *given],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "REPEATABLE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alone(folder: Path, kind: str) -> Path:
    out = folder / "alone" / kind
    if not out.exists():
        told = train(folder, kind, out, [sys.executable])
        assert "global batch 8 = 1 processes x 4 at once x 2 accumulated" in told
    return out


def compare(folder: Path, one: Path, two: Path) -> None:
    """Demand that two folders hold the same model in fp32, and that it is not the start."""
    first, second, start = (
        load_file(f / "model.safetensors") for f in (one, two, folder / "model")
    )
    assert first.keys() == second.keys() == start.keys()
    assert all(str(tensor.dtype) == "torch.float32" for tensor in second.values())
    assert max((first[name] - start[name]).abs().max() for name in first) > MOVED
    assert max((first[name] - second[name]).abs().max() for name in first) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("launch", SPREAD)
def test_two_processes_end_where_one_does(folder: Path, launch: str, kind: str) -> None:
    out = folder / launch / kind
    told = train(folder, kind, out, launch_words(launch, 2))
    assert told.count("global batch 8 = 2 processes x 4 at once x 1 accumulated") == 1
    assert told.count("2 steps in") == 1  # and not once a process
    compare(folder, alone(folder, kind), out)


@pytest.mark.parametrize("kind", ["sft-lora", "grpo"])
def test_two_copies_end_where_one_does(folder: Path, kind: str) -> None:
    test_two_processes_end_where_one_does(folder, "multi_gpu", kind)


@pytest.mark.parametrize("launch", SPREAD)
def test_a_cut_training_of_two_processes_goes_on(folder: Path, launch: str) -> None:
    whole, rest = folder / launch / "whole", folder / launch / "rest"
    words = launch_words(launch, 2)
    train(folder, "sft", whole, words, save_strategy="steps", save_steps=1, vectors=True)
    vector = sv.SkillVector.open(whole / "skill-2.safetensors")  # of a checkpoint in shards
    assert vector.manifest["dtype"] == "auto" and sv.verify(vector.ref).facts["verified"]
    last = sv.diff(whole, folder / "model", folder / f"{launch}.safetensors")
    assert last.report.facts["norm"] == pytest.approx(
        sv.inspect(vector.ref).facts["norm"], rel=1e-6
    )
    shards = whole / "checkpoint-1"
    train(folder, "sft", rest, words, resume_from_checkpoint=str(shards), save_strategy="steps",
          save_steps=1, remove_checkpoints=True)  # fmt: skip
    compare(folder, alone(folder, "sft"), rest)
    assert not list(rest.glob("checkpoint-*")) and list(whole.glob("checkpoint-*"))


@pytest.mark.parametrize("launch", SPREAD)
def test_what_is_16_bit_while_it_computes_starts_from_fp32(folder: Path, launch: str) -> None:
    """A step of 1e-30 moves nothing; a start that was rounded to bf16 would have moved."""
    out = folder / launch / "still"
    with pytest.raises(AssertionError, match=r"sft: .*so v = 0") as failed:
        train(folder, "sft", out, launch_words(launch, 2), bf16=True, learning_rate=1e-30)
    assert str(failed.value).count("so v = 0") == 1 and "[rank1]" not in str(failed.value)
    before, after = (load_file(at / "model.safetensors") for at in (folder / "model", out))
    assert all((before[name] == after[name]).all() for name in before)
