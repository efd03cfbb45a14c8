"""Runs a training recipe on processes of a CPU: `accelerate launch ... spread.py MODULE ...`.

accelerate spreads a model by FSDP over GPUs alone; here it is told that its processes, which talk
by gloo, are GPUs. So that GRPO takes the same completions however many processes there are,
`REPEATABLE=1` puts tokens in place of those that were sampled, drawn for a prompt and its place in
its group.
"""

import os
import random
import runpy
import sys
from typing import Any


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, said)) % 3) for said in completions]


def treat_as_gpus() -> None:
    from accelerate.state import DistributedType, PartialState

    made = PartialState.__init__

    def init(self: Any, *given: Any, **more: Any) -> None:
        made(self, *given, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def repeat_completions() -> None:
    import trl

    sample = trl.GRPOTrainer._generate_single_turn

    def generate(self: Any, prompt_ids: Any, *given: Any, **more: Any) -> Any:
        sample(self, prompt_ids, *given, **more)  # with whatever the processes say to each other
        first, groups = self.accelerator.process_index * len(prompt_ids), self.num_generations
        drawn = []
        for row, prompt in enumerate(prompt_ids, first):
            draw = random.Random(f"{self.state.global_step} {prompt} {row % groups}")
            drawn.append([draw.randrange(4, 100) for _ in range(3)])
        return drawn, None

    trl.GRPOTrainer._generate_single_turn = generate


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        treat_as_gpus()
    if os.environ.get("REPEATABLE"):
        repeat_completions()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__")
