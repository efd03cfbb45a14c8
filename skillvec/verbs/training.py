"""A callback for Hugging Face and TRL trainers: the skill vector beside every checkpoint.

The one module that needs transformers at its import; nothing else in the package imports it. A base
that is no model is refused before the first step. A vector that cannot be written later is an error
in the log with the command that makes up for it, and never the end of the training.
"""

import os
from pathlib import Path
from typing import Any

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.errors import SkillvecError, needs
from skillvec.ops.kernels import HALVES
from skillvec.verbs._diff import diff

with needs("train", "SkillVectorCallback"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.utils import logging

logger = logging.get_logger(__name__)


class SkillVectorCallback(TrainerCallback):
    """Write v = checkpoint - base whenever a Trainer saves (PaST, arXiv 2601.11258, stage 2).

    `base` is the folder of the model that training starts from, theta_sft. The vector of
    OUTPUT_DIR/checkpoint-N is OUTPUT_DIR/skill-N.safetensors; `options` are those of
    `skillvec.diff`, such as method="grpo". `written` lists what was made. Where a LoRA adapter is
    trained, base is what it is trained on, and the vector is s B A. Raises UsageError for a base
    that is not there.
    """

    def __init__(self, base: str | os.PathLike[str] | Checkpoint, **options: Any) -> None:
        self.base = open_checkpoint(base, "base")
        self.options = options
        self.written: list[Path] = []

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Write the vector of the checkpoint that was just saved; on the first process alone."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        path = folder.with_name(f"skill-{state.global_step}.safetensors")
        try:
            vector = diff(folder, self.base, path, force=True, **self.options)
        except (SkillvecError, OSError) as error:
            again = f"skillvec diff {folder} {self.base.path} -o {path}"
            logger.error(f"no skill vector of {folder}: {error}\nto make it later: {again}")
            return
        self.written.append(path)
        facts = vector.report.facts
        logger.info(f"{path}: norm {facts['norm']:.4g}, {100 * facts['density']:.3g} % changed")
        for warning in vector.report.warnings:
            logger.warning(f"{path}: {warning}")
        tuned = vector.manifest["tuned"]  # none of an adapter, whose s B A is fp32
        if tuned and set(HALVES) & set(tuned["dtypes"]):
            logger.warning_once(
                "checkpoints are saved in 16 bits: their skill vectors are thresholded copies of"
                " the true update. Train from fp32 weights to keep it whole."
            )
