"""Supervised fine-tuning with TRL's SFTTrainer: theta_sft, a whole model in fp32.

    python -m skillvec.recipes.sft --config sft.yaml [--any_argument value ...]

The configuration holds the arguments of `Data` (recipes/training.py), trl.SFTConfig and
trl.ModelConfig; the command line goes over it. LoRA by `use_peft: true`; the adapter is merged
into what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

from skillvec.recipes.training import (
    Data,
    announce,
    finish,
    ignore_deprecations,
    parse,
    run_alone,
    train,
    trainer_arguments,
)


def dataclasses() -> tuple[type, ...]:
    """Return the classes whose fields are the keys of a configuration."""
    import trl

    return Data, trl.SFTConfig, trl.ModelConfig


def main(arguments: Sequence[str] | None = None) -> int:
    announce("sft")
    import trl

    ignore_deprecations()
    data, settings, model = parse(dataclasses(), arguments, __doc__)
    trainer = trl.SFTTrainer(**trainer_arguments(data, settings, model, "sft"))
    train(trainer, "loss")
    finish(trainer, data, model)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_alone(main, "sft"))
