"""Reinforcement learning with TRL's GRPOTrainer: theta_rl, a whole model in fp32.

    python -m skillvec.recipes.grpo --config grpo.yaml [--any_argument value ...]

The configuration holds the arguments of `GrpoData`, trl.GRPOConfig and trl.ModelConfig; the command
line goes over it. `model_name_or_path` is theta_sft, so that the skill is what comes out minus what
went in. `use_vllm: true` generates with vLLM; LoRA by `use_peft: true`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skillvec.recipes.training import (
    Data,
    RecipeError,
    announce,
    finish,
    ignore_deprecations,
    load_function,
    parse,
    run_alone,
    train,
    trainer_arguments,
)

# as the published configurations of PaST's RL say; TRL's default goes down to 0
DEFAULTS = {"lr_scheduler_type": "constant"}


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
            "whose column `environment` names one, and the model's name."
        },
    )
    allow_no_reward: bool = field(
        default=False,
        metadata={"help": "Save the model even if no reward told two answers apart."},
    )


def dataclasses() -> tuple[type, ...]:
    """Return the classes whose fields are the keys of a configuration."""
    import trl

    return GrpoData, trl.GRPOConfig, trl.ModelConfig


def check_rewards(history: Sequence[Mapping[str, Any]]) -> None:
    """Raise RecipeError if no group of completions ever had two different rewards.

    `history` is what the trainer logged: the share of groups whose rewards were all the same
    (frac_reward_zero_std) and the mean reward. Every advantage is 0 where that share is 1.
    """
    logged = [log for log in history if log.get("frac_reward_zero_std") is not None]
    if not logged or any(float(log["frac_reward_zero_std"]) < 1 for log in logged):
        return
    rewards = sorted({f"{float(log['reward']):g}" for log in logged if log.get("reward")})
    raise RecipeError(
        "the completions of a prompt had the same reward at every step (mean reward"
        f" {' '.join(rewards[:5]) or 0}), so every advantage was 0 and nothing could be learnt; see"
        ' "RL has no reward to begin with" in docs/past.md. allow_no_reward: true saves the model'
        " all the same"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    announce("grpo")
    import trl

    ignore_deprecations()
    data, settings, model = parse(dataclasses(), arguments, __doc__, DEFAULTS)
    rewards = [load_function(name) for name in data.rewards]
    if not rewards:
        raise RecipeError("rewards: expected at least one module:function")
    shared = trainer_arguments(data, settings, model, "grpo")
    make = load_function(data.environments) if data.environments else None
    trainer = trl.GRPOTrainer(
        reward_funcs=rewards,
        environment_factory=make(shared["train_dataset"], shared["model"]) if make else None,
        **shared,
    )
    train(trainer, "reward")
    if not data.allow_no_reward:
        check_rewards(trainer.state.log_history)
    finish(trainer, data, model, moves=not data.allow_no_reward)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_alone(main, "grpo"))
