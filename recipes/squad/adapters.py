"""LoRA adapters, one a passage: trained once, then swapped on a model that stays loaded.

Hides how peft mounts and unmounts. Invariants: an adapter's folder appears under its name only when
it is finished, with the settings that made it; with other settings, texts or another base it is
trained again; the weights of the base are never changed. Loss is on all tokens; TRL ends every text
with one end token.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Lora:
    """How one adapter is trained; the defaults are SEAL's for a single passage.

    SEAL names no modules, and peft's choice for Qwen2 and Llama is q_proj and v_proj.
    """

    r: int = 32
    alpha: int = 64
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    epochs: float = 10
    learning_rate: float = 1e-3
    batch: int = 1
    max_length: int = 2048
    seed: int = 0


def adapter_settings(lora: Lora, base: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return everything that an adapter follows from, as JSON."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    return json.loads(json.dumps({"lora": asdict(lora), "base": stamp(base), "texts": digest}))


def stamp(path: str | Path) -> list[Any]:
    """Return names, sizes and times of the weight files of a folder, or of one file."""
    found = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in found]


def is_finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether the folder holds the adapter that the settings describe."""
    file = folder / SETTINGS
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == settings


def train_adapters(base: str, jobs: Mapping[Path, Sequence[str]], lora: Lora, dtype: str) -> int:
    """Train an adapter on each job's texts, skipping what is finished; return how many were."""
    wanted = {folder: adapter_settings(lora, base, texts) for folder, texts in jobs.items()}
    pending = [folder for folder, settings in wanted.items() if not is_finished(folder, settings)]
    if not pending:
        return 0
    import datasets

    from skillvec.recipes.evaluate import load_model

    datasets.disable_progress_bars()  # three an adapter
    model, tokenizer = load_model(base, dtype)
    for done, folder in enumerate(pending, start=1):
        staged = folder.with_name(folder.name + ".partial")
        shutil.rmtree(staged, ignore_errors=True)
        model = _train_one(model, tokenizer, jobs[folder], lora, staged)
        (staged / SETTINGS).write_text(json.dumps(wanted[folder], indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
        print(f"adapters: {done} of {len(pending)} trained, {folder}", flush=True)
    datasets.enable_progress_bars()
    return len(pending)


def _train_one(model: Any, tokenizer: Any, texts: Sequence[str], lora: Lora, folder: Path) -> Any:
    """Train and save one adapter; return the base model without it."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    gpu = torch.cuda.is_available()
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in texts]),
        peft_config=peft.LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(lora.targets),
            task_type="CAUSAL_LM",
        ),
        args=trl.SFTConfig(
            output_dir=str(folder), num_train_epochs=lora.epochs, learning_rate=lora.learning_rate,
            per_device_train_batch_size=lora.batch, max_length=lora.max_length, seed=lora.seed,
            bf16=gpu, use_cpu=not gpu, gradient_checkpointing=False, save_strategy="no",
            report_to="none", logging_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained.save_pretrained(folder)
    return trained.unload()


def answer_with(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[Path | None, Sequence[Any]]],
    max_new_tokens: int,
    batch: int,
) -> list[str]:
    """Answer prompts, each run of them with its own adapter (None: the model alone)."""
    import peft

    from skillvec.recipes.evaluate import answer_all

    said: list[str] = []
    for folder, prompts in asked:
        if folder is None:
            said += answer_all(model, tokenizer, prompts, max_new_tokens, batch)
            continue
        mounted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        said += answer_all(mounted, tokenizer, prompts, max_new_tokens, batch)
        model = mounted.unload()
    return said
