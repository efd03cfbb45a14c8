"""Supervised fine-tuning with TRL's SFTTrainer: theta_sft, a whole model in fp32.

    python -m skillvec.recipes.sft --config sft.yaml [--any_argument value ...]

The configuration holds the arguments of `Data` (recipes/training.py), trl.SFTConfig and
trl.ModelConfig; the command line goes over it. LoRA by `use_peft: true`; the adapter is merged
into what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

from skillvec.recipes.training import Data, ignore_deprecations, train_and_save, trainer_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    import trl

    ignore_deprecations()
    parser = trl.TrlParser((Data, trl.SFTConfig, trl.ModelConfig), description=__doc__)
    data, settings, model = parser.parse_args_and_config(arguments)
    trainer = trl.SFTTrainer(**trainer_arguments(data, settings, model, "sft"))
    train_and_save(trainer, "loss")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
