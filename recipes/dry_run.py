"""What a pipeline would do: its stages, what they need on disk, what was changed by hand.

Hides how sizes are estimated. They are upper bounds: whole models in fp32, a skill as large as a
model, and of a training the checkpoints that lie there at once.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillvec.recipes.stages import Pipeline, Stage, is_of_earlier_version, states, tell_changed

# bytes a parameter of a checkpoint for resuming: fp32 weights and AdamW's two moments
CHECKPOINT, WEIGHTS = 12, 4
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
    nbytes = model_nbytes(line)
    if nbytes is None:
        return None
    free = shutil.disk_usage(_existing(line.out)).free
    need = sum(stage.models * nbytes for stage in to_do)
    kept = [_checkpoint_nbytes(stage.settings, nbytes / 4) for stage in to_do if stage.settings]
    return Disk(need, sum(kept), free)


def _checkpoint_nbytes(settings: Mapping[str, Any], parameters: float) -> float:
    """Return the bytes of the checkpoints of one training: those of adapters are not counted."""
    if settings.get("save_strategy", "steps") == "no" or settings.get("use_peft"):
        return 0.0
    each = parameters * (WEIGHTS if settings.get("save_only_model") else CHECKPOINT)
    steps = float(settings.get("max_steps", -1))
    every = float(settings.get("save_steps", 500))
    count = math.inf
    if steps > 0:
        count = 1 / every if 0 < every < 1 else math.ceil(steps / max(every, 1))
    if (limit := settings.get("save_total_limit")) is not None:
        count = min(count, float(limit) + 1)  # the next one is written before the oldest goes
    # epochs alone do not say how many: one at least
    return each * (count if math.isfinite(count) else 1)


def model_nbytes(line: Pipeline) -> float | None:
    """Return the size of the base model in fp32: from its headers, else from `parameters`."""
    from skillvec.checkpoints.opening import open_checkpoint
    from skillvec.errors import SkillvecError

    with contextlib.suppress(SkillvecError):  # not there yet, or a Hub id
        return 4.0 * sum(spec.numel for spec in open_checkpoint(line.base, "base").values())
    return None if line.parameters is None else 4.0 * line.parameters


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
            for part in textwrap.wrap(text, console.width - INDENT, break_long_words=False):
                console.print(" " * INDENT + part, style="dim")
    to_do = [stage for stage, state, _ in found if state != "done"]
    said = _sentence(line, disk_of(line, to_do), to_do)
    console.print("\n".join(textwrap.wrap(said, console.width, break_long_words=False)))


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
