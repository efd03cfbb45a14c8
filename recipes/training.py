"""What the training recipes share: rows from the Hub or a file, rewards by name, whole weights out.

Hides where data comes from and how adapters become models. Rows are checked before a model is
loaded: a missing column or an empty value names the source, the column and the rows. What is saved
is always a whole model in the dtype that it was trained in, because a skill vector is a difference
of whole models.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class Data:
    """Where the rows are and what a row must hold."""

    data: str = field(metadata={"help": "Hub id, or a .json, .jsonl, .parquet or .csv file."})
    subset: str | None = field(default=None, metadata={"help": "Configuration of a Hub id."})
    split: str = field(default="train", metadata={"help": "Split of a Hub id."})
    columns: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "Columns that every row must fill: text, messages, prompt, ..."},
    )
    vectors: bool = field(
        default=False,
        metadata={"help": "Write skill-N.safetensors beside every checkpoint-N (full training)."},
    )


def load_rows(data: Data) -> Any:
    """Return the rows as a datasets.Dataset.

    Raises ValueError for a column that is missing, and for rows in which one is empty.
    """
    import datasets

    suffix = Path(data.data).suffix
    if suffix in FILES:
        if not Path(data.data).is_file():
            raise ValueError(f"{data.data}: no such file")
        rows = datasets.load_dataset(FILES[suffix], data_files=data.data, split="train")
    else:
        rows = datasets.load_dataset(data.data, data.subset, split=data.split)
    for column in data.columns:
        if column not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise ValueError(f"{data.data}: no column {column!r}; found {found}")
        empty = [i for i, value in enumerate(rows[column]) if _is_empty(value)]
        if empty:
            shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            raise ValueError(f"{data.data}: {column!r} is empty in {len(empty)} rows: {shown}")
    return rows


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list) and not (value and str(value).strip()))


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that "module:function" names; ValueError where there is none."""
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from None
    if not callable(found):
        raise ValueError(f"{name}: expected module:function")
    return found


def fetch_model(name: str, fetch: bool = True) -> str:
    """Return the folder of a model: `name` if it is one, else what the Hub has (name@revision).

    Weights in safetensors and what goes with them; without `fetch` from the cache alone. Raises
    what huggingface_hub raises.
    """
    if Path(name).is_dir():
        return name
    import huggingface_hub

    repository, _, revision = name.partition("@")
    return huggingface_hub.snapshot_download(
        repository,
        revision=revision or None,
        local_files_only=not fetch,
        allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
    )


def callbacks_for(data: Data, model: Any, method: str) -> list[Any]:
    """Return the SkillVectorCallback that writes vectors, if they are asked for."""
    if not data.vectors:
        return []
    from skillvec import SkillVectorCallback

    return [SkillVectorCallback(model.model_name_or_path, method=method)]


def model_arguments(model: Any) -> dict[str, Any]:
    """Return what from_pretrained is called with; TRL's default dtype is fp32, which v needs."""
    asked = {"revision": model.model_revision, "dtype": model.dtype,
             "attn_implementation": model.attn_implementation}  # fmt: skip
    return {key: value for key, value in asked.items() if value is not None}


def ignore_deprecations() -> None:
    """Silence what a user can do nothing about: TRL reads a name that transformers deprecated."""
    warnings.filterwarnings("ignore", r".*gradient_checkpointing.*deprecated", FutureWarning)


def hush(settings: Any) -> None:
    """Turn off the libraries' bars if `disable_tqdm` says so: recipes/progress.py shows its own."""
    if settings.disable_tqdm:
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def trainer_arguments(data: Data, settings: Any, model: Any, method: str) -> dict[str, Any]:
    """Return what both of TRL's trainers take; the rows are checked, no model is loaded yet."""
    import trl

    hush(settings)
    rows, callbacks = load_rows(data), callbacks_for(data, model, method)
    settings.model_init_kwargs = model_arguments(model) | (settings.model_init_kwargs or {})
    return {
        "model": model.model_name_or_path,
        "args": settings,
        "train_dataset": rows,
        "peft_config": trl.get_peft_config(model),
        "callbacks": callbacks,
    }


def train_and_save(trainer: Any, metric: str) -> None:
    """Train, resuming if the arguments say so, and save a whole model: adapters are merged.

    With `disable_tqdm` the steps, `metric` and the time left are shown by recipes/progress.py.
    """
    if trainer.args.disable_tqdm:
        import transformers

        from skillvec.recipes.progress import TrainingProgress

        # it would print dictionaries between the lines
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(TrainingProgress(metric))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    folder = trainer.args.output_dir
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        trainer.save_model(folder)  # gathers what FSDP and ZeRO have spread
        return
    merged = model.merge_and_unload()
    if trainer.is_world_process_zero():
        merged.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
