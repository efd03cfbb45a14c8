"""How a training command is spread over processes: `launch` of a pipeline, as words.

Hides accelerate's command line and where its configurations lie: recipes/accelerate, which is
installed with the package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).with_name("accelerate")
# what a training that is launched does so that one that was cut can go on: docs/past.md
RESUMABLE: Mapping[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 0.2,  # of all steps
    "save_total_limit": 1,
    "remove_checkpoints": True,
}


def launch_words(launch: str | Sequence[str], processes: int | None = None) -> list[str]:
    """Return the words before `-m module`: for a name of recipes/accelerate, a file, or words.

    `processes`: as many as GPUs are visible unless it is given; words are taken as they are. Raises
    ValueError for an unknown name, a file that is not there, and a package that is not installed.
    """
    if not isinstance(launch, str):
        return list(launch)
    path = find_config(launch)
    for package in ("accelerate", "deepspeed"):
        if not _is_there(package) and (package == "accelerate" or is_deepspeed(path)):
            raise ValueError(f"launch {launch}: needs the package {package}: pip install {package}")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*words, "--num_processes", str(count_processes(launch, processes))]


def count_processes(launch: str | Sequence[str], processes: int | None = None) -> int:
    """Return how many processes a training has: as stated, else the GPUs that are visible.

    Words of the user's own say it by --num_processes; without `launch` there is one.
    """
    words = [] if isinstance(launch, str) else list(launch)
    if "--num_processes" in words[:-1]:
        return int(words[words.index("--num_processes") + 1])
    if not launch or not _is_there("torch"):
        return 1
    if processes is None:
        import torch

        processes = torch.cuda.device_count()
    return max(1, processes)


def find_config(launch: str) -> Path:
    """Return the accelerate configuration that `launch` names."""
    path = CONFIGS / f"{launch}.yaml"
    if not path.is_file() and not (path := Path(launch)).is_file():
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise ValueError(
            f"launch {launch}: expected {names}, an accelerate configuration, or a list of words"
        )
    return path


def is_deepspeed(path: Path) -> bool:
    return read_config(path).get("distributed_type") == "DEEPSPEED"


def read_config(path: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
    return read if isinstance(read, dict) else {}


def sharding(launch: str | Sequence[str]) -> str:
    """Return what is spread: "none", "optimizer" (ZeRO-1), "gradients" (ZeRO-2) or "all".

    Of a list of words, what their --config_file says; "none" where that is not known.
    """
    if not isinstance(launch, str):
        words = list(launch)
        if "--config_file" not in words[:-1]:
            return "none"
        launch = words[words.index("--config_file") + 1]
    said = read_config(find_config(launch))
    if said.get("distributed_type") == "FSDP":
        return "all"
    stage = (said.get("deepspeed_config") or {}).get("zero_stage", 0)
    return {1: "optimizer", 2: "gradients", 3: "all"}.get(stage, "none")


def visible_gpus() -> list[int]:
    """Return the memory of each GPU that this process sees, in bytes."""
    if not _is_there("torch"):
        return []
    from torch import cuda

    return [cuda.get_device_properties(gpu).total_memory for gpu in range(cuda.device_count())]


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
