"""What a pipeline would do: its stages, what they need on disk, what was changed by hand.

Hides how disk is estimated: at most whole models in fp32, a skill as large as a model, and of a
training the checkpoints that lie there at once (one, where only epochs say how many there will be).
"""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillvec.recipes.memory import Shapes, base_shapes, print_memory, stage_memory
from skillvec.recipes.stages import (
    Pipeline,
    Stage,
    as_run,
    is_of_earlier_version,
    states,
    tell_changed,
)

INDENT = 24  # columns before what a stage reads


@dataclass(frozen=True)
class Disk:
    """Bytes: of the stages to do, of the checkpoints that stay there, and what is free."""

    need: float
    checkpoints: float
    free: int

    @property
    def fits(self) -> bool:
        return self.need + self.checkpoints <= self.free


def disk_of(line: Pipeline, to_do: Sequence[Stage]) -> Disk | None:
    """Return what the stages to do need at most; None while the size of the model is unknown."""
    shapes, nbytes = base_shapes(line), model_nbytes(line)
    if nbytes is None:
        return None
    kept, removed = 0.0, [0.0]
    for stage in to_do:
        if stage.settings is not None:
            settings = as_run(line, stage)
            size = _checkpoint_nbytes(settings, shapes, nbytes / 4)
            if settings.get("remove_checkpoints"):
                removed.append(size)  # gone before the next training begins
            else:
                kept += size
    free = shutil.disk_usage(_existing(line.out)).free
    need = sum(stage.models * nbytes for stage in to_do)
    return Disk(need, kept + max(removed), free)


def _checkpoint_nbytes(
    settings: Mapping[str, Any], shapes: Shapes | None, parameters: float
) -> float:
    """Return the bytes of the checkpoints of one training that lie there at once."""
    if settings.get("save_strategy", "steps") == "no":
        return 0.0
    memory = stage_memory(settings, shapes, parameters, 1, "none", None)
    each = memory.checkpoint - (memory.moments if settings.get("save_only_model") else 0.0)
    steps, every = float(settings.get("max_steps", -1)), float(settings.get("save_steps", 500))
    count = math.inf  # epochs alone do not say how many
    if 0 < every < 1:
        count = math.ceil(1 / every)
    elif steps > 0:
        count = math.ceil(steps / max(every, 1))
    if (limit := settings.get("save_total_limit")) is not None:
        count = min(count, float(limit) + 1)  # the next one is written before the oldest goes
    return each * (count if math.isfinite(count) else 1)


def model_nbytes(line: Pipeline) -> float | None:
    """Return the size of the base model in fp32: from its headers, else from `parameters`."""
    shapes = base_shapes(line)
    numel = sum(map(math.prod, shapes.values())) if shapes else line.parameters
    return None if numel is None else 4.0 * numel


def show_stages(line: Pipeline) -> None:
    """Print every stage: its state, the size of what it makes at most, its output, what it reads.

    The second line of a stage names what it reads; paths are relative to the pipeline's `out`.
    """
    from rich.console import Console

    from skillvec.analysis.wording import human_bytes

    console = Console(highlight=False, soft_wrap=True, markup=False)
    nbytes = model_nbytes(line)
    console.print(f"{line.out}: {len(line.stages)} stages; the size is that of the output at most")
    found = states(line)
    for number, (stage, state, changed) in enumerate(found, 1):
        size = "" if not stage.models else "?" if nbytes is None else human_bytes(nbytes)
        console.print(f"{number:>4}  {state:<5}  {size:>7}  {_short(line, stage.output)}")
        sources = [_short(line, read) for read in stage.reads if Path(read).suffix or "/" in read]
        notes = [tell_changed(stage, changed)] if changed else []
        if is_of_earlier_version(line, stage):
            notes.append("made by an earlier version, which did not record what it made")
        for text in (", ".join(dict.fromkeys(sources)), *notes):
            for part in _wrap(text, console.width - INDENT):
                console.print(" " * INDENT + part, style="dim")
    to_do = [stage for stage, state, _ in found if state != "done"]
    said = _sentence(line, disk_of(line, to_do), to_do)
    console.print("\n".join(_wrap(said, console.width)))
    print_memory(line)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)  # of paths


def _sentence(line: Pipeline, disk: Disk | None, to_do: Sequence[Stage]) -> str:
    from skillvec.analysis.wording import human_bytes

    if disk is None:
        return "sizes: unknown until the base model is on disk; `parameters` says them before"
    said = f"to do: at most {human_bytes(disk.need)} in fp32"
    if disk.checkpoints:
        said += f", and {human_bytes(disk.checkpoints)} of training checkpoints"
    said += f"; free here: {human_bytes(disk.free)}"
    if disk.fits:
        return said
    scores = {*line.scores.values()}
    readers = {
        stage.name: [other.output for other in line.stages if str(stage.output) in other.reads]
        for stage in to_do
        if stage.models
    }
    spare = sum(bool(outputs) and scores >= {*outputs} for outputs in readers.values())
    spared = human_bytes(spare * (model_nbytes(line) or 0.0))
    return (
        f"{said} - NOT ENOUGH. Models that nothing needs once they are scored are {spared} of it;"
        " fewer targets, lambdas or controls at a time need less"
    )


def _short(line: Pipeline, path: str | Path) -> str:
    path = Path(path)
    return str(path.relative_to(line.out) if path.is_relative_to(line.out) else path)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
