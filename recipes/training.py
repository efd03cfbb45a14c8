"""What the training recipes share: arguments, rows from the Hub or a file, rewards by name.

Hides where data comes from, and how a batch is cut over processes. Rows are checked before a model
is loaded: a missing column or an empty value names the source, the column and the rows. What is
saved (recipes/weights.py) is always a whole model in the dtype that it was trained in, because a
skill vector is a difference of whole models.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

# what an argument of TRL needs: its package
REPORTERS = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard",
             "mlflow": "mlflow", "swanlab": "swanlab"}  # fmt: skip
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class RecipeError(ValueError):
    """What was found and what to set, in a sentence for who runs a recipe."""


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
    global_batch: int | None = field(
        default=None,
        metadata={
            "help": "Rows (GRPO: completions) of one optimiser step over all processes; "
            "per_device_train_batch_size is then the most that one takes at once."
        },
    )
    remove_checkpoints: bool = field(
        default=False,
        metadata={"help": "Remove every checkpoint-N when the whole model is saved and checked."},
    )


def parse(
    dataclasses: Sequence[type],
    arguments: Sequence[str] | None,
    description: str,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """Return an object of each dataclass from --config FILE and the command line, which goes over.

    `defaults` stand in place of TRL's. The batch is cut by `cut_batch`. Raises RecipeError for what
    needs a package that is not installed, and for a batch that cannot be cut.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parser = make_parser(dataclasses, processes, defaults, description=description)
    return parser.parse_args_and_config(arguments)


def make_parser(
    dataclasses: Sequence[type], processes: int, defaults: Mapping[str, Any] | None, **more: Any
) -> Any:
    """Return TRL's parser of the arguments, which cuts the batch over so many processes.

    `defaults`, errors as of `parse`.
    """
    import trl

    class Parser(trl.TrlParser):  # type: ignore[misc]
        def parse_known_args(self, *given: Any, **more: Any) -> Any:
            found, rest = super().parse_known_args(*given, **more)
            if missing := find_missing(vars(found)):
                raise RecipeError(missing[0])
            cut_batch(found, processes)
            return found, rest

    parser = Parser(dataclasses, **more)
    parser.set_defaults(gradient_accumulation_steps=None, **(defaults or {}))
    return parser


def cut_batch(given: Any, processes: int) -> None:
    """Cut `global_batch` into processes x per device x accumulated, in place.

    `given` holds parsed arguments. For GRPO all three count completions, `generation_batch_size`
    (as much as `global_batch` unless it is given) those that are sampled at once: several optimiser
    steps are made of them. Raises RecipeError, naming the numbers, for what does not divide.
    """
    batch, accumulated = given.global_batch, given.gradient_accumulation_steps
    if batch is None:
        given.gradient_accumulation_steps = 1 if accumulated is None else accumulated
        return
    for name in ("gradient_accumulation_steps", "steps_per_generation"):
        if getattr(given, name, None) is not None:
            raise RecipeError(f"global_batch: says what {name} says; leave one of them out")
    if batch < 1 or batch % processes:
        raise RecipeError(
            f"global_batch {batch}: cannot be cut into {processes} equal parts, one a process; take"
            f" a multiple of {processes}, or another number of processes"
        )
    share = batch // processes
    most = min(share, given.per_device_train_batch_size)
    given.per_device_train_batch_size = next(n for n in range(most, 0, -1) if share % n == 0)
    given.gradient_accumulation_steps = share // given.per_device_train_batch_size
    if (group := getattr(given, "num_generations", None)) is not None:
        sampled = given.generation_batch_size or batch
        if sampled % batch or sampled % group:
            name = "generation_batch_size" if given.generation_batch_size else "global_batch"
            raise RecipeError(
                f"{name} {sampled} completions: expected a multiple of num_generations ({group}),"
                f" the completions of one prompt, and of global_batch ({batch})"
            )
    if processes > 1 or share > given.per_device_train_batch_size:
        say(
            f"global batch {batch} = {processes} processes x {given.per_device_train_batch_size} at"
            f" once x {given.gradient_accumulation_steps} accumulated"
        )


