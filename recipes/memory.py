"""What a training needs on each GPU and on the disk, from its settings alone.

Counts what follows from the number of parameters: weights, gradients, the moments of the optimiser,
the reference model of RL, vLLM's copy. Activations, buffers and the layers that FSDP and ZeRO
gather for a moment are named as not included.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from skillvec.recipes.launch import count_processes, sharding, visible_gpus
from skillvec.recipes.stages import Pipeline, maker

Shapes = dict[str, tuple[int, ...]]

NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# bytes of moments for each trained parameter, by the beginning of `optim`; others as AdamW
MOMENTS = {
    "adamw_8bit": 2, "paged_adamw_8bit": 2, "adamw_bnb_8bit": 2, "adafactor": 0, "sgd": 0,
    "lion": 4, "paged_lion": 4, "adagrad": 4, "rmsprop": 4,
}  # fmt: skip
NO_TARGETS = r"(embed_tokens|lm_head|wte|wpe)$"  # of `all-linear`
SPREAD = {"none": 0, "optimizer": 1, "gradients": 2, "all": 3}


@dataclass(frozen=True)
class Memory:
    """Bytes of one training on one GPU, and of one of its checkpoints on the disk."""

    weights: float
    gradients: float
    moments: float
    reference: float
    vllm: float
    checkpoint: float

    @property
    def gpu(self) -> float:
        return self.weights + self.gradients + self.moments + self.reference + self.vllm


def training_memory(
    parameters: float,
    trained: float | None = None,
    dtype: str = "float32",
    optim: str = "adamw_torch",
    reference: bool = False,
    processes: int = 1,
    spread: str = "none",
    vllm: float = 0.0,
    compute: str = "bfloat16",
) -> Memory:
    """Return what training `trained` of `parameters` values takes; all of them unless given.

    Weights and gradients have the size of `dtype`, AdamW's two moments 4 bytes each. `spread` is
    what is cut into `processes` parts: "none", "optimizer", "gradients" (and the optimiser) or
    "all" (and weights). `vllm` is the bytes that vLLM takes of a GPU. Where weights are spread the
    reference model is too; TRL makes one unit of it, which is gathered whole, in the dtype
    `compute`, while it is asked.
    """
    trained = parameters if trained is None else trained
    size, level = NBYTES.get(dtype, 4), SPREAD[spread]
    moments = next((n for start, n in MOMENTS.items() if optim.startswith(start)), 8)
    adapter = 0.0 if trained == parameters else trained
    weights = size * (parameters + adapter) / (processes if level > 2 else 1)
    asked = size * parameters
    if level > 2 and processes > 1:
        asked = asked / processes + NBYTES[compute] * parameters
    gradients = size * trained / (processes if level > 1 else 1)
    if level == 0 and processes > 1:
        gradients *= 2  # DistributedDataParallel sends them from buckets as large as they are
    return Memory(
        weights=weights,
        gradients=gradients,
        moments=moments * trained / (processes if level > 0 else 1),
        reference=asked * reference,
        vllm=vllm,
        checkpoint=(size + moments) * trained,
    )


def adapter_parameters(shapes: Mapping[str, Sequence[int]], settings: Mapping[str, Any]) -> float:
    """Return how many values LoRA trains: r x (inputs + outputs) of each matrix that it targets."""
    targets, rank = settings.get("lora_target_modules"), settings.get("lora_r") or 16
    targets = [targets] if isinstance(targets, str) else targets
    found = 0.0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or module == name or re.search(NO_TARGETS, module):
            continue
        if targets in (None, ["all-linear"]) or module.rpartition(".")[2] in targets:
            found += rank * (shape[0] + shape[1])
    return found


def stage_memory(
    settings: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]] | None,
    parameters: float,
    processes: int,
    spread: str,
    gpu: float | None,
) -> Memory:
    """Return the memory of a training stage; `gpu` is the memory of one, for vLLM's share of it.

    Without the `shapes` of the base an adapter counts as nothing.
    """
    adapts = bool(settings.get("use_peft"))
    trained = None if not adapts else adapter_parameters(shapes, settings) if shapes else 0.0
    vllm = 0.0
    if settings.get("use_vllm") and settings.get("vllm_mode", "colocate") == "colocate":
        # weights in 16 bits, and the cache of keys and values within its share
        share = float(settings.get("vllm_gpu_memory_utilization", 0.3))
        copy = 2 * parameters / int(settings.get("vllm_tensor_parallel_size", 1))
        vllm = max(copy, share * (gpu or 0))
    return training_memory(
        parameters,
        trained,
        str(settings.get("dtype", "float32")),
        str(settings.get("optim", "adamw_torch")),
        float(settings.get("beta") or 0) > 0 and "rewards" in settings and not adapts,
        processes,
        spread,
        vllm,
        "bfloat16" if settings.get("bf16", True) else "float32",
    )


def print_memory(line: Pipeline) -> None:
    """Print what every training stage of a pipeline needs, beside the GPUs that are visible."""
    from rich.console import Console
    from rich.table import Table

    from skillvec.analysis.wording import human_bytes

    stages = [stage for stage in line.stages if stage.settings is not None]
    shapes = base_shapes(line)
    parameters = sum(map(prod, shapes.values())) if shapes else line.parameters
    if not stages or not parameters:
        return
    gpus = visible_gpus()
    processes = count_processes(line.launch, line.processes)
    spread = sharding(line.launch) if line.launch else "none"
    least = min(gpus, default=None)
    named: dict[Memory, list[str]] = {}
    for stage in stages:
        found = stage_memory(stage.settings, shapes, parameters, processes, spread, least)
        named.setdefault(found, []).append(stage.name)
    many = processes > 1
    title = f"memory of each of {processes} processes" if many else "memory of a training"
    table = Table(title=title, title_justify="left", box=None)
    titles = ("training", "weights", "gradients", "moments", "reference", "vLLM", "sum")
    for column in (*titles, "of all") if many else titles:
        table.add_column(column, justify="left" if column == "training" else "right")
    for found, names in named.items():
        parts = (found.weights, found.gradients, found.moments, found.reference, found.vllm)
        enough = least is None or found.gpu <= least
        whole = human_bytes(found.gpu) + ("" if enough else " - NOT ENOUGH")
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        cells = [*(human_bytes(n) if n else "" for n in parts), whole]
        cells += [human_bytes(found.gpu * processes)] if many else []
        table.add_row(names[0] + others, *cells)
    console = Console()
    console.print(table)
    seen = f"{len(gpus)} GPUs of {human_bytes(least)}" if least else "no GPU is visible here"
    console.print(f"besides activations and buffers, which depend on batch and length; {seen}")


def base_shapes(line: Pipeline) -> Shapes | None:
    """Return the shapes of the base model's tensors from its headers, here or on the Hub.

    None while a stage has yet to make it, and where the Hub does not answer.
    """
    if Path(line.base).exists():
        return _shapes(line.base)
    return None if maker(line, None, line.base) else _shapes_of_hub(line.base)


def _shapes(base: str) -> Shapes | None:
    from skillvec.checkpoints.opening import open_checkpoint
    from skillvec.errors import SkillvecError

    try:
        return {name: tuple(spec.shape) for name, spec in open_checkpoint(base, "base").items()}
    except SkillvecError:
        return None


_shapes_of_hub = functools.cache(_shapes)  # to find that it does not answer takes seconds
