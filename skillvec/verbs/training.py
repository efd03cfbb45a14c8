"""Callbacks for Hugging Face and TRL trainers: vectors of checkpoints, evaluations with a vector.

The one module that needs transformers at its import; nothing else in the package imports it. A base
that is no model, and a vector that does not fit, are refused before the first step. A vector that
cannot be written later is an error in the log with the command that makes up for it, and never the
end of the training.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.errors import SkillvecError, needs
from skillvec.ops.kernels import HALVES
from skillvec.vectors.vector import SkillVector
from skillvec.verbs._diff import diff
from skillvec.verbs.live import attach
from skillvec.verbs.reprs import cut, say_some

with needs("train", "SkillVectorCallback"):
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
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

    def __repr__(self) -> str:
        return (
            f"<SkillVectorCallback of {cut(self.base.ref)}: {len(self.written)} vectors written"
            f"{_say_options(self.options)}>"
        )

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


class SkillVectorEvaluation(TrainerCallback):
    """Evaluate the model that is trained once more with a vector attached, after each evaluation.

    `trainer.add_callback(SkillVectorEvaluation(trainer, vector, lam=0.5))` logs what `trainer`
    measures on the same batches under `prefix` in place of "eval": eval_skill_loss beside
    eval_loss, and eval_skill_gain, the realised gain. Training goes on with its exact parameters
    and random numbers, as if there had been no second evaluation. `options` are those of
    `skillvec.attach`. A vector that does not fit is refused before the first step, as are models
    that none can be attached to: those with an adapter of PEFT, parameters in parts.
    """

    def __init__(
        self, trainer: Any, vector: str | os.PathLike[str] | SkillVector, lam: float = 1.0,
        prefix: str = "eval_skill", **options: Any,
    ) -> None:  # fmt: skip
        self.trainer, self.prefix = trainer, prefix
        self.vector = SkillVector.open(vector)
        self.options = options | {"lam": lam}

    def __repr__(self) -> str:
        return (
            f"<SkillVectorEvaluation of {cut(self.vector.ref)}: logs {cut(self.prefix)}_*"
            f"{_say_options(self.options)}>"
        )

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        """Attach the vector and take it off again: what does not fit is told now."""
        with attach(self.trainer.model, self.vector, **self.options):
            pass

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Evaluate on the batches that were just evaluated, and log that beside."""
        trainer = self.trainer
        timed = next(key for key in given["metrics"] if key.endswith("_runtime"))
        plain = timed.removesuffix("_runtime")
        prefix = f"{self.prefix}{plain.removeprefix('eval')}"
        with _same_random_numbers(), attach(trainer.model, self.vector, **self.options) as live:
            only_loss = True if trainer.compute_metrics is None else None
            output = trainer.evaluation_loop(
                given["eval_dataloader"], "Evaluation with a skill vector", only_loss,
                metric_key_prefix=prefix,
            )  # fmt: skip
        found = output.metrics | _own_metrics(trainer, prefix)
        found[f"{prefix}_gain"] = live.report.facts["gain"]
        for callback in trainer.callback_handler.callbacks:
            if (bar := getattr(callback, "prediction_bar", None)) is not None:
                bar.close()  # the first evaluation's is closed already
                callback.prediction_bar = None
        Trainer.log(trainer, found)


def _say_options(options: dict[str, Any]) -> str:
    said = [f"{name}={cut(repr(value), 40)}" for name, value in options.items()]
    return f", {say_some(said, 5)}" if said else ""


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave the random numbers of a training as if nothing had drawn any: loaders draw a seed."""
    import torch

    with torch.random.fork_rng(range(torch.cuda.device_count())):
        states = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _own_metrics(trainer: Any, prefix: str) -> dict[str, float]:
    """Return what a trainer of TRL has noted itself, which its own log would call eval_*."""
    held = getattr(trainer, "_metrics", {}).get("eval", {})
    known = {key: [v for v in noted if not isnan(v)] for key, noted in held.items()}
    held.clear()
    return {f"{prefix}_{key}": sum(v) / len(v) for key, v in known.items() if v}