def find_missing(settings: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each package that the arguments ask for and that is not installed."""
    told = settings.get("report_to") or []
    told = [told] if isinstance(told, str) else told
    wanted = [(f"report_to: {name}", REPORTERS[name]) for name in told if name in REPORTERS]
    if settings.get("use_vllm"):
        wanted.append(("use_vllm: true", "vllm"))
    if settings.get("use_peft"):
        wanted.append(("use_peft: true", "peft"))
    return [
        f"{asked} needs the package {package}, which is not installed here: pip install {package}"
        for asked, package in wanted
        if importlib.util.find_spec(package) is None
    ]


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line on the first process, at once."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=file, flush=True)


def announce(name: str) -> None:
    """Print something before the imports that take long."""
    if "trl" not in sys.modules:
        say(f"{name}: loading PyTorch and TRL")


def run_alone(main: Callable[[], int], name: str) -> int:
    """Return the exit code of a recipe; what it refuses is a sentence in place of a trace."""
    try:
        code = main()
    except RecipeError as error:
        say(f"{name}: {error}", sys.stderr)
        return 1
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads may abort a process that ends before
    return code


def load_rows(data: Data) -> Any:
    """Return the rows as a datasets.Dataset.

    Raises RecipeError for a column that is missing, and for rows in which one is empty.
    """
    import datasets

    suffix = Path(data.data).suffix
    if suffix in FILES:
        if not Path(data.data).is_file():
            raise RecipeError(f"{data.data}: no such file")
        rows = datasets.load_dataset(FILES[suffix], data_files=data.data, split="train")
    else:
        rows = datasets.load_dataset(data.data, data.subset, split=data.split)
    check_columns(rows, data.columns, data.data)
    return rows


def check_columns(rows: Any, columns: Sequence[str], source: str) -> None:
    """Raise RecipeError for a column that a datasets.Dataset lacks or that a row leaves empty."""
    for column in columns:
        if column not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise RecipeError(f"{source}: no column {column!r}; found {found}")
        empty = [i for i, value in enumerate(rows[column]) if _is_empty(value)]
        if empty:
            shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            raise RecipeError(f"{source}: {column!r} is empty in {len(empty)} rows: {shown}")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list) and not (value and str(value).strip()))


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that "module:function" names; RecipeError where there is none."""
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{name}: {error}") from None
    if not callable(found):
        raise RecipeError(f"{name}: expected module:function")
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
    if settings.n_gpu > 1:
        raise RecipeError(
            f"one process sees {settings.n_gpu} GPUs and would copy the model to each at every step"
            " (DataParallel): `launch: fsdp2`, or CUDA_VISIBLE_DEVICES with one of them"
        )
    import trl

    from skillvec.recipes.weights import keep_whole

    hush(settings)
    keep_whole(settings, model.dtype)
    rows, callbacks = load_rows(data), callbacks_for(data, model, method)
    settings.model_init_kwargs = model_arguments(model) | (settings.model_init_kwargs or {})
    return {
        "model": model.model_name_or_path,
        "args": settings,
        "train_dataset": rows,
        "peft_config": trl.get_peft_config(model),
        "callbacks": callbacks,
    }


def train(trainer: Any, metric: str) -> None:
    """Train, going on from a checkpoint if the arguments name one.

    With `disable_tqdm` the steps, `metric` and the time left are shown by recipes/progress.py.
    """
    if trainer.args.disable_tqdm:
        import transformers

        from skillvec.recipes.progress import TrainingProgress

        # it would print dictionaries between the lines
        trainer.remove_callback(transformers.PrinterCallback)
        if trainer.is_world_process_zero():
            trainer.add_callback(TrainingProgress(metric))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)


def finish(trainer: Any, data: Data, model: Any, moves: bool = True) -> None:
    """Save the whole model and check it, then remove the checkpoints if that is asked for."""
    from skillvec.recipes.weights import save_whole

    name, revision = model.model_name_or_path, model.model_revision
    at = name if revision in (None, "main") else f"{name}@{revision}"
    save_whole(trainer, fetch_model(at, fetch=False), model.dtype, moves)
    if data.remove_checkpoints and trainer.is_world_process_zero():
        for folder in Path(trainer.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder)
