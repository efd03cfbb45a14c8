"""Reinforcement learning with TRL's GRPOTrainer: theta_rl, a whole model in fp32.

    python -m skillvec.recipes.grpo --config grpo.yaml [--any_argument value ...]

The configuration holds the arguments of `GrpoData`, trl.GRPOConfig and trl.ModelConfig; the command
line goes over it. `model_name_or_path` is theta_sft, so that the skill is what comes out minus what
went in. `use_vllm: true` generates with vLLM; LoRA by `use_peft: true`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from skillvec.recipes.training import (
    Data,
    ignore_deprecations,
    load_function,
    train_and_save,
    trainer_arguments,
)


@dataclass
class GrpoData(Data):
    """Rows to ask about, and how answers are rewarded."""

    columns: list[str] = field(default_factory=lambda: ["prompt"])
    rewards: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward functions as module:function; columns come by keyword."},
    )
    environments: str | None = field(
        default=None,
        metadata={
            "help": "module:function that makes TRL's environment factories by name from the rows, "
            "whose column `environment` names one."
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    import trl

    ignore_deprecations()
    parser = trl.TrlParser((GrpoData, trl.GRPOConfig, trl.ModelConfig), description=__doc__)
    data, settings, model = parser.parse_args_and_config(arguments)
    rewards = [load_function(name) for name in data.rewards]
    if not rewards:
        raise ValueError("rewards: expected at least one module:function")
    shared = trainer_arguments(data, settings, model, "grpo")
    make = load_function(data.environments) if data.environments else None
    trainer = trl.GRPOTrainer(
        reward_funcs=rewards,
        environment_factory=make(shared["train_dataset"]) if make else None,
        **shared,
    )
    train_and_save(trainer, "reward")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
