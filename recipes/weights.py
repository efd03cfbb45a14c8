"""From a trainer to a whole model on the disk: gathered, in the promised dtype, checked.

Hides where a trainer keeps its weights. FSDP and ZeRO spread them over processes and, depending on
their configuration, save no weights or 16-bit copies of them; here every weight is gathered as it
was trained and written by one process, whatever that configuration says. What was written is then
opened by skillvec and subtracted from the start, as the next stage will do it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from skillvec.recipes.training import RecipeError

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def keep_whole(settings: Any, dtype: str) -> None:
    """Let DeepSpeed keep weights of fp32 while it computes in bf16; called before a model is made.

    With its own `bf16` the weights become bf16 before the fp32 copies of the optimiser are made of
    them, so that training starts at a rounded model, and v holds that rounding. Its autocast leaves
    them alone (DeepSpeed 0.17.1). Raises RecipeError for fp16, and for a dtype that is not said.
    """
    plugin = settings.deepspeed_plugin
    if plugin is None or dtype in ("bfloat16", "float16"):
        return
    if dtype != "float32":
        raise RecipeError(f"dtype: {dtype}: with DeepSpeed, say float32 or bfloat16")
    if settings.fp16:
        raise RecipeError("fp16: DeepSpeed would round the weights to fp16; set bf16: true instead")
    if settings.bf16:
        settings.bf16, settings.mixed_precision = False, "no"
        plugin.deepspeed_config["bf16"] = {"enabled": False}
        plugin.deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        plugin.set_deepspeed_weakref()  # what from_pretrained looks at


def save_whole(trainer: Any, start: str, dtype: str, moves: bool = True) -> None:
    """Save a whole model into the output folder and check it; every process takes part.

    `start` is the folder that training began from, `dtype` a name of torch, or "auto" for that of
    the start. An adapter is merged. Raises RecipeError as `check_saved`.
    """
    from accelerate.utils import broadcast_object_list

    model = trainer.accelerator.unwrap_model(trainer.model)
    spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = gather_weights(trainer, hasattr(model, "peft_config")) if spread else None
    told: list[str | None] = [None]
    if trainer.is_world_process_zero():
        try:
            _save(trainer, model, weights, start, dtype)
            check_saved(trainer.args.output_dir, start, dtype, moves)
        except RecipeError as error:
            told = [str(error)]
    if message := broadcast_object_list(told)[0]:  # or the others would say that they lost this one
        raise RecipeError(message)


def _save(trainer: Any, model: Any, weights: dict[str, Any] | None, start: str, dtype: str) -> None:
    """Write the model, with an adapter merged, its config and its tokenizer; process 0 alone.

    `weights` are those that were gathered; None where the model holds them.
    """
    import torch

    folder = trainer.args.output_dir
    if hasattr(model, "peft_config"):
        whole = weights is None
        model = model.merge_and_unload() if whole else _merge(trainer, model, start, weights)
        weights = None
    if weights is not None and dtype in STORED:
        kept = getattr(torch, dtype)
        weights = {name: value.to(kept) for name, value in weights.items()}
    model.save_pretrained(folder, state_dict=weights)
    if dtype in STORED:  # the weights of a trainer may have had another one
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)


def gather_weights(trainer: Any, only_trained: bool) -> dict[str, Any]:
    """Return {name: tensor} of a model spread by FSDP or DeepSpeed, on the CPU of process 0.

    In the dtype of training: DeepSpeed's are its fp32 copies. `only_trained` leaves out the rest.
    Every process takes part; all but process 0 return an empty dict.
    """
    if trainer.is_deepspeed_enabled:
        return dict(_gather_deepspeed(trainer, only_trained))
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained
    )
    return get_model_state_dict(trainer.model, options=options)


def _gather_deepspeed(trainer: Any, only_trained: bool) -> Iterable[tuple[str, Any]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = trainer.accelerator.unwrap_model(trainer.model)
    for name, weight in model.named_parameters():
        if only_trained and not weight.requires_grad:
            continue
        value = safe_get_full_fp32_param(weight) if weight.requires_grad else None
        with deepspeed.zero.GatheredParameters([weight], enabled=value is None):
            if trainer.is_world_process_zero():
                value = weight if value is None else value
                yield name, value.detach().cpu().clone()


def _merge(trainer: Any, model: Any, start: str, weights: dict[str, Any]) -> Any:
    """Return the start in a fresh copy with the trained adapter merged into it, on the CPU."""
    import peft
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from trl.trainer.utils import create_model_from_path

    unset_hf_deepspeed_config()  # or this one process would wait for the others to load it
    made = dict(trainer.args.model_init_kwargs) | {"device_map": "cpu"}
    made.pop("revision", None)  # of the Hub id, of which `start` is the folder
    fresh = create_model_from_path(start, **made)
    fresh.config, fresh.generation_config = model.config, model.generation_config
    whole = peft.get_peft_model(fresh, model.peft_config["default"])
    missing = whole.load_state_dict(weights, strict=False)
    trained = {name for name, weight in whole.named_parameters() if weight.requires_grad}
    if missing.unexpected_keys or trained & set(missing.missing_keys):
        raise RecipeError(f"the adapter was not gathered whole: {missing}")
    return whole.merge_and_unload()


def check_saved(folder: str | Path, start: str | Path, dtype: str, moves: bool = True) -> None:
    """Open what was written, and subtract the start from it.

    Raises RecipeError, saying what was found, where a tensor of `start` is missing or of another
    shape, where a dtype is not the promised one, where a value is not finite, and, if `moves`,
    where nothing differs.
    """
    from skillvec import SkillVector
    from skillvec.checkpoints.opening import open_checkpoint
    from skillvec.errors import SkillvecError
    from skillvec.ops.kernels import FLOATS

    try:
        before, written = open_checkpoint(start, "start"), open_checkpoint(folder, "trained")
        vector = SkillVector.between(written, before)
    except SkillvecError as error:
        raise RecipeError(f"{folder}: the training left no whole model: {error}") from None
    promised = {STORED[dtype]} if dtype in STORED else {spec.dtype for spec in before.values()}
    rounded = [
        f"{spec.name}: {spec.dtype}" for spec in written.values()
        if spec.dtype in FLOATS and spec.dtype not in promised | {"F32"}
    ]  # fmt: skip
    if rounded:
        raise RecipeError(
            f"{folder}: {len(rounded)} tensors are not in {' or '.join(sorted(promised))}, first"
            f" {rounded[0]}: a skill vector of them would be a rounded copy of the update; `dtype`"
            " says in what a model is trained and saved"
        )
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(_measure, vector.deltas.values()))
    lost = [name for name, (bad, _) in zip(vector.deltas, found, strict=True) if bad]
    if lost:
        raise RecipeError(
            f"{folder}: {len(lost)} tensors hold values that are not finite, first {lost[0]}: the"
            " training diverged; a smaller learning_rate or max_grad_norm helps"
        )
    if moves and not any(changed for _, changed in found):
        raise RecipeError(
            f"{folder}: no weight differs from {start}, so v = 0: the training moved nothing (its"
            " learning rate, its number of steps, and for RL its rewards say why; docs/past.md,"
            ' "RL has no reward to begin with")'
        )


def _measure(delta: Any) -> tuple[bool, bool]:
    """Return whether values of the trained tensor are not finite, and whether any differ."""
    from skillvec.ops.block import block_count
    from skillvec.vectors.block_reader import Block, Workspace

    workspace, lost, changed = Workspace(), False, False
    for index in range(block_count(delta.spec.numel)):
        block = Block(index, delta.spec.numel, workspace, {}, defaultdict(bytearray))
        found, replaced = delta.read(block, "delta1")
        lost = lost or block.tuned_nonfinite > 0
        changed = changed or bool(found.values.any() or found.exact.size or replaced.size)
    return lost, changed
